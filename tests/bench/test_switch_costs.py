"""`bench switch`: what is measured, what it is compared with, and what its file says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import intarsia as ia
from intarsia.bench import switch
from intarsia.bench.switch import LORA, ONE, Setup, Switches, Timing
from intarsia.deck import Deck

QUICK: dict[str, Any] = {
    "shapes": ("64x96",),
    "densities": (0.05,),
    "granularities": ("element", "line"),
    "model": "none",
    "rounds": 2,
    "threads": 1,
}


def test_a_run_has_every_way_and_its_ratios():
    found = switch.run(Setup(**QUICK, dtype="float32"))
    assert {row.subject for row in found.rows} == {
        "elements", "limit: elements", "lines", "limit: lines", "lora-fuse", "peft-way", "dense-copy",
    }  # fmt: skip
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain.keys() >= {"machine", "versions", "settings", "rows", "skipped", "interrupted"}
    row = next(r for r in plain["rows"] if r["subject"] == "lines" and r["against"] == LORA)
    assert row.keys() >= {"dtype", "shape", "density", "median_s", "ratio", "bytes"}
    assert row["bytes"] == 9 * 32 * 4  # 5 % of 64 x 3 lines
    assert {r["against"] for r in plain["rows"] if r["subject"] == "elements"} == {
        "lora-fuse",
        "peft-way",
        "dense-copy",
        "limit",
    }
    assert torch.get_num_threads() >= 1


def test_ratios_are_medians_within_rounds():
    """A machine that grows slower from round to round hits both alike."""
    one = Timing("lines", ONE, "64x96", "float32", 0.01, 1, {0: 1.0, 1: 2.0, 2: 4.0, 3: 9.0})
    other = Timing(LORA, ONE, "64x96", "float32", None, 1, {0: 3.0, 1: 6.0, 2: 12.0})
    assert one.over(other) == 3.0
    rows = Switches({}, [one, other], []).to_dict()["rows"]
    assert [(r["subject"], r["against"], r["ratio"]) for r in rows] == [("lines", LORA, 3.0), (LORA, None, None)]


def test_the_limit_is_of_the_lines_that_are_touched():
    model = switch._one_weight((4, 64), torch.float32)
    deck = Deck(model)
    edit = ia.edits.elements((4, 64), torch.tensor([0, 15, 16, 255]), torch.ones(4))
    deck.add(a=ia.Adapter("a", {"0.weight": edit}, ia.store.Base(deck.base_digest, "float32"), {}))
    deck.use("a")
    lines = switch._lines([deck._inside.plan], switch._targets(model))
    assert lines["0.weight"].tolist() == [0, 1, 15]


def test_interrupted_keeps_what_there_is(monkeypatch):
    real, calls = Deck.use, []

    def use(self, name, strength=1.0):
        calls.append(name)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return real(self, name, strength)

    monkeypatch.setattr(Deck, "use", use)
    found = switch.run(Setup(**QUICK, dtype="both"))
    assert found.interrupted
    assert {row.dtype for row in found.rows} == {"float32"}
    found.to_dict()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"shapes": ("64",)}, "expected ROWSxCOLUMNS"),
        ({"densities": (0.0,)}, "a share"),
        ({"dtype": "float31"}, "float32"),
        ({"granularities": ("lines",)}, "line"),
        ({"rounds": 0}, "1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, match):
    with pytest.raises(ia.IntarsiaError, match=match):
        switch.run(Setup(**(QUICK | given)))


def test_what_is_too_small_is_left_out_and_named():
    found = switch.run(
        Setup(**(QUICK | {"granularities": ("row", "element"), "densities": (0.001,), "dtype": "float32"}))
    )
    assert [one["subject"] for one in found.skipped] == ["rows"]


def test_the_picture_is_drawn(tmp_path):
    found = switch.run(Setup(**QUICK))
    assert found.picture(tmp_path / "a.png").stat().st_size > 1000
    assert len(found.tables()) == 2
