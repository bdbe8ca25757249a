"""The weighted sum is the sum of the dense changes, for every pair of kinds of edits, and stays as small as they are."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch

from edits.test_algebra import MAKERS, I, O
from intarsia.edits import Dense, LowRank, Sparse, Sum, add, positions, scale
from merge.parts import change, dense, low_rank, merged, some, sparse

PAIRS = list(combinations_with_replacement(sorted(MAKERS), 2))


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[" + ".join(pair) for pair in PAIRS])
def test_a_sum_of_two_is_the_sum_of_their_changes(one, other):
    first, second = (MAKERS[name](torch.Generator().manual_seed(seed)) for seed, name in enumerate((one, other)))
    W = some(9, O, I)
    expected = 0.25 * first.delta(W) - 1.5 * second.delta(W)
    found = merged("sum", [first, second], [0.25, -1.5]).edit
    # Of float64: the same numbers, added up in another order.
    torch.testing.assert_close(found.delta(W), expected, rtol=1e-12, atol=1e-13)
    average = merged("linear", [first, second], [0.25, 1.0], lambda_=2.0).edit
    torch.testing.assert_close(
        average.delta(W), 2 * (0.25 * first.delta(W) + second.delta(W)) / 1.25, rtol=1e-12, atol=1e-13
    )


def test_powers_of_two_are_summed_to_the_bit():
    """Where no rounding happens there is no difference at all."""
    grid = (8 * some(0, 6, 8)).round() / 8
    one, other = sparse(grid, torch.arange(0, 48, 2)), sparse(2 * grid, torch.arange(0, 48, 3))
    found = merged("sum", [one, other], [0.5, 4.0]).edit
    assert change(found).equal(0.5 * change(one) + 4 * change(other))
    touched = positions(found)
    assert touched is not None
    assert touched.tolist() == sorted({*range(0, 48, 2), *range(0, 48, 3)})


def test_a_mixture_is_one_part_a_kind():
    shape = (6, 8)
    D = some(0, *shape)
    parts = [
        sparse(D, torch.tensor([1, 5])),
        low_rank(1, shape, 2),
        sparse(D, torch.tensor([5, 7])),
        low_rank(3, shape, 1),
    ]
    found = add(*parts)
    assert isinstance(found, Sum)
    assert [type(part) for part in found.parts] == [Sparse, LowRank]
    assert [part.tensors()[key].shape[0] for part, key in zip(found.parts, ("values", "A"), strict=True)] == [3, 3]
    torch.testing.assert_close(change(found), sum(map(change, parts)), rtol=1e-12, atol=1e-13)
    again = add(scale(found, 0.5), dense(D), dense(D))
    assert isinstance(again, Sum)
    assert [type(part) for part in again.parts] == [Sparse, LowRank, Dense]
    torch.testing.assert_close(change(again), 0.5 * change(found) + 2 * D, rtol=1e-12, atol=1e-13)


def test_a_sum_in_a_sum_loses_no_part():
    shape = (6, 8)
    inner = Sum(shape, (low_rank(0, shape, 1), dense(some(1, *shape))), (2.0, 0.5))
    outer = Sum(shape, (inner, dense(some(2, *shape))), (3.0, 1.0))
    W = some(5, *shape)
    torch.testing.assert_close(add(outer, inner).delta(W), outer.delta(W) + inner.delta(W), rtol=1e-12, atol=1e-13)


def test_what_cannot_be_scaled_keeps_its_factor():
    edit, W = MAKERS["rescaled"](torch.Generator().manual_seed(1)), some(3, O, I)
    found = add(scale(edit, 0.5), scale(scale(edit, 2.0), 0.25))
    torch.testing.assert_close(found.delta(W), edit.delta(W), rtol=1e-12, atol=1e-13)
