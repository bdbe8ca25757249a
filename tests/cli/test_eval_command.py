"""``intarsia eval``: the base and adapters side by side."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import intarsia as ia
from intarsia import evaluate as measuring
from intarsia import pretrained, store
from intarsia.evaluate import held_out_loss
from intarsia.train.data import load_examples


def test_losses_are_those_of_the_library(intarsia, world):
    folder = world.adapters["spells"]
    ended = intarsia("eval", folder, "--data", world.rows, "--json")
    found = ended.json["loss"]
    base = pretrained.load(world.base)
    examples = load_examples(world.rows, base.tokenizer)[0]
    assert found["base"]["rows"] == pytest.approx(held_out_loss(base.model, base.tokenizer, examples), rel=1e-3)
    ia.Deck(base.model).add(folder)
    deck = ia.Deck(base.model)
    deck.add(folder)
    deck.use("spells")
    assert found["spells"]["rows"] == pytest.approx(held_out_loss(base.model, base.tokenizer, examples), rel=1e-3)
    assert found["spells"]["rows"] != found["base"]["rows"]


def test_several_files_make_a_matrix(intarsia, world):
    folders = [world.adapters["spells"], f"other={world.adapters['counts']}"]
    ended = intarsia("eval", *folders, "--data", world.rows, "--data", world.other_rows)
    assert ended.code == 0
    for word in ("base", "spells", "other", "rows", "other"):
        assert word in ended.out
    plain = intarsia("eval", *folders, "--data", world.rows, "--data", world.other_rows, "--json").json
    assert {a: set(row) for a, row in plain["loss"].items()} == {
        name: {"rows", "other"} for name in ("base", "spells", "other")
    }
    assert plain["adapters"]["other"] == ia.read(world.adapters["counts"]).digest


def test_one_file_shows_what_was_gained(intarsia, world):
    losses = intarsia("eval", world.adapters["spells"], "--data", world.rows, "--json").json["loss"]
    said = intarsia("eval", world.adapters["spells"], "--data", world.rows).out
    assert f"{losses['base']['rows'] - losses['spells']['rows']:+.4f}" in said
    assert "6 rows" in said
    assert "2 rows" in intarsia("eval", world.adapters["spells"], "--data", world.rows, "--rows", 2).out


def test_mistakes(intarsia, world, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    spells = world.adapters["spells"]
    for words, said in {
        (spells, "--data", "nowhere.jsonl"): "no data file nowhere.jsonl",
        (spells, "--data", world.rows, "--data", world.rows): "given twice",
        (spells, spells, "--data", world.rows): "two adapters are named 'spells'",
        (spells, tmp_path / "no", "--data", world.rows): "does not exist",
        (f"base={spells}", "--data", world.rows): "'base' would be taken for the base",
        (spells, "--data", bad): "line 2",
        (spells, "--data", world.rows, "--format", "alpca"): "'alpaca'",
        (spells, "--data", world.rows, "--model", tmp_path): "no config.json in this folder",
    }.items():
        ended = intarsia("eval", *words)
        assert (ended.code, ended.out) == (2, ""), words
        assert said in ended.err, ended.err
    assert intarsia("eval", spells, "--data", bad, "--skip-bad-rows").code == 0


def test_a_base_that_is_gone_is_said_to_be_the_adapters(intarsia, world, tmp_path):
    adapter = ia.read(world.adapters["spells"])
    gone = dataclasses.replace(adapter, base=dataclasses.replace(adapter.base, source=str(tmp_path / "gone")))
    folder = store.write(gone, tmp_path / "moved")
    ended = intarsia("eval", folder, "--data", world.rows)
    assert ended.code == 2
    assert "moved was made on that model; name it where it is now: --model" in ended.err
    assert intarsia("eval", folder, "--data", world.rows, "--model", world.base).code == 0


def test_adapters_of_different_bases(intarsia, world, tmp_path):
    from toy import save_toy

    other = pretrained.load(save_toy(tmp_path / "other")).model
    ia.attach(other, ia.Lora(rank=1))
    ia.save(other, tmp_path / "theirs")
    ended = intarsia("eval", world.adapters["spells"], tmp_path / "theirs", "--data", world.rows)
    assert ended.code == 2
    assert "these adapters belong to different bases" in ended.err


def test_answers_are_counted(intarsia, world, monkeypatch):
    asked = []

    def answer(model: Any, tokenizer: Any, prompts: list[str], most: int, batch_size: int) -> list[str]:
        asked.append((prompts, most))
        return ["a", "a a", "a", "a a a a", "a", "b"]  # the first, second and fourth are right

    monkeypatch.setattr(measuring, "generate", answer)
    words = ("eval", world.adapters["spells"], "--data", world.rows, "--answers")
    assert intarsia(*words, "--json").json["right"] == {"base": {"rows": 0.5}, "spells": {"rows": 0.5}}
    assert asked[0][0] == [f"a{i} ->" for i in range(6)]
    assert asked[0][1] >= len(" a a a a a a"), "there is room for the longest reference"
    assert intarsia(*words).out.count("50.0%") == 2


def test_answers_need_a_prompt(intarsia, world, tmp_path):
    data = tmp_path / "plain.jsonl"
    data.write_text('{"text": "some plain text"}\n')
    ended = intarsia("eval", world.adapters["spells"], "--data", data, "--answers")
    assert ended.code == 2
    assert "answers need rows of prompt and completion, and these are text" in ended.err
