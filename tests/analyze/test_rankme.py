"""RankMe against closed forms: of embeddings, and of changes of weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.analyze import numerical_rank, rankme, rankme_of, spectrum
from intarsia.edits import LowRank, elements
from intarsia.errors import IntarsiaError

EPS = 1e-7


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(seed: int, rows: int, columns: int) -> torch.Tensor:
    Q: torch.Tensor = torch.linalg.qr(some(seed, rows, columns)).Q
    return Q


def slack(m: int, value: float) -> float:
    """What eps can add: m terms of -eps log(eps), in the exponent."""
    return value * (math.exp(m * EPS * (1 - math.log(EPS))) - 1)


@pytest.mark.parametrize("gram", [True, False])
def test_orthonormal_columns_have_their_number(gram):
    found = rankme_of(orthonormal(0, 50, 8), gram=gram)
    p = 1 / 8 + EPS
    assert found == pytest.approx(math.exp(-8 * p * math.log(p)), abs=1e-6)
    assert round(found, 6) == 8.000007


@pytest.mark.parametrize("gram", [True, False])
def test_rank_one_is_one(gram):
    assert rankme_of(some(0, 40, 1) @ some(1, 1, 10), gram=gram) == pytest.approx(1.0, abs=1e-3)


def test_two_values_by_hand():
    p = [0.75 + EPS, 0.25 + EPS]
    assert rankme(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert rankme(torch.zeros(3)) == 0.0


@given(st.integers(0, 50), st.floats(1e-3, 1e3), st.integers(3, 12), st.integers(3, 12))
def test_the_size_and_turns_on_either_side_change_nothing(seed, size, rows, columns):
    Z = some(seed, rows, columns)
    found = rankme_of(Z, gram=False)
    m = min(rows, columns)
    assert 1 <= found <= m + slack(m, m) + 1e-4
    assert rankme_of(size * Z, gram=False) == pytest.approx(found, rel=1e-4)
    turned = orthonormal(seed + 1, rows, rows) @ Z @ orthonormal(seed + 2, columns, columns)
    assert rankme_of(turned, gram=False) == pytest.approx(found, rel=1e-4)
    assert rankme_of(Z, gram=True) == pytest.approx(found, rel=1e-4)
    assert rankme_of(Z.mT, gram=True) == pytest.approx(found, rel=1e-4)


def test_centring_and_scaling_of_rows_are_left_to_the_user():
    Z = some(0, 30, 5) + 100
    assert rankme_of(Z) < 1.5
    assert rankme_of(Z - Z.mean(0)) > 3


def test_a_low_rank_change_is_capped_and_a_sparse_one_is_not():
    shape, r = (64, 48), 8
    low = LowRank(shape, some(0, 64, r), some(1, r, 48), 0.5)
    index = torch.randperm(64 * 48, generator=torch.Generator().manual_seed(2))[: 64 * 48 // 50].sort().values
    sparse = elements(shape, index, some(3, len(index)))
    assert 1 < rankme(spectrum(low)) <= r + slack(48, r)
    assert rankme(spectrum(sparse)) > 2 * r
    assert numerical_rank(spectrum(low)) == r
    assert numerical_rank(spectrum(sparse)) == int(torch.linalg.matrix_rank(sparse.delta(torch.zeros(shape))))


def test_numerical_rank():
    s = torch.tensor([1.0, 0.5, 1e-3, 1e-9])
    assert [numerical_rank(s), numerical_rank(s, 0.01), numerical_rank(s, 0.5)] == [3, 2, 1]
    assert numerical_rank(torch.zeros(4)) == 0


@pytest.mark.parametrize(
    ("Z", "said"),
    [
        (torch.zeros(3), r"embeddings are \(3,\); expected \(samples, numbers a sample\)"),
        (torch.zeros(0, 4), r"embeddings are \(0, 4\)"),
        (torch.full((2, 2), torch.nan), "not finite"),
    ],
)
def test_mistakes(Z, said):
    with pytest.raises(IntarsiaError, match=said):
        rankme_of(Z)
