"""Budgets against brute force: sorting all scores of the model, counting by row, sharing out by hand."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import intarsia as ia
from intarsia import model as models
from intarsia.support import allocate, proportional, sample_rows
from intarsia.support.budgets import kth_largest, top_of_rows
from small import SITES, layer_of, small_net, some_input, some_loss, state_of

SCORES = st.lists(
    st.floats(-1024, 1024, width=32) | st.sampled_from([0.0, -0.0, 1.0, 2.0**-140]), min_size=1, max_size=30
)


def _magnitudes() -> dict[str, torch.Tensor]:
    net = small_net()
    return {site: layer_of(net, site).weight.detach().abs().flatten() for site in SITES}


def _best(scores: dict[str, torch.Tensor], count: int) -> dict[str, list[int]]:
    """The count largest of all, by sorting them all; ties to the earlier site and the lower index."""
    every = [(-float(s), n, i) for n, site in enumerate(scores) for i, s in enumerate(scores[site].tolist())]
    chosen = sorted(every)[:count]
    return {site: sorted(i for _, m, i in chosen if m == n) for n, site in enumerate(scores)}


@given(lists=st.lists(SCORES, min_size=1, max_size=4), share=st.floats(0, 1), wide=st.booleans())
def test_the_threshold_is_that_of_sorting_everything(lists, share, wide):
    dtype = torch.float64 if wide else torch.float32
    scores = {f"s{i}": torch.tensor(each, dtype=dtype) for i, each in enumerate(lists)}
    total = max(1, round(share * sum(map(len, lists))))
    every = torch.cat(list(scores.values()))
    _, level = kth_largest(list(scores.values()), total)
    largest = every.sort(descending=True).values
    assert level == total - int((every > largest[total - 1]).sum())
    counts = allocate("model", scores, total)
    assert counts == {site: len(index) for site, index in _best(scores, total).items()}


def test_scores_below_zero_are_in_their_order():
    assert allocate("model", {"a": torch.tensor([-1.0, -2.0]), "b": torch.tensor([-1.5, 3.0])}, 3) == {"a": 1, "b": 2}


@pytest.mark.parametrize("density", [0.003, 0.1, 0.5, 1.0])
def test_a_budget_of_the_model_is_its_largest_entries(density):
    """Exactly the count of the whole model, and exactly the entries that one threshold leaves."""
    model = small_net()
    ia.attach(model, ia.Shira(density=density, scorer="magnitude", budget="model"))
    total = round(density * 3 * 384)
    expected = _best(_magnitudes(), total)
    found = {site: state_of(model, site).index.tolist() for site in models.states(model, "default")}
    assert found == {site: index for site, index in expected.items() if index}
    assert sum(map(len, found.values())) == total
    assert sum(models.plan(small_net(), ia.Shira(density=density, scorer="snip", budget="model")).values()) == total


def test_a_weight_that_gets_nothing_gets_no_adapter(tmp_path):
    model = small_net()
    with torch.no_grad():
        layer_of(model, "down").weight.mul_(1e-3)
    start = models.digest(model)
    base = small_net()
    base.load_state_dict(model.state_dict())
    ia.attach(model, ia.Shira(density=0.1, scorer="magnitude", budget="model"))
    assert list(models.states(model, "default")) == ["up", "again"]
    assert type(layer_of(model, "down")) is torch.nn.Linear
    ia.save(model, tmp_path / "a")
    ia.load(base, tmp_path / "a")
    assert torch.equal(base(some_input()), model(some_input()))
    ia.detach(model, "default")
    assert models.digest(model) == start


def test_a_budget_of_layers_is_in_proportion_to_their_mean_scores():
    model = small_net()
    with torch.no_grad():
        layer_of(model, "up").weight.mul_(3.0)
    means = {site: float(layer_of(model, site).weight.detach().abs().double().mean()) for site in SITES}
    ia.attach(model, ia.Shira(density=0.1, scorer="magnitude", budget="layer"))
    total = round(0.1 * 3 * 384)
    found = {site: len(state_of(model, site).index) for site in SITES}
    assert sum(found.values()) == total
    for site in SITES:
        assert abs(found[site] - total * means[site] / sum(means.values())) < 1
    for site in SITES:
        scores = layer_of(small_net(), site).weight.abs().flatten()
        assert state_of(model, site).index.tolist() == scores.topk(found[site]).indices.sort().values.tolist()


@pytest.mark.parametrize(
    ("weights", "room", "total", "expected"),
    [
        ({"a": 1.0, "b": 1.0}, {"a": 9, "b": 9}, 10, {"a": 5, "b": 5}),
        ({"a": 3.0, "b": 1.0}, {"a": 9, "b": 9}, 8, {"a": 6, "b": 2}),
        ({"a": 3.0, "b": 1.0, "c": 1.0}, {"a": 2, "b": 9, "c": 9}, 10, {"a": 2, "b": 4, "c": 4}),  # a is full
        ({"a": 1.0, "b": 0.0}, {"a": 3, "b": 9}, 8, {"a": 3, "b": 5}),  # b gets what nobody else has room for
        ({"a": 0.0, "b": 0.0}, {"a": 3, "b": 9}, 4, {"a": 1, "b": 3}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 9, "b": 9, "c": 9}, 4, {"a": 2, "b": 1, "c": 1}),
        ({"a": 1.0}, {"a": 3}, 9, {"a": 3}),
    ],
)
def test_shares_by_hand(weights, room, total, expected):
    assert proportional(weights, room, total) == expected


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=8), rooms=st.lists(st.integers(0, 50), min_size=8, max_size=8),
    share=st.floats(0, 1),
)  # fmt: skip
def test_shares_add_up_and_overflow_nobody(weights, rooms, share):
    room = {str(i): rooms[i] for i in range(len(weights))}
    total = round(share * sum(room.values()))
    counts = proportional({str(i): w for i, w in enumerate(weights)}, room, total)
    assert sum(counts.values()) == total
    assert all(0 <= counts[name] <= room[name] for name in room)


@pytest.mark.parametrize("scorer", ["random", "magnitude", "wanda"])
@pytest.mark.parametrize(("granularity", "width"), [("element", None), ("line", 4)])
def test_a_budget_of_neurons_is_the_same_in_every_row(scorer, granularity, width):
    method = ia.Shira(density=0.25, scorer=scorer, budget="neuron", granularity=granularity, width=width)
    model = small_net()
    ia.attach(model, method, data=[some_input()], loss=some_loss)
    for site in SITES:
        state = state_of(model, site)
        rows, columns = state.shape
        flat = method.granularity_at(state.shape).flat(state.shape, state.index)
        per_row = torch.bincount(flat.flatten() // columns, minlength=rows)
        assert per_row.tolist() == [round(0.25 * (columns // (width or 1))) * (width or 1)] * rows
        assert method.trained_count(state.shape) == int(per_row.sum())


def test_wanda_compares_within_each_output():
    """The paper's own choice, row by row: the largest |W_ij| ||x_j|| of each row."""
    model, x = small_net(), some_input()
    ia.attach(model, ia.Shira(density=0.25, scorer="wanda", budget="neuron"), targets="up", data=[x], loss=some_loss)
    scores = layer_of(small_net(), "up").weight.abs() * x.reshape(-1, 16).norm(dim=0)
    expected = scores.topk(4, dim=1).indices.sort(dim=1).values + torch.arange(24)[:, None] * 16
    assert torch.equal(state_of(model, "up").index, expected.flatten())


def test_ties_in_a_row_go_to_the_lower_index():
    assert top_of_rows(torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0, 3.0, 3.0, 0.0]), 2, 4).tolist() == [0, 1, 4, 5]
    assert top_of_rows(torch.ones(6), 3, 0).tolist() == []


def test_random_rows_differ_and_are_pinned():
    """They are part of the meaning of a seed, as the permutation is."""
    found = sample_rows(64, 37, 11, 5)
    assert all(len(set(row)) == 11 and min(row) >= 0 and max(row) < 37 and row == sorted(row) for row in found.tolist())
    assert len({tuple(row) for row in found.tolist()}) == 64
    assert sample_rows(3, 10, 4, 7).tolist() == [[5, 7, 8, 9], [1, 2, 4, 9], [1, 5, 6, 8]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "row"}, "budget='row' must be one of weight, neuron, model, layer"),
        ({"budget": "model"}, "budget='model' must be weight or neuron with the scorer random"),
        ({"budget": "layer", "scorer": "struct"}, "budget='layer' must be weight with the scorer struct"),
        ({"budget": "neuron", "granularity": "tile"}, "a tile is no part of a single output row"),
    ],
)
def test_budgets_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.Shira(**settings)


def test_a_budget_that_comes_to_nothing_is_refused():
    model = small_net()
    with pytest.raises(ia.IntarsiaError, match="none of the 1152 units of 3 weights would be trained; raise the"):
        ia.attach(model, ia.Shira(density=1e-5, scorer="magnitude", budget="model"))
    with pytest.raises(ia.IntarsiaError, match="up: none of the 384 elements .* raise the density"):
        ia.attach(model, ia.Shira(density=0.01, budget="neuron"))


def test_scores_are_gathered_in_files_that_are_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def progress(done, total, what):
        seen.append((what, sum(len(files) for _, _, files in os.walk(tmp_path))))

    method = ia.Shira(density=0.1, scorer="snip", budget="model")
    ia.attach(small_net(), method, data=[some_input()], loss=some_loss, progress=progress)
    assert seen == [("calibrating", 3), ("attaching", 3), ("attaching", 3), ("attaching", 3)]
    assert os.listdir(tmp_path) == []


def test_inside_of_another_method_a_shared_budget_is_shared_as_well():
    inner = ia.Shira(density=0.1, scorer="magnitude", budget="model")
    alone, inside = small_net(), small_net()
    ia.attach(alone, inner)
    ia.attach(inside, ia.Dora(inner))
    for site in models.states(alone, "default"):
        assert torch.equal(state_of(alone, site).index, state_of(inside, site).index)


def test_larger_units_are_not_better_for_their_size():
    """Columns of 16 and of 24 entries, all entries equal: no threshold tells them apart, so the earlier weight is first."""
    model = small_net()
    with torch.no_grad():
        for site in SITES:
            layer_of(model, site).weight.fill_(0.5)
    method = ia.Shira(density=0.25, scorer="magnitude", granularity="column", budget="model")
    ia.attach(model, method, targets=["down", "again"])
    assert [len(state_of(model, site).index) for site in models.states(model, "default")] == [10]
    assert list(models.states(model, "default")) == ["down"]
