"""TIES, DARE, DELLA, breadcrumbs and magnitude pruning, against PEFT's code and the formulas written down once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft.utils import merge_utils
from torch import Tensor

from intarsia.edits import Dense, LowRank, Sparse, columns, positions
from intarsia.errors import IntarsiaError
from intarsia.merge import Where
from intarsia.merge.thinning import ascending, between, largest, ranks_in_rows, rescaled
from intarsia.support import named_granularity, uniform
from merge.parts import change, dense, low_rank, merged, some, sparse

O, I = 6, 10
quick = settings(max_examples=40, deadline=None)


def _changes(count: int, seed: int = 0) -> list[Tensor]:
    return [some(seed + i, O, I) for i in range(count)]


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ PEFT's own code
@quick
@given(
    st.integers(1, 4),
    st.sampled_from([0.1, 0.25, 0.5, 0.75]),
    st.sampled_from(["total", "frequency"]),
    st.integers(0, 99),
)
def test_ties_is_pefts(count, density, elect, seed):
    """With equal weights, where PEFT's mean over the adapters that agree and ours over their weights are one."""
    tensors = _changes(count, seed)
    expected = merge_utils.ties(tensors, torch.ones(count, dtype=torch.float64), density, elect)
    found = merged("ties", [dense(D) for D in tensors], [1.0] * count, [{"density": density}] * count, elect=elect)
    _close(change(found.edit), expected)


@quick
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=4), st.sampled_from([0.1, 0.5, 0.75]), st.integers(0, 99))
def test_magnitude_is_pefts(weights, density, seed):
    tensors = _changes(len(weights), seed)
    expected = merge_utils.magnitude_prune(tensors, torch.tensor(weights, dtype=torch.float64), density)
    found = merged("magnitude", [dense(D) for D in tensors], weights, [{"density": density}] * len(weights))
    _close(change(found.edit), expected)


@quick
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=3), st.sampled_from([0.2, 0.5]), st.integers(0, 99))
def test_dare_is_pefts_with_the_same_draws(weights, density, seed):
    tensors = _changes(len(weights), seed)
    own, edits = [{"density": density}] * len(weights), [dense(D) for D in tensors]
    with _drawn(len(weights)):
        expected = merge_utils.dare_linear(tensors, torch.tensor(weights, dtype=torch.float64), density)
    _close(change(merged("dare_linear", edits, weights, own).edit), expected)
    ones = [1.0] * len(weights)
    with _drawn(len(weights)):
        expected = merge_utils.dare_ties(tensors, torch.tensor(ones, dtype=torch.float64), density)
    _close(change(merged("dare_ties", edits, ones, own, normalize=True).edit), expected)


@contextmanager
def _drawn(count: int) -> Iterator[None]:
    """Within the block torch.bernoulli draws what our rules draw for the adapters a0, a1, ..."""
    draws = iter([_draw(f"a{i}") for i in range(count)])
    with mock.patch.object(torch, "bernoulli", lambda p: (next(draws) < p).to(p.dtype)):
        yield


def _draw(adapter: str, where: str = "model.layers.0.up.weight", seed: int = 0) -> Tensor:
    return uniform(torch.arange(O * I), Where(where, seed).key(adapter)).view(O, I)


# ------------------------------------------------------------------ by hand
def test_ties_of_a_row_by_hand():
    """Trim to 2 of 4; signs +, -, -, +; the mean over those that agree, by weight."""
    edits = [
        dense(torch.tensor([row], dtype=torch.float64))
        for row in ([4.0, -3, 1, 0], [2.0, 1, -5, 0.5], [-1.0, 6, -7, 0])
    ]
    found = merged("ties", edits, [1.0, 1.0, 2.0], [{"density": 0.5}] * 3)
    # trimmed: [4, -3, 0, 0], [2, 0, -5, 0], [0, 6, -7, 0]; weighted sums: 6, 9, -19, 0
    _close(change(found.edit), torch.tensor([[(4 + 2) / 2, 12 / 2, (-5 - 14) / 3, 0.0]], dtype=torch.float64))
    loose = merged("ties", edits, [1.0, 1.0, 2.0], [{"density": 0.5}] * 3, normalize=False, lambda_=0.5)
    _close(change(loose.edit), torch.tensor([[3.0, 6.0, -9.5, 0.0]], dtype=torch.float64))


def test_an_even_vote_is_positive():
    """As in the authors' code and mergekit: sign(0) counts as +."""
    edits = [dense(torch.tensor([[2.0]])), dense(torch.tensor([[-2.0]]))]
    assert change(merged("ties", edits, own=[{"density": 1.0}] * 2).edit).item() == 2.0


def test_breadcrumbs_leave_out_the_largest_and_the_smallest():
    values = torch.arange(1.0, 21.0, dtype=torch.float64) * torch.tensor([1.0, -1.0]).repeat(10)
    found = merged("breadcrumbs", [dense(values[None])], [2.0], [{"density": 0.5, "gamma": 0.1}])
    kept = torch.arange(8, 18)  # sizes 9 to 18: the two largest of 20 are out, then ten
    expected = torch.zeros(20, dtype=torch.float64).index_copy(0, kept, 2 * values[kept])
    assert change(found.edit)[0].equal(expected)


def test_outliers_give_way_to_the_density():
    """gamma + density above 1: fewer outliers are left out, so that the density holds."""
    assert between(torch.arange(1.0, 11.0), 0.9, 0.5).count_nonzero() == 9
    assert between(torch.arange(1.0, 11.0), 0.9, 0.1).tolist() == [*range(1, 10), 0.0]


def test_largest_keeps_one_at_least_and_cuts_off():
    assert largest(torch.tensor([1.0, -3.0, 2.0]), 0.1).tolist() == [0.0, -3.0, 0.0]
    assert largest(torch.tensor([1.0, -3.0, 2.0]), 0.9).tolist() == [0.0, -3.0, 2.0]
    assert largest(torch.tensor([1.0, -3.0, 2.0]), 0.0).tolist() == [0.0, 0.0, 0.0]
    assert largest(torch.tensor([1.0, -1.0, 1.0, 1.0]), 0.5).tolist() == [1.0, -1.0, 0.0, 0.0], (
        "of equal ones the first"
    )
    assert ascending(torch.tensor([1.0, 5.0, 1.0])).tolist() == [2, 0, 1]


def test_ranks_in_rows_by_hand():
    values, rows = torch.tensor([3.0, -1.0, 2.0, 9.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert ranks_in_rows(values, rows).tolist() == [1.0, 0.0, 0.5, 0.5, 1.0, 0.0]


def test_della_keeps_with_probabilities_by_rank():
    """Closed form, written down apart: p = density - epsilon + 2 epsilon rank / (n - 1), rank among the row's sizes."""
    D, density, epsilon = some(3, O, I), 0.4, 0.3
    rank = torch.tensor(
        [[sum(abs(float(b)) < abs(float(a)) for b in row) for a in row] for row in D], dtype=torch.float64
    )
    p = density - epsilon + 2 * epsilon * rank / (I - 1)
    expected = torch.where(_draw("a0") < p, D / p, 0.0)
    found = merged("della_linear", [dense(D)], own=[{"density": density, "epsilon": epsilon}])
    _close(change(found.edit), expected)
    elected = merged("della", [dense(D), dense(-0.5 * D)], own=[{"density": density, "epsilon": epsilon}] * 2)
    parts = torch.stack([expected, torch.where(_draw("a1") < p, -0.5 * D / p, 0.0)])
    total = parts.sum(0)
    agree = parts.sign() == torch.where(total >= 0, 1, -1)
    _close(change(elected.edit), (parts * agree).sum(0) / agree.sum(0).clamp_min(1))


def test_rescaling_by_the_sum_of_sizes():
    values = torch.tensor([1.0, -2.0, 3.0, -4.0])
    kept = torch.tensor([1.0, 0.0, 0.0, -4.0])
    assert rescaled(kept, values, 0.5, "l1").tolist() == [2.0, 0.0, 0.0, -8.0]
    assert rescaled(kept, values, 0.5, "expectation").tolist() == [2.0, 0.0, 0.0, -8.0]
    assert rescaled(kept, values, 0.25, "expectation").tolist() == [4.0, 0.0, 0.0, -16.0]
    assert rescaled(kept, values, 0.5, "none").equal(kept)
    assert rescaled(0 * kept, values, 0.5, "l1").tolist() == [0.0] * 4


@pytest.mark.parametrize("method", ["dare", "della_linear"])
def test_the_mean_over_draws_is_the_whole(method):
    D = torch.linspace(1, 2, O * I, dtype=torch.float64).view(O, I)
    draws = [change(merged(method, [dense(D)], own=[{"density": 0.4}], seed=seed).edit) for seed in range(600)]
    kept = torch.stack(draws).count_nonzero() / (600 * O * I)
    assert kept == pytest.approx(0.4, abs=0.01)  # four standard deviations of 36,000 draws
    torch.testing.assert_close(torch.stack(draws).mean(0).mean(), D.mean(), rtol=0.03, atol=0)


# ------------------------------------------------------------------ draws
def test_draws_depend_on_seed_weight_adapter_and_position_alone():
    edits = [dense(D) for D in _changes(2)]
    one = merged("dare", edits, [1.0, 0.0])
    assert change(one.edit).equal(change(merged("dare", edits, [1.0, 0.0]).edit))
    for other in (merged("dare", edits, [1.0, 0.0], seed=1), merged("dare", edits, [1.0, 0.0], where="other")):
        assert not change(one.edit).equal(change(other.edit))
    first, second = (_draw(name) < 0.5 for name in ("a0", "a1"))
    assert not first.equal(second)


# ------------------------------------------------------------------ sparse and dense are alike
RULES = ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "magnitude"]


@pytest.mark.parametrize("method", RULES)
@quick
@given(st.integers(1, 3), st.floats(0.2, 0.8), st.integers(0, 99), st.booleans())
def test_a_full_sparse_edit_and_a_dense_one_are_merged_alike(method, count, density, seed, normalize):
    tensors = _changes(count, seed)
    everywhere = torch.arange(O * I)
    own = [{"density": density}] * count
    as_sparse = merged(method, [sparse(D, everywhere) for D in tensors], own=own, normalize=normalize)
    as_dense = merged(method, [dense(D) for D in tensors], own=own, normalize=normalize)
    assert isinstance(as_sparse.edit, Sparse)
    assert isinstance(as_dense.edit, Dense)
    assert change(as_sparse.edit).equal(change(as_dense.edit))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_a_draw_belongs_to_an_entry_of_the_weight(method):
    """However a change is written down, an entry of it meets the same draw."""
    index = torch.arange(1, O * I, 4)
    thin = [sparse(D, index) for D in _changes(2)]
    own = [{"density": 0.5}] * 2
    found = merged(method, thin, own=own, rescale="none")
    written_out = merged(method, [dense(change(edit)) for edit in thin], own=own, rescale="none")
    assert change(found.edit).equal(change(written_out.edit))
    assert 0 < found.edit.touched < len(index)


@pytest.mark.parametrize("method", RULES)
def test_sparse_edits_stay_on_the_union_and_count_their_own_entries(method):
    D = some(0, O, I)
    first, second = torch.arange(0, 60, 3), torch.arange(0, 60, 4)
    found = merged(
        method,
        [sparse(D, first), sparse(2 * D, second)],
        own=[{"density": 0.5, **({"epsilon": 0.1} if "della" in method else {})}] * 2,
    )
    touched = positions(found.edit)
    assert isinstance(found.edit, Sparse)
    assert touched is not None
    assert set(touched.tolist()) <= set(first.tolist()) | set(second.tolist())
    assert change(found.edit).view(-1)[touched].all(), "what was pruned is not kept as zeros"


def test_disjoint_supports_keep_their_values_under_an_election():
    """Nobody votes against: TIES of whole disjoint adapters is their union, each value as it was."""
    D, E = some(0, O, I), some(1, O, I)
    found = merged(
        "ties", [sparse(D, torch.arange(0, 60, 2)), sparse(E, torch.arange(1, 60, 2))], own=[{"density": 1.0}] * 2
    )
    even = torch.arange(60) % 2 == 0
    assert change(found.edit).view(-1).equal(torch.where(even, D.view(-1), E.view(-1)))


def test_units_are_kept_where_they_cost_no_more():
    unit = named_granularity("column", 1)
    edit = columns((O, I), torch.tensor([1, 4]), some(0, O, 2))
    whole = merged("magnitude", [edit], own=[{"density": 1.0}]).edit
    assert isinstance(whole, Sparse)
    assert whole.granularity == unit
    assert change(whole).equal(change(edit))
    thin = merged("magnitude", [edit], own=[{"density": 0.25}]).edit
    assert isinstance(thin, Sparse)
    assert str(thin.granularity) == "elements"
    assert thin.touched == 3


def test_what_is_not_sparse_becomes_dense_or_of_a_rank():
    edits = [low_rank(0, (O, I), 2), low_rank(5, (O, I), 2)]
    whole = merged("ties", edits, own=[{"density": 0.5}] * 2).edit
    assert isinstance(whole, Dense)
    low = merged("ties", edits, own=[{"density": 0.5}] * 2, rank=3)
    assert isinstance(low.edit, LowRank)
    assert low.edit.A.shape[0] == 3
    lost = (change(low.edit) - change(whole)).square().sum()
    assert low.lost == pytest.approx(float(lost), rel=1e-6)
    assert low.of == pytest.approx(float(change(whole).square().sum()), rel=1e-6)


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("ties", {"density": 1.5}, "ties: density=1.5 must be from 0 to 1"),
        ("ties", {"elect": "loudest"}, "elect='loudest' must be one of none, total, frequency"),
        ("ties", {"rank": 0}, "rank=0 must be 1 or more"),
        ("ties", {"lambda": float("nan")}, "lambda=nan must be a finite number"),
        ("dare", {"rescale": "l2"}, "rescale='l2' must be one of expectation, l1, none"),
        ("dare", {"rescale": True}, "rescale=True is a bool; expected str"),
        ("della", {"density": 0.9}, r"epsilon=0.15 must be 0 or more, with density \+- epsilon between 0 and 1 \(density=0.9\)"),
        ("breadcrumbs", {"gamma": 1.0}, "gamma=1.0 must be from 0 to below 1"),
    ],
)  # fmt: skip
def test_fields_out_of_range(method, values, said):
    from intarsia.merge import build

    with pytest.raises(IntarsiaError, match=said):
        build(method, values)


def test_weights_that_sum_to_0_cannot_be_normalized():
    with pytest.raises(IntarsiaError, match="the weights sum to 0, and normalize divides by that"):
        merged("sum", [dense(D) for D in _changes(2)], [1.0, -1.0], normalize=True)
