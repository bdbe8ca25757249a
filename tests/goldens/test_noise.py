"""Random numbers by their place are part of the adapter format: they are pinned, and written out a second time here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.support import combination, noise
from intarsia.support.noise import _BLOCK

KEYS = st.integers(0, 2**63 - 1)
MASK = 2**32 - 1


def _key(key: int) -> torch.Tensor:
    return torch.tensor(key)


def _hash(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD & MASK
    x ^= x >> 15
    x = x * 0x735A2D97 & MASK
    return x ^ x >> 15


def _by_hand(key: int, stream: int, i: int, j: int) -> float:
    """One entry once more, with Python's integers."""
    a = _hash(_hash(_hash(key & MASK ^ 0x9E3779B9) ^ key >> 32) ^ stream)
    b = _hash(a ^ 0x9E3779B9)
    h = _hash(_hash(i ^ a) ^ _hash(j ^ b))
    return ((h >> 8) - (2**24 if h >= 2**31 else 0)) / 2**23


@pytest.mark.parametrize(
    ("key", "stream", "at", "expected"),
    [
        (0, 0, (0, 0), [2695425, -491671, -7335255, -611701]),
        (1, 2, (0, 0), [-1990553, -7584951, 5570584, 3123170]),
        (2**62 + 12345, 1, (1000, 2**20), [-6984210, 2909988, 5682983, -2068759]),
        (2934556070423041679, 0, (8191, 11007), [4496162, 191880, 4409549, -6700001]),
    ],
)
def test_the_numbers_of_the_format(key, stream, at, expected):
    """A change here makes seeded adapters mean other weights: it needs a new format, not new numbers in this test."""
    i, j = at
    assert noise(_key(key), stream, (i, i + 1), (j, j + 4))[0].mul(2**23).int().tolist() == expected


@given(key=KEYS, stream=st.integers(0, 7), i=st.integers(0, 2**30), j=st.integers(0, 2**30))
def test_equals_the_numbers_by_hand(key, stream, i, j):
    found = noise(_key(key), stream, (i, i + 2), (j, j + 3))
    assert found.tolist() == [[_by_hand(key, stream, i + a, j + b) for b in range(3)] for a in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_block_is_that_of_the_whole(dtype):
    whole = noise(_key(5), 1, (0, 300), (0, 200), dtype)
    assert whole.dtype == dtype
    assert torch.equal(noise(_key(5), 1, (17, 230), (41, 42), dtype), whole[17:230, 41:42])
    assert torch.equal(whole.double(), noise(_key(5), 1, (0, 300), (0, 200), torch.float64))


def test_they_are_uniform_and_unrelated():
    """By value, to their neighbours, and to those of another key and another stream."""
    one = noise(_key(1), 0, (0, 500), (0, 400), torch.float64)
    counts = torch.histc(one, 20, -1, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 43.8  # chi-square of 19 degrees, 0.1 %
    others = {
        "below": (one[:-1], one[1:]),
        "beside": (one[:, :-1], one[:, 1:]),
        "another key": (one, noise(_key(2), 0, (0, 500), (0, 400), torch.float64)),
        "another stream": (one, noise(_key(1), 1, (0, 500), (0, 400), torch.float64)),
        "the key's other half": (one, noise(_key(1 << 32), 0, (0, 500), (0, 400), torch.float64)),
        "transposed": (one[:400, :400], one[:400, :400].mT),
    }
    for what, (first, second) in others.items():
        assert abs(float(torch.corrcoef(torch.stack([first.reshape(-1), second.reshape(-1)]))[0, 1])) < 0.01, what


def test_a_square_of_them_has_the_singular_values_of_chance():
    """Of n x n numbers of variance 1/3 the largest is near 2 sqrt(n / 3), as for any independent ones, and the rank is full."""
    values = torch.linalg.svdvals(noise(_key(3), 0, (0, 300), (0, 300), torch.float64))
    assert 0.95 < float(values[0]) / (2 * 100**0.5) < 1.02
    assert float(values[-1]) > 1e-4


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 7), (3, _BLOCK // 2), (2, _BLOCK + 5)])
def test_a_combination_and_its_gradient_are_those_of_the_whole_basis(count, size):
    c = torch.randn(count, dtype=torch.float64).requires_grad_()
    basis = noise(_key(9), 2, (0, count), (0, size), torch.float64) / count**0.5
    g = torch.randn(size, dtype=torch.float64)
    found = combination(c, _key(9), 2, size)
    torch.testing.assert_close(found, c @ basis, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(found, c, g)
    torch.testing.assert_close(gradient, basis @ g, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=20)
@given(key=KEYS)
def test_chance_of_torch_is_neither_read_nor_moved(key):
    state = torch.get_rng_state()
    first = noise(_key(key), 0, (0, 3), (0, 3))
    torch.manual_seed(key % 1000)
    assert torch.equal(noise(_key(key), 0, (0, 3), (0, 3)), first)
    torch.set_rng_state(state)
    combination(torch.ones(3, requires_grad=True), _key(key), 0, 4).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_derivative_is_refused():
    c = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(combination(c, _key(0), 0, 4).square().sum(), c, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
