"""``intarsia train``: what the command adds to the trainer."""

from __future__ import annotations

import pytest

import intarsia as ia
from intarsia.edits import overlap
from intarsia.train import trainer


@pytest.fixture
def config(world, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {world.base}\ndata: {{train: {world.rows}, eval_share: 0.2}}\nmethod: {{name: shira, density: 0.05}}\n"
        f"output: {tmp_path / 'out'}\ntrain: {{steps: 2, batch_size: 2}}\n"
    )
    return path


def test_train_writes_an_adapter_and_reports_it(intarsia, config, tmp_path):
    ended = intarsia("train", config, "train.steps=3", "--json")
    report = ended.json
    assert report["steps"] == 3
    assert report["digest"] == ia.read(tmp_path / "out").digest
    assert "step 3/3" in ended.err
    again = intarsia("train", config)
    assert again.code == 2
    assert "exists already" in again.err
    replaced = intarsia("train", config, "--overwrite")
    assert replaced.code == 0
    assert ia.read(tmp_path / "out").digest[:12] in replaced.out


def test_a_dry_run_writes_nothing(intarsia, config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    ended = intarsia("train", config, "--dry-run")
    assert ended.code == 0
    assert "2 steps" in ended.out
    plain = intarsia("train", config, "--dry-run", "--json").json
    assert (plain["steps"], plain["method"]["density"]) == (2, 0.05)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert intarsia("train", config, "--dry-run").code == 2
    assert intarsia("train", config, "--dry-run", "--overwrite").code == 2, "it is not an adapter"


def test_show_batch_shows_what_is_trained(intarsia, config, tmp_path):
    said = intarsia("train", config, "--show-batch").out
    assert "row 1:" in said
    assert "trained" in said
    rows = intarsia("train", config, "--show-batch", "--json").json
    assert all(row["trained"] == sum(label != -100 for label in row["labels"][1:]) > 0 for row in rows)
    assert not (tmp_path / "out").exists()


def test_the_schema_needs_no_config(intarsia):
    assert {"model", "data", "method", "targets", "output", "train"} <= set(
        intarsia("train", "--schema").json["properties"]
    )


def test_bad_rows_stop_it_unless_told_otherwise(intarsia, config, world, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(world.rows.read_text() + '{"prompt": "x"}\n')
    ended = intarsia("train", config, f"data.train={bad}", "--dry-run")
    assert ended.code == 2
    assert "line 7" in ended.err
    assert "--skip-bad-rows" in ended.err
    skipping = intarsia("train", config, f"data.train={bad}", "--dry-run", "--skip-bad-rows", "--json").json
    assert sum(skipping["data"][0]["skipped"].values()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainn.steps=3"], "unknown key 'trainn'; did you mean 'train'?"),
        (["train.step=3"], "did you mean 'train.steps'"),
        (["method=shria"], "unknown method 'shria'; did you mean 'shira'"),
        (["method.densty=0.1"], "shira has no field 'densty'; did you mean 'density'"),
        (["method.density=0"], "density=0.0 must be in (0, 1]"),
        (["targets=q_prj"], "matches none of the 16 layers that can be adapted"),
        (["steps"], "expected KEY=VALUE"),
    ],
)
def test_mistakes_write_nothing(intarsia, config, tmp_path, words, said):
    ended = intarsia("train", config, *words)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_run_that_is_stopped_ends_as_a_shell_expects(intarsia, config, monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise trainer.TrainingStopped(7, 15)

    monkeypatch.setattr(trainer, "train", stopped)
    ended = intarsia("train", config)
    assert ended.code == 143
    assert ended.err.strip() == "stopped after step 7; a checkpoint is saved, the same command goes on from there"


def test_restart_is_passed_on(intarsia, config, monkeypatch):
    heard = []

    def begun(*_: object, resume: str, **__: object) -> None:
        heard.append(resume)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", begun)
    assert intarsia("train", config).code == 130
    assert intarsia("train", config, "--restart").err == "interrupted\n"
    assert heard == ["auto", "never"]


def test_adapters_to_avoid_are_folders_or_versions(intarsia, config, world, tmp_path, monkeypatch):
    monkeypatch.delenv("INTARSIA_REGISTRY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    intarsia("registry", "add", world.adapters["spells"])
    for number, given in enumerate((world.adapters["spells"], "spells@latest")):
        output = tmp_path / str(number)
        report = intarsia("train", config, f"avoid={given}", f"output={output}", "train.snapshots=1", "--json").json
        assert report["snapshots"] == [str(output / "snapshots/step-000002")]
        first, second = ia.read(world.adapters["spells"]), ia.read(output)
        assert second.about["avoid"] == [{"name": first.name, "digest": first.digest}]
        assert [overlap(first.edits[weight], edit) for weight, edit in second.edits.items()] == [0] * len(second.edits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["avoid=spells@9"], "spells@9: there is no such folder"),
        (["avoid=[nowhere, nothing]"], "avoid: nothing does not exist"),
        (["avoid=3"], "avoid: expected list"),
        (["aviod=x"], "unknown key 'aviod'; did you mean 'avoid'"),
        (["train.snapshots=9"], "ask for 1 at most"),
        (["train.snapshots=-1"], "train.snapshots: expected greater than or equal to 0"),
    ],
)
def test_what_cannot_be_avoided_or_kept_is_one_message(intarsia, config, tmp_path, changes, said):
    before = sorted(tmp_path.rglob("*"))
    ended = intarsia("train", config, *changes)
    assert ended.code == 2
    assert said in ended.err
    assert sorted(tmp_path.rglob("*")) == before
