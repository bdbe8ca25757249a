"""Low-rank sums, compressed again, against the SVD of the dense sum."""

from __future__ import annotations

import pytest
import torch

from intarsia.edits import LowRank, columns, elements
from intarsia.errors import IntarsiaError
from merge.parts import change, low_rank, merged, some

SHAPE = (14, 11)


@pytest.mark.parametrize("rank", [1, 3, 5, 6])
def test_it_is_the_truncated_svd_of_the_sum_and_its_loss_is_measured(rank):
    edits, weights = [low_rank(0, SHAPE, 4, 0.5), low_rank(9, SHAPE, 2, 2.0)], [0.7, -1.2]
    D = torch.stack([w * change(edit) for w, edit in zip(weights, edits, strict=True)]).sum(0)
    U, S, Vh = torch.linalg.svd(D)
    found = merged("svd", edits, weights, rank=rank)
    assert isinstance(found.edit, LowRank)
    assert found.edit.A.shape[0] == rank
    torch.testing.assert_close(change(found.edit), (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=1e-9, atol=1e-10)
    assert found.lost == pytest.approx(float((D - change(found.edit)).square().sum()), rel=1e-9, abs=1e-18)
    assert found.of == pytest.approx(float(D.square().sum()), rel=1e-12)


def test_without_a_rank_nothing_is_lost_and_no_rank_is_wasted():
    one = low_rank(0, SHAPE, 3)
    found = merged("svd", [one, one, low_rank(9, SHAPE, 2)], [1.0, 0.5, 1.0])
    assert isinstance(found.edit, LowRank)
    assert (found.edit.A.shape[0], found.lost) == (5, 0.0), "twice the same three ranks, and two"
    torch.testing.assert_close(change(found.edit), 1.5 * change(one) + change(low_rank(9, SHAPE, 2)))
    torch.testing.assert_close(found.edit.A.norm(), found.edit.B.norm())


def test_opposites_cancel_to_one_empty_rank():
    one = low_rank(0, SHAPE, 2)
    found = merged("svd", [one, one], [1.0, -1.0])
    assert change(found.edit).abs().max() < 1e-12


def test_float32_factors_keep_no_more_than_their_own_digits():
    one = low_rank(0, SHAPE, 3)
    thin = LowRank(SHAPE, one.B.float(), one.A.float(), 1.0)
    found = merged("svd", [thin, thin], [1.0, 1.0]).edit
    assert isinstance(found, LowRank)
    assert (found.A.dtype, found.A.shape[0]) == (torch.float32, 3)


def test_columns_are_low_ranks_and_more_ranks_than_the_weight_has_are_none():
    edits = [columns(SHAPE, torch.tensor([i, i + 1]), some(i, 14, 2)) for i in range(0, 9, 2)]
    found = merged("svd", [*edits, low_rank(3, SHAPE, 6)], rank=11)
    D = sum(map(change, edits)) + change(low_rank(3, SHAPE, 6))
    torch.testing.assert_close(change(found.edit), D, rtol=1e-9, atol=1e-9)


def test_sparse_sums_need_a_rank():
    edit = elements(SHAPE, torch.arange(0, 154, 5), some(0, 31))
    with pytest.raises(IntarsiaError, match="the sum .elements. is not of low rank; give svd a rank"):
        merged("svd", [edit])
    found = merged("svd", [edit, low_rank(0, SHAPE, 1)], rank=4)
    D = change(edit) + change(low_rank(0, SHAPE, 1))
    S = torch.linalg.svdvals(D)
    assert found.lost == pytest.approx(float(S[4:].square().sum()), rel=1e-9)
