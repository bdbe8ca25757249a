"""An adapter that acts beside its layers, through every command: trained, shown, evaluated, talked to, and kept from other formats."""

from __future__ import annotations

import json

import pytest
import torch

import intarsia as ia
from intarsia import interop, pretrained
from intarsia.edits import Insert, add
from intarsia.interop import TARGETS
from intarsia.model import digest


@pytest.fixture(scope="module")
def beside(world, tmp_path_factory):
    """Trained from a config, as a user would."""
    import yaml
    from typer.testing import CliRunner

    from intarsia.cli.app import app

    home = tmp_path_factory.mktemp("beside")
    config = {
        "model": str(world.base), "data": str(world.rows), "output": str(home / "beside"),
        "method": {"name": "bottleneck", "width": 4, "place": "after"}, "train": {"steps": 3, "batch_size": 2, "lr": 0.05},
    }  # fmt: skip
    (home / "run.yaml").write_text(yaml.safe_dump(config))
    ended = CliRunner().invoke(app, ["train", str(home / "run.yaml")])
    assert ended.exit_code == 0, ended.output
    return home / "beside"


@pytest.fixture(scope="module")
def mixed(beside, world, tmp_path_factory):
    """The same, and entries of the weights besides."""
    one, two = ia.read(beside), ia.read(world.adapters["spells"])
    edits = {name: add(edit, one.edits[name]) for name, edit in two.edits.items()}
    return ia.store.write(
        ia.Adapter("mixed", edits, two.base, {"name": "by hand"}), tmp_path_factory.mktemp("m") / "mixed"
    )


def test_it_is_trained_as_any_other(beside, world):
    adapter = ia.read(beside)
    assert all(isinstance(edit, Insert) for edit in adapter.edits.values())
    assert any(bool(edit.tensors()["up"].any()) for edit in adapter.edits.values())
    model = pretrained.load(world.base).model
    assert adapter.base.digest == digest(model)
    assert ia.load(model, beside) == "beside"


def test_show_lists_what_it_inserts(intarsia, beside, world):
    adapter = ia.read(beside)
    width, expected = 4, sum(2 * 4 * edit.shape[0] for edit in adapter.edits.values())
    assert width * 2 * sum(edit.shape[0] for edit in adapter.edits.values()) == expected
    for more in ((), ("--model", world.base)):
        shown = intarsia("show", beside, "--json", *more).json
        assert shown["multiplications"] == expected == sum(row["multiplications"] for row in shown["changes"])
        assert {row["edit"] for row in shown["changes"]} == {"insert"}
        assert (shown["touched"], shown["norm"], shown["invisible_share"], shown["spectra"]) == (0, None, None, [])
        assert not any(row["changes_weight"] for row in shown["changes"])
        said = " ".join(intarsia("show", beside, *more).out.split())
        assert f"bottleneck beside {len(adapter.edits)} layers, {expected:,} multiplications for every token" in said
        assert "needs --model" not in said
        assert "invisible" not in said.partition("module")[0]


def test_show_measures_the_part_that_changes_weights(intarsia, mixed, world):
    alone = intarsia("show", world.adapters["spells"], "--model", world.base, "--json").json
    shown = intarsia("show", mixed, "--model", world.base, "--json").json
    for key in ("touched", "norm", "relative", "invisible_share", "rounding_error"):
        assert shown[key] == pytest.approx(alone[key])
    assert [one["values"] for one in shown["spectra"]] == [one["values"] for one in alone["spectra"]]
    assert shown["multiplications"] > 0


def test_a_picture_of_weights_that_do_not_change_is_refused(intarsia, beside, mixed, tmp_path):
    ended = intarsia("show", beside, "--plot", tmp_path / "a.png")
    assert ended.code == 2
    assert "--plot draws what an adapter changes of weights" in ended.err
    assert list(tmp_path.iterdir()) == []
    assert intarsia("show", mixed, "--plot", tmp_path / "b.png").code == 0


def test_eval_sets_it_in(intarsia, beside, mixed, world):
    loss = intarsia("eval", beside, mixed, world.adapters["spells"], "--data", world.rows, "--json").json["loss"]
    assert len({row["rows"] for row in loss.values()}) == 4


def test_chat_switches_it_live(intarsia, beside, world):
    lines = ["abc ->", "/use beside", "abc ->", "/fuse beside=0.5 spells=1", "/off", "abc ->"]
    ended = intarsia("chat", world.base, beside, world.adapters["spells"], "--plain", "--max-new-tokens", 4, "--json",
                     stdin="".join(line + "\n" for line in lines))  # fmt: skip
    assert ended.code == 0
    active = [event["active"] for line in ended.out.splitlines() if (event := json.loads(line))["event"] == "switch"]
    assert active == [{"beside": 1.0}, {"beside": 0.5, "spells": 1.0}, {}]
    plain = intarsia("chat", world.base, beside, "--plain", stdin="/off\n")
    assert "bottleneck, inserts beside 14 layers" in plain.out + plain.err


@pytest.mark.parametrize("to", [name for name, target in TARGETS.items() if target.base])
def test_formats_of_weights_refuse_it_before_anything_is_loaded_or_written(to, beside, mixed, tmp_path):
    def load(_: object) -> pretrained.Pretrained:
        raise AssertionError("the base was loaded")

    for folder in (beside, mixed):
        with pytest.raises(
            ia.IntarsiaError, match=r"cannot hold this adapter: .*inserts a bottleneck.*folds into no weight"
        ):
            interop.convert(folder, tmp_path / f"out{TARGETS[to].suffix}", to, load=load)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["full-model", "gguf"])
def test_writers_of_whole_models_refuse_it_too(to, beside, world, tmp_path):
    base = pretrained.load(world.base)
    with pytest.raises(ia.IntarsiaError, match=r"cannot hold this adapter|is no GGUF file"):
        TARGETS[to].write(ia.read(beside), base, tmp_path / f"out{TARGETS[to].suffix}")
    with pytest.raises(ia.IntarsiaError, match="cannot hold this adapter"):
        interop.full_model.folded(ia.read(beside), base)
    assert list(tmp_path.iterdir()) == []


def test_it_is_copied_into_our_own_format(intarsia, beside, tmp_path):
    assert intarsia("convert", beside, tmp_path / "again", "--to", "intarsia").code == 0
    assert ia.read(tmp_path / "again").digest == ia.read(beside).digest


def test_methods_say_that_it_is_not_merged(intarsia):
    row = intarsia("methods", "bottleneck", "--json").json
    assert (row["mergeable"], row["starts_as_identity"]) == (False, True)
    said = intarsia("methods", "bottleneck").out
    assert "mergeable: no" in said
    assert "arXiv:2304.01933" in said


def test_fields_are_refused_with_what_is_known(intarsia, world, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"{{model: {world.base}, data: {world.rows}, output: {tmp_path / 'o'}, method: {{name: bottleneck, place: above}}}}"
    )
    ended = intarsia("train", config)
    assert ended.code == 2
    assert "bottleneck: place='above' must be one of after, parallel, before" in ended.err


def test_it_is_no_part_of_the_weights_of_the_model(beside, world):
    """state_dict and the digest are the base's while a deck has it set in."""
    model = pretrained.load(world.base).model
    deck = ia.Deck(model)
    deck.add(beside)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deck.use("beside")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
