"""The search on a live deck: what a trial measures, what is written, and that the model is the base again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import intarsia as ia
from intarsia import merge, pretrained
from intarsia.errors import IntarsiaError
from intarsia.evaluate import encode_pairs, generate, held_out_loss
from intarsia.merge.search import Live, Objective, Task, find_weights, hold_out
from intarsia.merge.search.weights import ranges_of, switch
from intarsia.site import site_at
from intarsia.train.data import load_examples

RANGES = ranges_of([0.0, 1.5])


@pytest.fixture
def world(skilled):
    loaded = pretrained.load(skilled.base)
    rows = {name: load_examples(file, loaded.tokenizer)[0] for name, file in skilled.rows.items()}
    return loaded, rows, {name: ia.store.open(folder) for name, folder in skilled.adapters.items()}


def task_of(world, method="sum", ranges=RANGES, parameters=None, **more):
    _, rows, adapters = world
    given = {key: value for key, value in ({"weight": 0.5} | (parameters or {})).items() if value is not None}
    wanted = merge.Wanted(method, merge.plan.settings("parameters", given))
    search, held_out = hold_out(rows, 0.5, 0)
    return Task(merge.settle(adapters, wanted), search, held_out, ranges, **more)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("sum", {}),
        ("sum", {"parameters": {"lambda": 0.7}}),
        ("linear", {}),
        ("ties", {"ranges": ranges_of([0, 2], [0.1, 1.0])}),
        ("sum", {"points": 3}),
    ],
)
def test_a_trial_measures_the_merge_that_would_be_written(world, method, more):
    """By another road: the merge is made with these numbers, folded into the weights, and the loss taken there."""
    loaded, _, adapters = world
    task = task_of(world, method, **more)
    deck = ia.Deck(loaded.model)
    deck.add(**adapters)
    set_in, live = switch(task, deck), Live(loaded.model, loaded.tokenizer)
    for scale in (1.0, 0.6):
        point = {
            name: round(scale * value * (1 + 0.1 * i), 4) for i, (name, value) in enumerate(task.space.start.items())
        }
        set_in(point)
        measured = live.losses(task.rows)
        deck.off()
        merged = task.merged(point, "merged")
        other = pretrained.load(loaded.name).model
        with torch.no_grad():
            for name, edit in merged.edits.items():
                weight = other.get_parameter(name)
                weight.copy_(edit.fold(weight.double()))
        expected = {s: held_out_loss(other, loaded.tokenizer, examples) for s, examples in task.rows.items()}
        assert measured == pytest.approx(expected, rel=1e-5)
    base = live.losses(task.rows)
    assert all(abs(measured[s] - base[s]) > 0.01 for s in base), "the edits matter"


def test_the_found_weights_beat_the_given_ones_and_the_model_is_the_base_again(world):
    loaded, _, _ = world
    before = ia.model.digest(loaded.model)
    task = task_of(world)
    outcome = find_weights(task, Live(loaded.model, loaded.tokenizer), trials=20)
    assert ia.model.digest(loaded.model) == before
    found, search = outcome.to_dict(), outcome.search
    assert dict(search.start.point) == {"weight of ayes": 0.5, "weight of bees": 0.5}
    assert set(search.trials[1].point.values()) == {1.0}, "equal weights of 1 come next; 1/2 each is the start here"
    assert found["value"]["search"]["found"] > found["value"]["search"]["given"]
    for rows, compared in (("search", outcome.searched), ("held_out", outcome.held_out)):
        for which, losses in (("given", compared.given), ("found", compared.found)):
            by_hand = {s: (b - losses[s]) / (b - compared.gains.single[s]) for s, b in compared.gains.base.items()}
            assert found[rows]["retained"][which] == pytest.approx(by_hand)
            assert found["value"][rows][which] == pytest.approx(min(by_hand.values()))
    assert outcome.searched.gains != outcome.held_out.gains, "other rows"


def test_where_a_change_depends_on_the_weight_each_trial_starts_from_the_base(world):
    """DoRA's change under TIES is computed from the base's weights, which hold another trial's merge in between."""
    loaded, rows, adapters = world
    ia.attach(loaded.model, ia.Dora(ia.Lora(rank=2)), name="lengths")
    with torch.no_grad():
        for parameter in (p for p in loaded.model.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    lengths = ia.export(loaded.model, "lengths")
    ia.detach(loaded.model, "lengths")
    plan = merge.settle(
        {"ayes": adapters["ayes"], "lengths": lengths},
        merge.Wanted("ties", merge.plan.settings("parameters", {"weight": 0.5})),
    )
    data = {"ayes": rows["ayes"], "lengths": rows["bees"]}
    base = {weight: site_at(loaded.model, weight.removesuffix(".weight")).weight.detach() for weight in plan.rules}
    task = Task(plan, data, data, RANGES, base=base)
    deck = ia.Deck(loaded.model)
    deck.add(**plan.adapters)
    set_in, live = switch(task, deck), Live(loaded.model, loaded.tokenizer)
    points = [task.space.start, dict(zip(task.space.start, (0.1, 1.4), strict=True)), task.space.start]
    found = []
    for point in points:
        set_in(point)
        found.append(live.losses(data))
    assert found[0] == found[2]
    assert found[0] != found[1]
    deck.off()


def test_weights_of_0_are_the_base_whatever_the_rule(world):
    loaded, _, adapters = world
    task = task_of(world, "ties")
    deck = ia.Deck(loaded.model)
    deck.add(**adapters)
    switch(task, deck)(dict.fromkeys(task.space.start, 0.0))
    assert deck.active == {}


def test_no_row_is_on_both_sides(world):
    _, rows, _ = world
    search, held_out = hold_out(rows, 0.5, 0)
    for skill, examples in rows.items():
        numbers = [{e.number for e in side[skill]} for side in (search, held_out)]
        assert numbers[0].isdisjoint(numbers[1])
        assert len(numbers[0] | numbers[1]) == len(examples)
        assert len(numbers[1]) == 8
    with pytest.raises(IntarsiaError, match="ayes: 1 rows are too few"):
        hold_out({"ayes": rows["ayes"][:1]}, 0.5, 0)


def test_held_out_rows_that_are_searched_on_are_refused(world):
    loaded, rows, _ = world
    task = dataclasses.replace(task_of(world), held_out={name: examples[:3] for name, examples in rows.items()})
    with pytest.raises(IntarsiaError, match="held-out rows are among those that are searched on"):
        find_weights(task, Live(loaded.model, loaded.tokenizer), trials=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda w: task_of(w, parameters={"weight": [0.2, 0.8]}),
            "the weight of ayes is not one number at all weights",
        ),
        (lambda w: task_of(w, ranges=ranges_of([0, 1.5], [0.1, 1])), "the rule sum has no density of single adapters"),
        (lambda w: task_of(w, "mwa", parameters={"loss": 1.0, "weight": None}), "mwa finds the weights by itself"),
        (lambda w: task_of(w, ranges=ranges_of([0.6, 1.5])), "weight of ayes starts at 0.5, and is searched from 0.6"),
        (lambda w: task_of((w[0], {"ayes": w[1]["ayes"]}, w[2])), "there are no rows of the skill of bees"),
        (lambda w: task_of((w[0], w[1] | {"cees": w[1]["ayes"]}, w[2])), "no adapter 'cees' is merged"),
        (lambda w: task_of((w[0], {"ayes": w[1]["ayes"]}, {"ayes": w[2]["ayes"]})), "there is only one"),
        (lambda w: task_of(w, objective=Objective("weighted", {"ayes": 1})), "importances of ayes; the skills are"),
    ],
)
def test_mistakes(world, change, said):
    with pytest.raises(IntarsiaError, match=said):
        change(world).space


def test_rows_in_which_an_adapter_gains_nothing_are_noticed_before_the_search(world):
    loaded, rows, adapters = world
    likely = generate(
        loaded.model, loaded.tokenizer, ["Q", "R", "S", "T"], 4
    )  # the base is best at what it says by itself
    strange = encode_pairs(list(zip("QRST", likely, strict=True)), loaded.tokenizer)
    before = ia.model.digest(loaded.model)
    with pytest.raises(IntarsiaError, match="search rows: bees: the adapter alone has loss .* it gains nothing"):
        find_weights(
            task_of((loaded, rows | {"bees": strange}, adapters)), Live(loaded.model, loaded.tokenizer), trials=3
        )
    assert ia.model.digest(loaded.model) == before
