"""Training on a compressed base that is repaired first, and from where the data lies: what a config says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import intarsia as ia
from intarsia import bases, pretrained
from intarsia import model as models
from intarsia.methods import Eora
from intarsia.train.config import load_config
from intarsia.train.trainer import train
from toy import save_toy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the same base pruned, and rows."""
    home = tmp_path_factory.mktemp("home")
    loaded = pretrained.load(save_toy(home / "whole"))
    bases.degrade(loaded.model, "2:4")
    loaded.model.save_pretrained(home / "pruned")
    loaded.tokenizer.save_pretrained(home / "pruned")
    lines = [{"prompt": f"{i} a ->", "completion": f" {'a' * (i % 3 + 2)}"} for i in range(24)]
    (home / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def config(home: Path, folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(
        f"model: {home / 'pruned'}\ndata: {home / 'rows.jsonl'}\noutput: {folder / 'out'}\ntrain: {{steps: 2, batch_size: 8}}\n"
        + text
    )
    return file


def test_the_original_of_the_config_is_what_is_repaired(home, tmp_path):
    file = config(home, tmp_path, f"method: {{name: eora, rank: 4, weighting: none}}\noriginal: {home / 'whole'}\n")
    train(load_config(file, ["train.lr=1e-12"]))
    model, whole = pretrained.load(home / "pruned").model, pretrained.load(home / "whole").model
    expected = pretrained.load(home / "pruned").model
    ia.attach(expected, Eora(rank=4, weighting="none"), original=whole)
    ia.load(model, tmp_path / "out")
    wanted: Any = models.states(expected, "default")
    for name, state in wanted.items():
        found: Any = models.states(model, "out")[name]
        torch.testing.assert_close(found.B @ found.A, state.B @ state.A, atol=1e-5, rtol=1e-4)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["eval_loss"] != report["base_loss"]


def test_no_original_is_told_before_anything_is_written(home, tmp_path):
    with pytest.raises(
        ia.IntarsiaError, match="eora computes from what the compression of the base changed: name the model before"
    ):
        train(load_config(config(home, tmp_path, "method: {name: eora, rank: 4}\n")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_eva_starts_in_the_rows_and_loads_with_its_ranks(home, tmp_path):
    file = config(home, tmp_path, "method: {name: eva, rank: 2}\n")
    train(load_config(file, ["train.calibration_batches=3"]))
    model = pretrained.load(home / "pruned").model
    ia.load(model, tmp_path / "out")
    states: Any = models.states(model, "out")
    ranks = [state.A.shape[0] for state in states.values()]
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules()) - 1
    assert sum(ranks) == 2 * layers
    assert len(set(ranks)) > 1
