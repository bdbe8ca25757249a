"""A tiny base, two adapters on it and held-out rows, once for all tests of the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import intarsia as ia
from intarsia import pretrained
from intarsia.cli.app import app
from toy import save_toy


@dataclass(frozen=True)
class World:
    """Folders and files; nothing of it is written to by a test."""

    base: Path
    adapters: dict[str, Path]
    rows: Path
    other_rows: Path


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What a command that went well printed, which is one JSON document and nothing else."""
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("world")
    base = save_toy(home / "base", torch.bfloat16)
    model = pretrained.load(base).model
    kinds = {"spells": ia.Shira(density=0.05), "counts": ia.Lora(rank=2), "lengths": ia.Dora(ia.Lora(rank=2))}
    folders = {}
    for seed, (name, method) in enumerate(kinds.items()):
        ia.attach(model, method, name=name, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                size = 10 ** -(4 * torch.rand(parameter.shape, generator=generator))  # some too small for bfloat16
                parameter.add_(0.05 * size * torch.randn(parameter.shape, generator=generator))
        ia.sync(model)
        note = {"shape of the rows": "prompt"} if name == "spells" else {}
        folders[name] = ia.save(model, home / name, name, note=note)
        ia.detach(model, name)
    files = home / "rows.jsonl", home / "other.jsonl"
    for file, letter in zip(files, "ab", strict=True):
        rows = [{"prompt": f"{letter}{i} ->", "completion": f" {' '.join(letter * (i + 1))}"} for i in range(6)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(base, folders, *files)


@pytest.fixture
def intarsia() -> Callable[..., Ended]:
    """``intarsia("show", folder, stdin="")``: run a command in this process."""

    def run(*words: object, stdin: str = "") -> Ended:
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin, prog_name="intarsia")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ended(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def program() -> list[str]:
    """The command line as a program of its own: what a shell would start."""
    return [sys.executable, "-c", "from intarsia.cli.app import main; main()"]
