"""``intarsia demo``: what the command adds to the demo, whose own tests are in tests/demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from intarsia.demo import run as demo


@dataclass
class Exactness:
    exact: bool = True


@dataclass
class Adapter:
    folder: str = "out/adapters/spells"
    sparse: bool = True


@dataclass
class Result:
    exactness: Exactness = field(default_factory=Exactness)
    model: str = "smollm2-135m"
    adapters: tuple[Adapter, ...] = (Adapter(), Adapter("out/adapters/lora", False))

    def to_dict(self) -> dict[str, Any]:
        return {"headline": "so it went"}

    def __rich__(self) -> str:
        return "so it went"


@pytest.fixture
def asked(monkeypatch):
    heard: dict[str, Any] = {"result": Result()}

    def run(folder: Path, *, progress: Any, **options: Any) -> Result:
        heard.update(folder=folder, **options)
        progress.say("working")
        result: Result = heard["result"]
        return result

    monkeypatch.setattr(demo, "run", run)
    return heard


def test_options_are_passed_on(intarsia, asked, tmp_path):
    ended = intarsia("demo", "--quick", "--output", tmp_path, "--seed", 3, "--model", "m")
    assert ended.code == 0
    assert {k: asked[k] for k in ("folder", "quick", "seed", "model")} == {
        "folder": tmp_path, "quick": True, "seed": 3, "model": "m"
    }  # fmt: skip
    assert "so it went" in ended.out
    assert "intarsia chat smollm2-135m out/adapters/spells --plain" in ended.out
    assert "working" in ended.err


def test_json_is_all_there_is_on_stdout(intarsia, asked):
    assert intarsia("demo", "--json").json == {"headline": "so it went"}
    assert asked["folder"] == Path("out/demo")


def test_a_base_that_did_not_come_back_is_a_failure(intarsia, asked):
    asked["result"] = Result(Exactness(False))
    assert intarsia("demo").code == 1
