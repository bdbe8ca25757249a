"""Ranks and spectra against closed forms and torch's own decomposition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from intarsia.analyze import (
    change_of,
    effective_rank,
    energy_share,
    needs_weight,
    singular_values,
    spectrum,
    stable_rank,
)
from intarsia.edits import LowRank, Rescaled, Sparse
from intarsia.edits import columns as columns_edit
from intarsia.edits import elements as elements_edit
from intarsia.errors import IntarsiaError

O, I = 20, 12


def elements(k: int = 15) -> Sparse:
    index = torch.randperm(O * I)[:k].sort().values
    return elements_edit((O, I), index, torch.randn(k))


def columns(k: int = 3) -> Sparse:
    return columns_edit((O, I), torch.randperm(I)[:k].sort().values, torch.randn(O, k))


def low_rank(r: int = 4, scale: float = -1.5) -> LowRank:
    return LowRank((O, I), torch.randn(O, r), torch.randn(r, I), scale)


def rescaled() -> Rescaled:
    return Rescaled((O, I), low_rank(), torch.rand(O) + 0.5)


@pytest.mark.parametrize("make", [elements, columns, low_rank, lambda: low_rank(r=12), rescaled])
def test_a_spectrum_is_that_of_the_dense_change(make):
    edit, weight = make(), torch.randn(O, I)
    dense = (edit.fold(weight.double()) - weight.double()).float()
    expected = torch.linalg.svdvals(dense)
    found = spectrum(edit, weight)
    assert found.shape == (I,)
    assert bool((found.diff() <= 1e-5).all()), "largest first"
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    if not needs_weight(edit):
        torch.testing.assert_close(spectrum(edit), expected, atol=2e-5, rtol=1e-4)


def test_a_rescaled_change_needs_its_weight():
    assert needs_weight(rescaled())
    with pytest.raises(IntarsiaError, match="depends on the weight"):
        change_of(rescaled())


def test_a_low_rank_spectrum_is_not_multiplied_out(monkeypatch):
    edit = low_rank(2)
    monkeypatch.setattr(LowRank, "delta", lambda self, W: pytest.fail("built an O x I matrix"))
    assert (spectrum(edit) > 1e-6).sum() == 2


def test_rows_and_columns_of_zeros_add_zeros_only(monkeypatch):
    dense = torch.zeros(300, 200)
    dense[7, 3], dense[7, 150], dense[250, 3] = 3.0, 4.0, 0.0
    seen = []
    svdvals: Callable[[torch.Tensor], torch.Tensor] = torch.linalg.svdvals

    def watched(matrix: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(matrix.shape))
        return svdvals(matrix)

    monkeypatch.setattr(torch.linalg, "svdvals", watched)
    found = singular_values(dense)
    assert found.shape == (200,)
    assert found[0] == pytest.approx(5.0)
    assert found[1:].abs().max() == 0
    assert seen == [(1, 2)]
    assert singular_values(torch.zeros(3, 5)).tolist() == [0.0, 0.0, 0.0]


def test_ranks_of_known_spectra():
    flat, single, none = torch.ones(7), torch.tensor([2.0, 0.0, 0.0]), torch.zeros(4)
    assert [effective_rank(s) for s in (flat, single, none)] == pytest.approx([7.0, 1.0, 0.0])
    assert [stable_rank(s) for s in (flat, single, none)] == pytest.approx([7.0, 1.0, 0.0])
    two = torch.tensor([3.0, 1.0])
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    assert effective_rank(two) == pytest.approx(float(entropy.exp()))
    assert stable_rank(two) == pytest.approx(10 / 9)
    assert effective_rank(100 * two) == pytest.approx(effective_rank(two)), "the size of a change is not its rank"


def test_energy_share():
    s = torch.tensor([2.0, 1.0, 1.0])
    assert [energy_share(s, k) for k in (1, 2, 3, 9)] == pytest.approx([4 / 6, 5 / 6, 1.0, 1.0])
    assert energy_share(torch.zeros(3), 1) == 0
