"""What a merge kept: shares, concept loss, forgetting; closed forms, and a deck of tiny adapters measured by hand."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import intarsia as ia
from intarsia.errors import IntarsiaError
from intarsia.evaluate import BASE, Cell, Matrix, Task, encode_pairs, held_out_loss, right
from intarsia.merge import FUSED, Retained, concept_loss, forgetting, measure, merge, retained_picture, retained_share
from intarsia.store import Adapter
from intarsia.train.data import collator
from toy import toy_model, toy_tokenizer


def test_the_share_of_a_gain_that_is_left():
    assert retained_share(8.0, 2.0, 2.0) == 1
    assert retained_share(8.0, 2.0, 5.0) == 0.5
    assert retained_share(8.0, 2.0, 11.0) == -0.5
    assert retained_share(8.0, 2.0, 1.0) == pytest.approx(7 / 6)
    assert retained_share(2.0, 2.0, 1.0) is None, "of no gain there is no share"
    assert retained_share(2.0, 3.0, 2.5) is None


def test_concept_loss_is_that_of_the_papers_table():
    # Means over three tasks of LLaMA2-7B, alone and fused: LoRA, SHiRA-WM with overlap and without.
    for alone, fused, drop in ((78.41, 67.33, 11.08), (78.45, 74.02, 4.43), (77.54, 73.92, 3.62)):
        assert concept_loss([alone], [fused], higher_is_better=True) == pytest.approx(drop, abs=0.005)
    assert concept_loss([1.0, 2.0], [1.5, 3.0]) == 0.75, "a higher loss is a loss too"
    with pytest.raises(IntarsiaError, match="2 skills alone and 1 fused"):
        concept_loss([1.0, 2.0], [1.0])
    with pytest.raises(IntarsiaError, match="0 skills"):
        concept_loss([], [])


def hand_made() -> Retained:
    losses = {
        BASE: (8.0, 4.0, 3.0),
        "a": (2.0, 5.0, 3.5),
        "b": (7.0, 1.0, 3.25),
        FUSED: (5.0, 1.3, 3.4),
    }
    scores = {BASE: (0.1, 0.0), "a": (0.9, None), "b": (None, 0.8), FUSED: (0.5, 0.7)}
    tasks = ("spell", "count", "talk")
    cells = {
        (row, task): Cell(loss, score)
        for row, of in losses.items()
        for task, loss, score in zip(tasks, of, (*scores[row], None), strict=True)
    }
    measures = {"spell": ("right", True), "count": ("right", True), "talk": ("", True)}
    return Retained(Matrix(tuple(losses), tasks, measures, cells), {"a": "spell", "b": "count"}, ("talk",))


def test_what_was_kept_of_a_hand_made_matrix():
    found = hand_made()
    assert found.shares == {"a": 0.5, "b": pytest.approx(0.9)}
    assert found.worst == 0.5
    assert found.concept_loss == pytest.approx((5.0 + 1.3) / 2 - (2.0 + 1.0) / 2)
    assert found.concept_loss_score == pytest.approx((0.9 + 0.8) / 2 - (0.5 + 0.7) / 2)
    assert forgetting(3.0, 3.4) == pytest.approx(0.4)
    assert {row: of["talk"] for row, of in found.forgetting.items()} == {
        "a": pytest.approx(0.5),
        "b": pytest.approx(0.25),
        FUSED: pytest.approx(0.4),
    }
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["retained"] == {"a": 0.5, "b": pytest.approx(0.9)}
    assert plain["loss"]["b"]["spell"] == 7.0


def test_scores_of_different_measures_are_not_averaged():
    found = hand_made()
    mixed = replace(found.matrix, measures=dict(found.matrix.measures) | {"count": ("error", False)})
    assert replace(found, matrix=mixed).concept_loss_score is None


def test_the_table_and_the_picture(tmp_path: Path):
    console = Console(width=160, record=True)
    console.print(hand_made().table())
    text = console.export_text()
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "spell (a)" in lines["spell"]
    assert "50.0%" in lines["spell"]
    assert "3.2500 to 3.5000" in lines["talk"]
    assert "+0.4000" in lines["talk"]
    assert retained_picture(hand_made(), tmp_path / "kept.svg").read_text().startswith("<?xml")
    with pytest.raises(IntarsiaError, match="should end in"):
        retained_picture(hand_made(), tmp_path / "kept")


# ------------------------------------------------------------------ on a live deck
PAIRS = {"spell": [("a ->", " x"), ("b ->", " y")], "count": [("1 ->", " 2")], "talk": [("hello", " you")]}


def tasks() -> dict[str, Task]:
    tokenizer = toy_tokenizer()
    return {name: Task(name, encode_pairs(pairs, tokenizer)) for name, pairs in PAIRS.items()}


@functools.cache
def adapters() -> dict[str, Adapter]:
    """Two adapters on the toy model, each a few steps down the loss of its own task."""
    found, tokenizer = {}, toy_tokenizer()
    for seed, (name, task) in enumerate({"a": "spell", "b": "count"}.items()):
        model = toy_model()
        ia.attach(model, ia.Shira(density=0.1), name=name, seed=seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        batch = collator(tokenizer)(tasks()[task].examples)
        for _ in range(3):
            grads = torch.autograd.grad(model(**batch).loss, parameters)
            with torch.no_grad():
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.sub_(0.1 * grad / grad.norm())
            ia.sync(model)
        found[name] = ia.export(model, name)
    return found


def test_measured_on_a_deck_it_is_what_is_measured_by_hand():
    given, model, of = adapters(), toy_model(), tasks()
    fused = merge(given, weights={"a": 0.75, "b": 0.5})
    seen: list[str] = []
    found = measure(
        model, toy_tokenizer(), given, fused, {"a": of["spell"], "b": of["count"]}, [of["talk"]],
        progress=lambda done, total, what: seen.append(f"{done}/{total}"),
    )  # fmt: skip
    assert all(torch.equal(mine, its) for mine, its in zip(model.parameters(), toy_model().parameters(), strict=True))
    assert seen[-1] == "12/12"

    def by_hand(shares: dict[str, float], task: str) -> float:
        net = toy_model()
        with torch.no_grad():
            for name, share in shares.items():
                for weight, edit in given[name].edits.items():
                    net.get_parameter(weight).add_(share * edit.delta(torch.zeros(edit.shape)))
        return held_out_loss(net, toy_tokenizer(), of[task].examples)

    rows: dict[str, dict[str, float]] = {BASE: {}, "a": {"a": 1.0}, "b": {"b": 1.0}, FUSED: {"a": 0.75, "b": 0.5}}
    for row, shares in rows.items():
        for task in PAIRS:
            assert found.matrix[row, task].loss == pytest.approx(by_hand(shares, task), rel=1e-5)
    base, alone, both = (by_hand(rows[row], "spell") for row in (BASE, "a", FUSED))
    assert found.shares["a"] == pytest.approx((base - both) / (base - alone), rel=1e-3)
    assert found.worst is not None
    assert 0 < found.worst < 2


def test_a_skill_is_answered_by_its_own_adapter_the_base_and_the_merged_one_only():
    given, of = adapters(), tasks()
    spell = replace(
        of["spell"], prompts=["a ->"], references=["x"], measure=right, measure_name="right", max_new_tokens=2
    )
    found = measure(toy_model(), toy_tokenizer(), given, given["a"], {"a": spell, "b": of["count"]}, [of["talk"]])
    answered = {row for row in found.matrix.adapters if found.matrix[row, "spell"].score is not None}
    assert answered == {BASE, "a", FUSED}


def test_bad_input_is_one_clear_error():
    given, of, tokenizer = adapters(), tasks(), toy_tokenizer()
    fused = merge(given)
    with pytest.raises(IntarsiaError, match="data is given for 'aa', and no adapter has that name; did you mean 'a'"):
        measure(toy_model(), tokenizer, given, fused, {"aa": of["spell"]})
    with pytest.raises(IntarsiaError, match="no skill to measure"):
        measure(toy_model(), tokenizer, given, fused, {})
    with pytest.raises(IntarsiaError, match="several data sets are named spell"):
        measure(toy_model(), tokenizer, given, fused, {"a": of["spell"], "b": of["spell"]})
    with pytest.raises(IntarsiaError, match="would be taken for the fused model"):
        measure(toy_model(), tokenizer, {FUSED: given["a"]}, fused, {FUSED: of["spell"]})
    with pytest.raises(IntarsiaError, match="base"):
        measure(toy_model(seed=5), tokenizer, given, fused, {"a": of["spell"]})
