"""A prompt through the commands: trained from a config as any other method, shown, evaluated, talked to, and kept from formats of weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import intarsia as ia
from intarsia import interop, pretrained
from intarsia.cli.app import app
from intarsia.interop import TARGETS


@pytest.fixture(scope="module", params=["prompt", "prefix"])
def ahead(request, world, tmp_path_factory):
    """Trained from a config that names no targets."""
    home = tmp_path_factory.mktemp(request.param)
    config = {
        "model": str(world.base), "data": str(world.rows), "output": str(home / "ahead"),
        "method": {"name": request.param, "tokens": 4}, "train": {"steps": 3, "batch_size": 2},
    }  # fmt: skip
    (home / "run.yaml").write_text(yaml.safe_dump(config))
    ended = CliRunner().invoke(app, ["train", str(home / "run.yaml")])
    assert ended.exit_code == 0, ended.output
    return home / "ahead"


def test_it_is_trained_and_shown(intarsia, ahead, world):
    adapter = ia.read(ahead)
    edits: list[Any] = list(adapter.edits.values())
    assert [edit.count for edit in edits] == [4]
    for more in ((), ("--model", world.base)):
        shown = intarsia("show", ahead, "--json", *more).json
        assert (shown["touched"], shown["norm"], shown["spectra"]) == (0, None, [])
        assert [row["positions"] for row in shown["changes"]] == [4]
        said = " ".join(intarsia("show", ahead, *more).out.split())
        assert f"{adapter.method['name']} at 4 positions before the tokens" in said
        assert "before the tokens insert" in said
    assert "acts at 4 positions before the tokens" in (ahead / "README.md").read_text(encoding="utf-8")


def test_eval_and_chat_use_it(intarsia, ahead, world):
    other = world.adapters["spells"]
    loss = intarsia("eval", ahead, other, "--data", world.rows, "--json").json["loss"]
    assert len({row["rows"] for row in loss.values()}) == 3
    lines = ["/use ahead", "abc ->", "/fuse ahead=1 spells=0.5", "abc ->", "/off", "abc ->"]
    ended = intarsia("chat", world.base, ahead, other, "--plain", "--max-new-tokens", 4, "--json",
                     stdin="".join(line + "\n" for line in lines))  # fmt: skip
    assert ended.code == 0
    active = [event["active"] for line in ended.out.splitlines() if (event := json.loads(line))["event"] == "switch"]
    assert active == [{"ahead": 1.0}, {"ahead": 1.0, "spells": 0.5}, {}]
    ended = intarsia("chat", world.base, ahead, "--plain", stdin="/fuse ahead=0.5\n")
    assert ended.code == 2
    assert "stands before the tokens or does not" in " ".join(ended.err.split())


@pytest.mark.parametrize("to", [name for name, target in TARGETS.items() if target.base])
def test_formats_of_weights_refuse_it(to, ahead, tmp_path):
    def load(_: object) -> pretrained.Pretrained:
        raise AssertionError("the base was loaded")

    with pytest.raises(ia.IntarsiaError, match=r"cannot hold this adapter: before the tokens of model it puts a pr"):
        interop.convert(ahead, tmp_path / f"out{TARGETS[to].suffix}", to, load=load)
    assert list(tmp_path.iterdir()) == []
