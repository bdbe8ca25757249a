"""The table of docs/interop.md says what the writers do."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import intarsia as ia
from intarsia.edits import Edit
from intarsia.interop import TARGETS
from intarsia.model import base_of

DOCS = Path(__file__).parents[2] / "docs"
TAKING: dict[str, dict[str, Any]] = {"--rank": {"rank": 4}, "--dense": {"dense": True}}


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAMPLES: Mapping[str, Edit] = tables().samples()


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("to", [name for name, target in TARGETS.items() if target.base and not target.whole])
def test_an_edit_is_taken_as_the_table_says(to, kind, tmp_path):
    model = nn.ModuleDict({"square": nn.Linear(64, 64)})
    edits = {"square.weight": SAMPLES[kind]}
    adapter = ia.Adapter("ours", edits, base_of(model, edits)[0], {"name": "hand-made"})
    target, out = TARGETS[to], tmp_path / f"out{TARGETS[to].suffix}"
    said = target.outcome(SAMPLES[kind])
    if said == "exact":
        assert target.write(adapter, model, out).loss == 0.0
        return
    with pytest.raises(ia.IntarsiaError, match=said if said.startswith("--") else "cannot hold this adapter"):
        target.write(adapter, model, out)
    assert list(tmp_path.iterdir()) == []
    if said in TAKING:
        target.write(adapter, model, out, **TAKING[said])


def test_every_kind_of_edit_has_a_row():
    page = (DOCS / "interop.md").read_text(encoding="utf-8")
    assert all(f"| {kind} |" in page for kind in SAMPLES)
