"""The fixed transforms against their matrices, and the Hadamard matrices against their definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import intarsia as ia
from intarsia.edits import TRANSFORMS, LowRank, Transformed, elements
from intarsia.edits.transforms import matrix, sizes

NAMES = sorted(TRANSFORMS)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _matrix(name: str, n: int) -> Tensor:
    """T (P, n), by the transform of every unit vector."""
    return TRANSFORMS[name].forward(torch.eye(n, dtype=torch.float64)).T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [8, 12, 24, 36])
def test_forward_and_back_are_one_matrix_and_its_transpose(name, n):
    transform, T, x = TRANSFORMS[name], _matrix(name, n), _random(2, 3, n)
    assert T.shape == (transform.size(n), n)
    torch.testing.assert_close(transform.forward(x), x @ T.T, rtol=0, atol=1e-13)
    c = _random(2, 3, len(T), seed=1)
    torch.testing.assert_close(transform.back(c, n), c @ T, rtol=0, atol=1e-13)
    torch.testing.assert_close(T @ T.T, torch.eye(len(T), dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [7, 8])
def test_a_whole_wavelet_transform_comes_back_of_odd_lengths_too(n):
    x, haar = _random(3, n), TRANSFORMS["haar"]
    assert haar.forward(x).shape == (3, 8)
    torch.testing.assert_close(haar.back(haar.forward(x), n), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(haar.forward(x).norm(), x.norm(), rtol=0, atol=1e-13)
    low, high = (TRANSFORMS[f"haar-{band}"].forward(x) for band in ("low", "high"))
    assert torch.equal(torch.cat([low, high], dim=1), haar.forward(x))
    for i in range(n // 2):
        torch.testing.assert_close(low[:, i], (x[:, 2 * i] + x[:, 2 * i + 1]) / math.sqrt(2), rtol=0, atol=1e-13)
        torch.testing.assert_close(high[:, i], (x[:, 2 * i] - x[:, 2 * i + 1]) / math.sqrt(2), rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 52, 60, 76, 80, 100, 108, 140, 148, 576, 1536])
def test_a_hadamard_matrix_is_of_ones_with_orthogonal_rows_and_columns(n):
    H = matrix(n)
    assert torch.equal(H.abs(), torch.ones_like(H))
    assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))
    assert math.prod(sizes(n)) == n
    x = _random(2, n)
    torch.testing.assert_close(TRANSFORMS["hadamard"].forward(x), x @ H / n**0.5, rtol=0, atol=1e-12)


def test_powers_of_two_are_sylvesters():
    two = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    expected = two
    for _ in range(6):
        expected = torch.kron(expected, two)
    assert torch.equal(matrix(128), expected)


@pytest.mark.parametrize("n", [3, 6, 92, 116, 156, 172, 11008])
def test_a_size_without_one_is_told(n):
    with pytest.raises(ia.IntarsiaError, match=f"no Hadamard matrix of size {n} is known here"):
        sizes(n)


@pytest.mark.parametrize(
    "pairs", [(("haar", "hadamard"),), (("identity", "haar"),), (("haar-low", "haar-high"), ("haar-high", "haar-low"))]
)
@pytest.mark.parametrize("inner", ["low rank", "elements"])
def test_the_edit_is_the_product_of_its_matrices(pairs, inner):
    O, I = 10, 12
    P, Q = (len(_matrix(name, n)) for name, n in zip(pairs[0], (O, I), strict=True))
    C = LowRank((P, Q), _random(P, 2), _random(2, Q, seed=1), 0.5) if inner == "low rank" else elements(
        (P, Q), torch.tensor([1, 7, 20]), _random(3)
    )  # fmt: skip
    edit, zero = Transformed((O, I), C, pairs, -2.0), torch.zeros(O, I, dtype=torch.float64)
    whole = C.delta(torch.zeros(P, Q, dtype=torch.float64))
    expected: Any = -2 * sum(_matrix(out, O).T @ whole @ _matrix(into, I) for out, into in pairs)
    torch.testing.assert_close(edit.delta(zero), expected, rtol=0, atol=1e-12)
    x = _random(3, 2, I, seed=2)
    torch.testing.assert_close(edit.times(x), x @ expected.T, rtol=0, atol=1e-12)
    low = edit.low_rank()
    assert (low is None) == (inner == "elements")
    if low is not None:
        torch.testing.assert_close(low.delta(zero), expected, rtol=0, atol=1e-12)
        assert low.A.shape[0] == 2 * len(pairs)


def test_a_file_that_makes_no_sense_is_refused():
    low = LowRank((4, 4), _random(4, 1), _random(1, 4), 1.0)
    edit = Transformed((8, 8), low, (("haar-low", "haar-low"),))
    facts = edit.facts() | {"type": "transformed"}
    assert Transformed.build((8, 8), edit.tensors(), facts).pairs == edit.pairs
    for wrong, why in (
        ({"pairs": [["haar-lo", "haar-low"]]}, "unknown transform 'haar-lo'; did you mean 'haar-low'"),
        ({"pairs": []}, "expected a list of"),
        ({"pairs": [["haar-low", "haar-low"], ["haar", "haar-low"]]}, "coefficients of different shapes"),
        ({"pairs": [["haar", "haar"]]}, "do not multiply to"),
        ({"scale": float("nan")}, "expected a finite number"),
        ({"inner": None}, "needs an inner edit"),
        ({"inner": {"type": "rescaled", "inner": {"type": "low_rank", "scale": 1.0}}}, "needs a magnitude"),
    ):
        with pytest.raises(ia.IntarsiaError, match=why):
            Transformed.build((8, 8), edit.tensors(), facts | wrong)
    with pytest.raises(ia.IntarsiaError, match="no Hadamard matrix of size 6"):
        Transformed.build((8, 6), edit.tensors(), facts | {"pairs": [["identity", "hadamard"]]})
