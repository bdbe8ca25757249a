"""A short run of bench/endurance.py: threads, failures in the middle, all kinds of edits, plans that come and go."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from intarsia.deck import crew
from intarsia.deck import writer as writer_module


def _script() -> ModuleType:
    path = Path(__file__).parent.parent / "bench" / "endurance.py"
    spec = importlib.util.spec_from_file_location("bench_endurance", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the names of their types
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dtype", "writer"), [(torch.float32, "auto"), (torch.bfloat16, "torch")], ids=str)
def test_the_base_survives_threads_and_failures(dtype, writer, monkeypatch):
    monkeypatch.setattr(writer_module, "SMALL", 0)  # all loads are shared out
    monkeypatch.setattr(crew, "size", lambda: 3)
    found = _script().endure(400, 20, 4, 0.05, dtype, writer)
    assert found.wrong == []
    assert found.switches == 400
    assert found.failures > 20
    assert found.checks >= 4


def test_adding_reads_no_more_with_many_at_hand():
    cost = _script().adding(60, some=8)
    assert cost.last_bytes < 1.2 * cost.first_bytes
