"""Runs that keep snapshots, and runs beside adapters to avoid: what they write, and how they go on after an end of any kind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import intarsia as ia
from intarsia import pretrained, store
from intarsia.edits import overlap
from intarsia.errors import IntarsiaError
from intarsia.evaluate import held_out_loss
from intarsia.train import trainer as trainer_module
from intarsia.train.config import make_config
from intarsia.train.plan import plan
from intarsia.train.plots import loss_curve
from intarsia.train.snapshots import put_in_place, smoothed_loss, snapshot_steps
from intarsia.train.trainer import TrainingStopped
from toy import save_toy

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model ``m`` and data ``d.jsonl``."""
    folder = tmp_path_factory.mktemp("training")
    save_toy(folder / "m")
    rows = [{"prompt": f"{i}:", "completion": f" {str(i)[::-1]}"} for i in range(60)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def train(place):
    """A run on the model, which is loaded once: a run gives it back as it was."""
    base = pretrained.load(place / "m")

    def run(config):
        return trainer_module.train(config, pretrained=base)

    return run


@pytest.fixture
def config(place, tmp_path):
    def make(method=None, *, out="out", data=None, overwrite=False, avoid=(), values="exact", **train_keys):
        keys = {"steps": STEPS, "batch_size": 12, "save_every": 5, "eval_every": 50, "lr": 1e-2} | train_keys
        return make_config(
            {
                "model": str(place / "m"),
                "data": data or str(place / "d.jsonl"),
                "method": method or {"name": "shira", "density": 0.1, "scorer": "magnitude"},
                "output": str(tmp_path / out),
                "overwrite": overwrite,
                "avoid": [str(tmp_path / folder) for folder in avoid],
                "train": keys,
                "save": {"values": values},
            }
        )

    return make


def events(outcome, kind: str) -> dict[int, dict]:
    lines = (Path(outcome.output) / "log.jsonl").read_text().splitlines()
    return {e["step"]: e for e in map(json.loads, lines) if e["event"] == kind}


def contents(outcome) -> dict[str, tuple[str, dict]]:
    """Digest and note of every snapshot."""
    found = {Path(folder).name: ia.read(folder) for folder in outcome.snapshots}
    return {name: (adapter.digest, dict(adapter.note)) for name, adapter in found.items()}


def stop_at(monkeypatch, owner, name: str, when) -> None:
    """Ctrl-C while ``owner.name`` is called, as soon as ``when(*its arguments)`` says so."""
    usual = getattr(owner, name)
    done: list[bool] = []

    def then(*given, **more):
        if not done and when(*given):
            done.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return usual(*given, **more)

    monkeypatch.setattr(owner, name, then)


# --- which steps, and what of their loss
@pytest.mark.parametrize(
    ("steps", "count", "begin", "expected"),
    [(12, 4, 2 / 3, [9, 10, 11, 12]), (300, 4, 2 / 3, [225, 250, 275, 300]), (100, 3, 0.0, [34, 67, 100]), (7, 1, 0.5, [7]),
     (10, 0, 0.5, []), (1, 1, 0.9, [1])],
)  # fmt: skip
def test_the_steps(steps, count, begin, expected):
    assert snapshot_steps(steps, count, begin) == expected


def test_more_than_there_are_steps_is_refused(config):
    with pytest.raises(IntarsiaError, match=r"train.snapshots=5: from 0.67 .* there are 4 of its 12 steps; ask for 4"):
        plan(config(snapshots=5))
    assert plan(config(snapshots=4)).snapshots == [9, 10, 11, 12]


def test_the_smoothed_loss_is_the_mean_of_the_steps_since_the_one_before():
    log = [{"event": "eval", "step": 0, "eval_loss": 9.0}]  # then entries of 2, 2, 2, 2, 1, 2, 1 steps
    log += [{"event": "step", "step": step, "loss": float(step)} for step in (2, 4, 6, 8, 9, 11, 12)]
    assert smoothed_loss(log, 0, 6) == pytest.approx((2 * 2 + 2 * 4 + 2 * 6) / 6)
    assert smoothed_loss(log, 6, 9) == pytest.approx((2 * 8 + 9) / 3)
    assert smoothed_loss(log, 9, 12) == pytest.approx((2 * 11 + 12) / 3)


# --- a whole run
@pytest.mark.parametrize("log_every", [1, 4])
def test_snapshots_are_adapters_with_loss_and_step_in_their_note(train, config, place, log_every):
    wanted = config(snapshots=2, log_every=log_every)
    outcome = train(wanted)
    assert [Path(folder).name for folder in outcome.snapshots] == ["step-000010", "step-000012"]
    assert sorted(p.name for p in Path(outcome.output, "snapshots").iterdir()) == ["step-000010", "step-000012"]
    assert not Path(f"{outcome.output}.unfinished").exists()
    steps, base = events(outcome, "step"), pretrained.load(place / "m")
    ready = plan(wanted, base)
    for folder, step in zip(outcome.snapshots, (10, 12), strict=True):
        adapter = ia.read(folder)
        assert adapter.note.keys() == {"step", "loss", "eval_loss"}
        assert adapter.note["step"] == step
        if log_every == 1:  # the first one's since step 8, two thirds of the run
            expected = (steps[step - 1]["loss"] + steps[step]["loss"]) / 2
            assert adapter.note["loss"] == pytest.approx(expected)
        ia.load(base.model, folder)
        found = held_out_loss(base.model, base.tokenizer, ready.held_out)
        assert found == pytest.approx(adapter.note["eval_loss"], abs=1e-6)
        ia.detach(base.model, Path(folder).name)
    last = ia.read(outcome.snapshots[-1])
    assert last.digest == outcome.digest  # the last one is the run's end
    assert ia.read(outcome.snapshots[0]).digest != outcome.digest
    assert json.loads((Path(outcome.output) / "report.json").read_text())["snapshots"] == outcome.snapshots


@pytest.mark.parametrize(
    "method", [{"name": "lora", "rank": 2}, {"name": "shira", "density": 0.1, "schedule": "drop-and-grow", "every": 3}]
)
def test_snapshots_change_nothing_of_what_is_trained(train, config, method):
    without = train(config(method, out="without"))
    assert without.snapshots == []
    assert train(config(method, snapshots=3, snapshots_from=0.0)).digest == without.digest


def test_without_held_out_rows_the_note_has_no_eval_loss(train, config, place):
    outcome = train(config(snapshots=2, data={"train": str(place / "d.jsonl"), "eval_share": 0.0}))
    assert [note.keys() for _, note in contents(outcome).values()] == [{"step", "loss"}] * 2


def test_snapshots_are_written_as_the_adapter_is(train, config):
    outcome = train(config(snapshots=1, values="bfloat16"))
    assert ia.read(outcome.snapshots[0]).about["rounded"] == "bfloat16"


# --- ends of all kinds
THREE = {"snapshots": 3, "snapshots_from": 0.0}


@pytest.fixture(scope="module")
def whole(train, place):
    """A run with three snapshots that nothing ended: its digest, and those of the snapshots with their notes."""
    out = place / "whole"
    keys = {"steps": STEPS, "batch_size": 12, "save_every": 5, "eval_every": 50, "lr": 1e-2} | THREE
    method = {"name": "shira", "density": 0.1, "scorer": "magnitude"}
    tree = {
        "model": str(place / "m"),
        "data": str(place / "d.jsonl"),
        "method": method,
        "output": str(out),
        "train": keys,
    }
    outcome = train(make_config(tree))
    return outcome.digest, contents(outcome)


@pytest.mark.parametrize(
    "step", [7, 8, 10, 12]
)  # before, between and at snapshots (4, 8, 12), and at a checkpoint (10)
def test_ctrl_c_and_the_same_command_give_the_same_snapshots(train, config, monkeypatch, whole, step):
    stop_at(
        monkeypatch, trainer_module._AfterStep, "on_step_end", lambda _, args, state, *more: state.global_step == step
    )
    with pytest.raises(TrainingStopped):
        train(config(**THREE))
    assert not Path(config().output).exists()
    outcome = train(config(**THREE))
    assert (outcome.digest, contents(outcome)) == whole


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", [2, 4, 5, 7, 8])
def test_a_death_at_any_write_loses_no_snapshot(train, config, monkeypatch, whole, call):
    """The writes of a run with 3 snapshots: store.write for each, for the adapter; a move for each; the curve."""
    calls: list[int] = []

    def dying(usual):
        def then(*given, **more):
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return usual(*given, **more)

        return then

    with monkeypatch.context() as patched:
        patched.setattr(store, "write", dying(store.write))
        patched.setattr("intarsia.train.snapshots.shutil.move", dying(shutil.move))
        patched.setattr(trainer_module, "loss_curve", dying(loss_curve))
        with pytest.raises(Killed):
            train(config(**THREE))
    outcome = train(config(**THREE))
    assert (outcome.digest, contents(outcome)) == whole


def test_snapshots_of_an_adapter_that_is_replaced_go_with_it(train, config):
    first = train(config(snapshots=4))
    again = train(config(snapshots=2, overwrite=True, lr=2e-2))
    assert sorted(p.name for p in Path(again.output, "snapshots").iterdir()) == ["step-000010", "step-000012"]
    assert ia.read(again.snapshots[-1]).digest == again.digest != first.digest
    Path(again.output, "snapshots", "mine.txt").write_text("kept")
    train(config(overwrite=True))
    assert [p.name for p in Path(again.output, "snapshots").iterdir()] == ["mine.txt"]


def test_nothing_aside_changes_nothing_in_place(tmp_path):
    (tmp_path / "out/snapshots/step-000004").mkdir(parents=True)
    put_in_place(tmp_path / "aside", tmp_path / "out", [4])
    assert (tmp_path / "out/snapshots/step-000004").exists()


def test_a_run_with_other_snapshots_does_not_go_on(train, config, monkeypatch):
    stop_at(monkeypatch, trainer_module._AfterStep, "on_step_end", lambda _, args, state, *more: state.global_step == 6)
    with pytest.raises(TrainingStopped):
        train(config())
    with pytest.raises(IntarsiaError, match=r"train.snapshots was 0, is now 2"):
        train(config(snapshots=2))


# --- adapters to avoid
def test_three_skills_beside_each_other(train, config, tmp_path):
    outcomes = [train(config(out=out, avoid=avoid)) for out, avoid in (("a", ()), ("b", ("a",)), ("c", ("a", "b")))]
    a, b, c = (ia.read(outcome.output) for outcome in outcomes)
    for weight in a.edits:
        assert [overlap(x.edits[weight], y.edits[weight]) for x, y in ((a, b), (a, c), (b, c))] == [0, 0, 0]
    assert c.about["avoid"] == [{"name": "a", "digest": a.digest}, {"name": "b", "digest": b.digest}]
    assert outcomes[2].eval_loss is not None
    assert outcomes[2].base_loss is not None
    assert outcomes[2].eval_loss < outcomes[2].base_loss - 0.1
    assert "avoid" not in a.about


def test_a_support_that_moves_in_training_stays_beside_the_others(train, config):
    first = train(config({"name": "shira", "density": 0.4, "scorer": "snip"}, out="a", steps=1))
    moving = {"name": "shira", "density": 0.3, "schedule": "drop-and-grow", "every": 2, "swap": 0.5}
    second = train(config(moving, out="b", avoid=["a"]))
    a, b = ia.read(first.output), ia.read(second.output)
    assert [overlap(a.edits[weight], b.edits[weight]) for weight in a.edits] == [0] * len(a.edits)


def test_a_lottery_in_training_stays_beside_the_others(train, config, monkeypatch):
    first = train(config(out="a", steps=1))
    lottery = {"name": "lt-sft", "density": 0.1}
    whole = train(config(lottery, out="whole", avoid=["a"]))
    stop_at(monkeypatch, trainer_module._AfterStep, "on_step_end", lambda _, args, state, *more: state.global_step == 6)
    with pytest.raises(TrainingStopped):
        train(config(lottery, out="b", avoid=["a"]))
    second = train(config(lottery, out="b", avoid=["a"]))
    a, b = ia.read(first.output), ia.read(second.output)
    assert second.digest == whole.digest
    assert [overlap(a.edits[weight], edit) for weight, edit in b.edits.items()] == [0] * len(b.edits)


def test_a_run_goes_on_beside_the_same_adapters_only(train, config, monkeypatch, tmp_path):
    train(config(out="a", steps=1))
    whole = train(config(out="whole", avoid=["a"]))
    stop_at(monkeypatch, trainer_module._AfterStep, "on_step_end", lambda _, args, state, *more: state.global_step == 6)
    with pytest.raises(TrainingStopped):
        train(config(out="b", avoid=["a"]))
    with pytest.raises(IntarsiaError, match=r"avoid was \['[0-9a-f]{12}'\], is now 'not set'"):
        train(config(out="b"))
    (tmp_path / "a").rename(tmp_path / "moved")
    train(config(out="a", steps=2))
    with pytest.raises(IntarsiaError, match=r"avoid was \['[0-9a-f]{12}'\], is now \['[0-9a-f]{12}'\]"):
        train(config(out="b", avoid=["a"]))
    assert train(config(out="b", avoid=["moved"])).digest == whole.digest


@pytest.mark.parametrize(
    ("method", "out", "avoid", "match"),
    [
        (None, "b", ["nowhere"], "avoid: .*nowhere does not exist"),
        ({"name": "lora", "rank": 2}, "b", ["a"], "lora cannot leave out the entries"),
        ({"name": "shira", "density": 0.95}, "b", ["a"], "are left beside the adapters to avoid"),
        (None, "a", ["a"], "the output of this run"),
    ],
)
def test_what_cannot_be_avoided_is_refused_before_anything_is_written(
    train, config, tmp_path, method, out, avoid, match
):
    train(config(out="a", steps=1))
    with pytest.raises(IntarsiaError, match=match):
        train(config(method, out=out, avoid=avoid, overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
