"""The matrix nuclear-norm and the entropy beside it, against numbers by hand and torch's own decomposition."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.analyze import hidden_states, matrix_entropy, matrix_nuclear_norm
from intarsia.errors import IntarsiaError


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(H: torch.Tensor) -> torch.Tensor:
    """Centred, rows of length 1: written down once more."""
    C = H.double() - H.double().mean(0)
    rows: torch.Tensor = C / C.norm(dim=1, keepdim=True)
    return rows


def test_two_tokens_by_hand():
    # Mean (2, 2); centred rows (-1, 2), (1, -2); normalised (-1, 2) / sqrt 5 and its opposite; columns of length
    # sqrt(2/5) and sqrt(8/5), that is 3 sqrt(2/5) together, over two tokens.
    assert matrix_nuclear_norm(torch.tensor([[1.0, 4.0], [3.0, 0.0]])) == pytest.approx(1.5 * math.sqrt(2 / 5))


def test_the_largest_columns_are_taken():
    H = some(0, 3, 10)
    lengths = prepared(H).norm(dim=0).sort(descending=True).values
    assert matrix_nuclear_norm(H) == pytest.approx(float(lengths[:3].sum()) / 3, rel=1e-5)
    assert matrix_nuclear_norm(H, columns=5) == pytest.approx(float(lengths[:5].sum()) / 3, rel=1e-5)
    tall = some(1, 20, 4)
    assert matrix_nuclear_norm(tall) == pytest.approx(float(prepared(tall).norm(dim=0).sum()) / 20, rel=1e-5)


@given(st.integers(0, 100), st.integers(2, 12), st.integers(2, 12))
def test_over_all_columns_it_is_never_below_the_nuclear_norm(seed, L, d):
    H = some(seed, L, d)
    nuclear = float(torch.linalg.matrix_norm(prepared(H), "nuc"))
    assert L * matrix_nuclear_norm(H, columns=d) >= nuclear - 1e-5


def test_it_is_the_nuclear_norm_where_columns_are_orthogonal():
    # Rows of length 1 whose columns are orthogonal and sum to zero: the four corners of a square.
    H = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert 4 * matrix_nuclear_norm(H) == pytest.approx(float(torch.linalg.matrix_norm(prepared(H), "nuc")))


@given(st.integers(0, 50))
def test_order_and_length_of_tokens(seed):
    H = some(seed, 7, 5)
    found = matrix_nuclear_norm(H)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert matrix_nuclear_norm(H[order]) == pytest.approx(found, rel=1e-4)
    centred = H - H.mean(0)
    assert matrix_nuclear_norm(centred) == pytest.approx(found, rel=1e-4)


def test_what_centring_leaves_nothing_of():
    assert matrix_nuclear_norm(some(0, 1, 6)) == 0.0
    assert matrix_nuclear_norm(some(0, 1, 6).expand(4, 6) * 1e3) == 0.0, "rounding of the mean is no direction"
    assert matrix_entropy(torch.zeros(3, 4)) == 0.0


def test_entropy():
    Z = some(0, 9, 5).double()
    Z = Z / Z.norm(dim=1, keepdim=True)
    e = torch.linalg.svdvals(Z).square()
    e = e / e.sum()
    assert matrix_entropy(some(0, 9, 5)) == pytest.approx(float(-(e * e.log()).sum()) / math.log(5), rel=1e-5)
    assert matrix_entropy(torch.eye(6)) == pytest.approx(1.0)
    assert matrix_entropy(torch.ones(8, 3)) == pytest.approx(0.0, abs=1e-9)
    wide = some(2, 4, 30)
    assert matrix_entropy(wide) <= math.log(4) / math.log(30) + 1e-9


def test_it_is_an_order_of_magnitude_quicker_than_the_entropy():
    H = some(0, 768, 1024)

    def least(measure, times: int) -> float:
        took = []
        for _ in range(times):
            start = time.perf_counter()
            measure(H)
            took.append(time.perf_counter() - start)
        return min(took)

    assert least(matrix_nuclear_norm, 5) * 10 < least(matrix_entropy, 2)


@pytest.mark.parametrize("H", [torch.zeros(3), torch.zeros(0, 4), torch.full((2, 2), torch.inf)])
def test_mistakes(H):
    with pytest.raises(IntarsiaError, match="hidden states"):
        matrix_nuclear_norm(H)
    with pytest.raises(IntarsiaError, match="columns=9; expected 1 to 2"):
        matrix_nuclear_norm(torch.eye(2), columns=9)
    with pytest.raises(IntarsiaError, match="width of 2"):
        matrix_entropy(torch.ones(3, 1))


def test_hidden_states_of_texts_without_padding(tiny_llama):
    model = tiny_llama().train()
    ids = torch.randint(1, 320, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = list(hidden_states(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}]))
    assert [tuple(H.shape) for H in found] == [(9, 64), (5, 64)]
    assert model.training
    model.eval()
    expected = model.model(input_ids=ids[:1]).last_hidden_state[0]
    torch.testing.assert_close(found[0], expected)
    with pytest.raises(IntarsiaError, match="_Plain does not tell its hidden states"):
        list(hidden_states(_Plain(4, 4), [{"input": torch.ones(1, 4)}]))


class _Plain(torch.nn.Linear):
    def forward(self, input: torch.Tensor, output_hidden_states: bool = False) -> torch.Tensor:
        return super().forward(input)
