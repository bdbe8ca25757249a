"""``intarsia show --intruders`` and ``--html``, and ``intarsia repair``: on adapters that bring a direction in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import intarsia as ia
from intarsia import pretrained, store
from intarsia.edits import LowRank
from intarsia.model import base_of

LOUD, QUIET = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def loud(world, tmp_path_factory) -> Path:
    """An adapter with a large new direction in one weight, and a tiny one in another."""
    model = pretrained.load(world.base).model
    dice = torch.Generator().manual_seed(0)
    edits = {}
    for name, size in ((LOUD, 8.0), (QUIET, 1e-4)):
        O, I = dict(model.named_parameters())[name].shape
        B, A = torch.randn(O, 1, generator=dice), torch.randn(1, I, generator=dice)
        edits[name] = LowRank((O, I), B / B.norm(), A / A.norm(), size)
    base, about = base_of(model, list(edits))
    made = store.Adapter("loud", edits, base, {"name": "lora", "rank": 1}, about, {"held-out loss": 2.0})
    return store.write(made, tmp_path_factory.mktemp("loud") / "loud")


def test_intruders_are_counted_and_listed(intarsia, world, loud):
    shown = intarsia("show", loud, "--model", world.base, "--intruders", "--json").json["intruders"]
    assert (shown["count"], shown["weights_with_any"]) == (1, 1)
    assert (shown["top"], shown["epsilon"], shown["side"]) == (10, 0.5, "left")
    (weight,) = (one for one in shown["weights"] if one["intruders"])
    assert weight["name"] == LOUD
    assert weight["directions"][0]["intruder"]
    said = intarsia("show", loud, "--model", world.base, "--intruders").out
    assert "1 intruder dimension in 1 of 2 weights" in said
    assert LOUD.removesuffix(".weight") in said
    none = intarsia("show", loud, "--model", world.base, "--intruders", "--epsilon", 0).out
    assert "no intruder dimensions" in none
    assert "the least likeness is" in none
    assert "intruders" not in intarsia("show", loud, "--json").json


def test_a_page_and_a_picture(intarsia, world, loud, tmp_path):
    page, plot = tmp_path / "page.html", tmp_path / "plot.svg"
    ended = intarsia("show", loud, "--model", world.base, "--intruders", "--html", page, "--plot", plot)
    assert ended.code == 0, ended.err
    assert f"page  {page}" in ended.out
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert html.count("data:image/png;base64,") == 4
    assert LOUD in html
    assert "likeness of the leading directions" in plot.read_text(encoding="utf-8")
    alone = intarsia("show", loud, "--html", tmp_path / "alone.html", "--json")
    assert alone.json["name"] == "loud"
    assert (tmp_path / "alone.html").exists()


def test_repair_writes_an_adapter_and_says_what_it_did(intarsia, world, loud, tmp_path):
    out = tmp_path / "mended"
    before = ia.read(loud).digest
    done = intarsia("repair", loud, out, "--lambda", 0, "--json").json
    assert (done["intruders"], done["weights"], done["loss"], done["lambda"]) == (1, 1, 0.0, 0.0)
    made = ia.read(out)
    assert made.name == "mended"
    assert made.digest == done["digest"] != before == ia.read(loud).digest
    assert made.about["repaired"]["of"] == before
    assert made.edits[LOUD].tensors()["A"].shape[0] == 2
    assert intarsia("show", out, "--model", world.base, "--intruders", "--json").json["intruders"]["count"] == 0
    ended = intarsia("repair", loud, out, "--model", world.base, "--rank", 1, "--overwrite")
    assert ended.code == 0, ended.err
    assert "1 intruder dimension times 0.75" in ended.out
    assert "of their change is lost by cutting it to rank 1" in ended.out
    assert ia.read(out).edits[LOUD].tensors()["A"].shape[0] == 1
    copied = intarsia("repair", world.adapters["spells"], tmp_path / "same", "--model", world.base, "--epsilon", 0)
    assert "nothing to repair: a copy" in copied.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "LOUD", "--intruders"], "seen beside the base's weights; name the base: --model"),
        (["show", "LOUD", "--html", "page.txt"], "the file name should end in .html"),
        (
            ["show", "LOUD", "--model", "BASE", "--intruders", "--side", "up"],
            "side='up'; expected one of left, right, both",
        ),
        (["show", "LOUD", "--epsilon", "2"], "--epsilon"),
        (["show", "LOUD", "--intrudrs"], "no option --intrudrs; did you mean --intruders"),
        (["repair", "LOUD"], "missing argument 'OUT'"),
        (["repair", "LOUD", "LOUD"], "is what is repaired; choose another folder"),
        (["repair", "LOUD", "OUT", "--lambda", "nan"], "lambda=nan; expected a finite number"),
        (["repair", "LOUD", "OUT", "--rank", "0"], "--rank"),
        (["repair", "LOUD", "TAKEN"], "exists already"),
        (["repair", "LOUD", "TAKEN", "--overwrite"], "is not an adapter, so it is not overwritten"),
        (["repair", "nowhere", "OUT"], "nowhere does not exist"),
        (["repair", "LOUD", "OUT", "--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(intarsia, world, loud, tmp_path, words, said):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("")
    places = {"LOUD": loud, "BASE": world.base, "OUT": tmp_path / "out", "TAKEN": tmp_path / "taken"}
    ended = intarsia(*(places.get(word, word) for word in words))
    assert ended.code == 2
    assert said in ended.err.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
