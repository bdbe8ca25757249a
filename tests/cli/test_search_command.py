"""``intarsia merge CONFIG.yaml --search NAME=FILE``."""

from __future__ import annotations

import json
import sys

import pytest

import intarsia as ia
from intarsia import merge, pretrained
from intarsia.evaluate import held_out_loss
from intarsia.merge.search import Live, hold_out
from intarsia.train.data import load_examples


def flags(skilled, *more):
    return [*(word for name, file in skilled.rows.items() for word in ("--search", f"{name}={file}")), *more]


def test_the_adapter_that_is_written_has_the_weights_that_are_told(intarsia, skilled, tmp_path):
    recipe = skilled.recipe(tmp_path)
    found = intarsia("merge", recipe, *flags(skilled, "--trials", 12), "--json").json
    written = ia.read(tmp_path / "both")
    weights = {name: found["found"][f"weight of {name}"] for name in skilled.adapters}
    assert written.digest == found["digest"] == merge.merge(skilled.adapters, weights=weights).digest
    assert {name: one["weight"] for name, one in written.about["merged"].items()} == weights
    lineage = written.about["search"]
    assert (lineage["trials"], lineage["found in trial"]) == (12, found["found_in_trial"])
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == [
        "README.md", "adapter.json", "adapter.safetensors", "search.json", "search.png", "trials.jsonl",
    ]  # fmt: skip
    assert json.loads((tmp_path / "both" / "search.json").read_text())["found"] == found["found"]
    assert not (tmp_path / "both.trials.jsonl").exists()

    base = pretrained.load(skilled.base)
    deck = ia.Deck(base.model)
    deck.add(tmp_path / "both")
    deck.use("both")
    rows = {name: load_examples(file, base.tokenizer)[0] for name, file in skilled.rows.items()}
    unseen = hold_out(rows, 0.5, 0)[1]
    losses = {name: held_out_loss(base.model, base.tokenizer, examples) for name, examples in unseen.items()}
    assert found["held_out"]["loss"]["found"] == pytest.approx(losses, rel=1e-5)


def test_what_is_said(intarsia, skilled, tmp_path):
    ended = intarsia("merge", skilled.recipe(tmp_path), *flags(skilled, "--trials", 8))
    assert ended.code == 0, ended.err
    for word in ("ayes", "bees", "given", "found", "retained", "rows that the search never saw", "8 trials in"):
        assert word in ended.out
    assert "8 rows of ayes" in ended.err


def test_a_search_goes_on_and_makes_the_trials_of_an_uninterrupted_one(intarsia, skilled, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    whole = intarsia("merge", skilled.recipe(tmp_path / "one"), *flags(skilled, "--trials", 14), "--json").json
    recipe = skilled.recipe(tmp_path / "two")
    intarsia("merge", recipe, *flags(skilled, "--trials", 9), "--json")
    ended = intarsia("merge", recipe, *flags(skilled, "--trials", 14), "--overwrite", "--json")
    assert "9 trials are in" in ended.err
    more = ended.json
    assert [t["point"] for t in more["trials"]] == [t["point"] for t in whole["trials"]]
    assert more["digest"] == whole["digest"]


def test_ctrl_c_keeps_the_trials_and_says_how_to_go_on(intarsia, skilled, tmp_path, monkeypatch):
    words = ("merge", skilled.recipe(tmp_path), *flags(skilled, "--trials", 9))
    calls, measure = [], Live.losses

    def interrupted(live, rows):
        calls.append(rows)
        if len(calls) == 2 * 4 + 5:  # the base on two skills and each adapter on its own, twice; the fifth trial
            raise KeyboardInterrupt
        return measure(live, rows)

    monkeypatch.setattr(Live, "losses", interrupted)
    ended = intarsia(*words)
    assert (ended.code, ended.out) == (130, "")
    assert "interrupted after 4 of 9 trials, which are kept in" in ended.err
    assert [path.name for path in tmp_path.glob("both*")] == ["both.trials.jsonl"]
    ended = intarsia(*words, "--json")
    assert "4 trials are in" in ended.err
    assert len(ended.json["trials"]) == 9
    reported = len({0, ended.json["found_in_trial"]})
    assert len(calls) == 13 + 5 + reported, "neither the first trials nor base and adapters are measured again"


def test_other_settings_are_refused_and_restart_begins_anew(intarsia, skilled, tmp_path):
    recipe = skilled.recipe(tmp_path)
    first = intarsia("merge", recipe, *flags(skilled, "--trials", 4), "--json").json
    kept = tmp_path / "both.trials.jsonl"
    kept.write_bytes((tmp_path / "both" / "trials.jsonl").read_bytes())
    other = ("merge", recipe, *flags(skilled, "--trials", 4), "--overwrite", "search.seed=1")
    ended = intarsia(*other)
    assert ended.code == 2
    assert "seed was 0, is now 1" in ended.err
    assert ia.read(tmp_path / "both").digest == first["digest"]
    anew = intarsia(*other, "--restart", "--json")
    assert anew.code == 0
    assert not kept.exists()


def test_a_section_of_the_config_does_the_same(intarsia, skilled, tmp_path):
    section = "".join(f"    {name}: {file}\n" for name, file in skilled.rows.items())
    more = f"search:\n  trials: 6\n  objective: mean\n  density: [0.2, 1.0]\n  rows: 4\n  data:\n{section}"
    recipe = skilled.recipe(tmp_path, "ties", more)
    plan = intarsia("merge", recipe, "--dry-run", "--json").json
    assert plan["search"]["space"]["density of ayes"] == [0.2, 1.0, 0.5]
    assert not list(tmp_path.glob("both*"))
    found = intarsia("merge", recipe, "--json").json
    assert found["objective"] == {"name": "mean"}
    assert found["search"]["rows"] == {"ayes": 4, "bees": 4}
    assert set(found["found"]) == {f"{of} of {name}" for of in ("weight", "density") for name in skilled.adapters}
    assert len(found["trials"]) == 6


def test_mistakes(intarsia, skilled, tmp_path):
    recipe = skilled.recipe(tmp_path)
    ayes, bees = (f"{name}={file}" for name, file in skilled.rows.items())
    for words, said in {
        ("--trials", "5"): "--trials is about a search; say on which rows: --search NAME=FILE",
        ("--search", "rows.jsonl"): "expected NAME=FILE",
        ("--search", ayes, "--search", ayes): "ayes is given twice",
        ("--search", ayes): "there are no rows of the skill of bees: bees=FILE",
        ("--search", ayes, "--search", bees, "--search", "cees=x"): "no adapter 'cees' is merged",
        ("--search", ayes, "--search", "bees=nowhere.jsonl"): "no data file nowhere.jsonl",
        (*flags(skilled), "--objective", "wrst"): "search: 1 mistake(s)",
        (*flags(skilled), "search.trails=3"): "did you mean 'search.trials'",
        (*flags(skilled), "search.weight=[0.6,1]"): "weight of ayes starts at 0.5, and is searched from 0.6 to 1",
        (*flags(skilled), "search.density=[0.1,1]"): "the rule sum has no density",
        (*flags(skilled), "search.held_out={ayes: x}"): "there are no rows of the skill of bees",
        (*flags(skilled), "model=nowhere"): "nowhere",
    }.items():
        ended = intarsia("merge", recipe, *words)
        assert (ended.code, ended.out) == (2, ""), words
        assert said in ended.err, (words, ended.err)
    assert list(tmp_path.iterdir()) == [recipe], "nothing was written"


def test_without_the_extra_it_is_said_before_any_work(intarsia, skilled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    ended = intarsia("merge", skilled.recipe(tmp_path), *flags(skilled))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.strip() == (
        'error: the search needs the package optuna, which is not installed: pip install "intarsia[search]"'
    )
