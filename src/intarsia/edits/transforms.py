"""Fixed orthogonal transforms by name, along the last axis, without their matrices.    c = T x,  T^T T = 1

T (P, n) is what stands in the docstrings; P = n for most. None has a number of its own, so a file needs their names alone.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import IntarsiaError


class Transform(ABC):
    """One transform of any length: T x, T^T c, and how long c is."""

    def size(self, n: int) -> int:
        """P, how many coefficients n numbers have. Raises IntarsiaError for a length that has no such transform."""
        return n

    def isometric(self, n: int) -> bool:
        """Whether T T^T = 1 too, so that T^T c is as long as c."""
        return self.size(n) == n

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """T x. (..., n) -> (..., P)."""

    @abstractmethod
    def back(self, c: Tensor, n: int) -> Tensor:
        """T^T c. (..., P) -> (..., n)."""


class Identity(Transform):
    """T = 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def back(self, c: Tensor, n: int) -> Tensor:
        return c


@dataclass(frozen=True)
class Haar(Transform):
    """One level of the Haar wavelet, or one of its bands: low (x_2i + x_2i+1) / sqrt 2, high (x_2i - x_2i+1) / sqrt 2.

    An odd length is filled up with one 0, so that it has a coefficient more.
    """

    bands: tuple[float, ...] = (1.0, -1.0)  # the sign in each band

    def size(self, n: int) -> int:
        return (n + 1) // 2 * len(self.bands)

    def isometric(self, n: int) -> bool:
        return n % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        pairs = F.pad(x, (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2))
        first, second = pairs.unbind(-1)
        return torch.cat([first + sign * second for sign in self.bands], dim=-1) * math.sqrt(0.5)

    def back(self, c: Tensor, n: int) -> Tensor:
        bands = c.chunk(len(self.bands), dim=-1)
        second = [sign * band for sign, band in zip(self.bands, bands, strict=True)]
        pairs = torch.stack([sum(bands[1:], bands[0]), sum(second[1:], second[0])], dim=-1) * math.sqrt(0.5)
        return pairs.flatten(-2)[..., :n]


class Hadamard(Transform):
    """T = H^T / sqrt n, H of +-1 with H H^T = n: Sylvester's for powers of two, else the product of Kronecker of Paley's and his.

    n = K 2^k, with K = 1 or the smallest of 4, 8, ... times the odd part of n for which K - 1 or K / 2 - 1 makes a
    construction of Paley's: 12, 20, 28, 36, 44, 52, 60, 68, 76, ... up to 256. O(n (K + 32)) a row and no matrix of n x n.
    """

    def size(self, n: int) -> int:
        sizes(n)
        return n

    def forward(self, x: Tensor) -> Tensor:
        return self._times(x, False)

    def back(self, c: Tensor, n: int) -> Tensor:
        return self._times(c, True)

    def _times(self, x: Tensor, transposed: bool) -> Tensor:
        shape = x.shape
        for H in _factors(shape[-1]):
            H = (H.mT if transposed else H).to(x)
            # The foremost factor acts and goes to the back: after all of them everything stands where it was.
            x = (x.reshape(*shape[:-1], len(H), -1).mT @ H).flatten(-2)
        found: Tensor = x * shape[-1] ** -0.5
        return found


TRANSFORMS: dict[str, Transform] = {
    "identity": Identity(),
    "haar": Haar(),
    "haar-low": Haar((1.0,)),
    "haar-high": Haar((-1.0,)),
    "hadamard": Hadamard(),
}


# ------------------------------------------------------------------ Hadamard matrices
LARGEST = 256  # K, whose matrix is multiplied with as a whole


@functools.cache
def sizes(n: int) -> tuple[int, ...]:
    """The sizes of the Hadamard matrices whose product of Kronecker is that of size n.

    Raises:
        IntarsiaError: where none is known here.
    """
    odd = n // (n & -n) if n > 0 else 0
    whole = [odd << k for k in range(2, LARGEST.bit_length()) if (odd << k) <= min(n, LARGEST)]
    K = next(filter(_paley, whole), 0) if odd > 1 else 1
    if n < 1 or not K:
        raise IntarsiaError(
            f"no Hadamard matrix of size {n} is known here; known are the sizes K * 2^k, K of 1, 12, 20, 28, 36, 44, 52, ... by "
            "Paley's constructions. Exclude the layer"
        )
    power, found = (n // K).bit_length() - 1, [K] if K > 1 else []
    while power:  # Sylvester's, in pieces of up to 32
        found.append(1 << min(power, 5))
        power -= min(power, 5)
    return tuple(found)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # or Dynamo would look behind the caches
def _factors(n: int) -> list[Tensor]:
    return [_matrix(size) for size in sizes(n)]


def matrix(n: int) -> Tensor:
    """H (n, n), float64. Raises IntarsiaError for a size without one."""
    H = torch.ones(1, 1, dtype=torch.float64)
    for factor in _factors(n):
        H = torch.kron(H, factor)
    return H


def _paley(K: int) -> int:
    """1 or 2 where that construction of Paley's makes a matrix of size K: q + 1 or 2 (q + 1), q a prime or its square; else 0."""
    if K % 4 == 0 and (K - 1) % 4 == 3 and _root(K - 1):
        return 1
    return 2 if K % 4 == 0 and (K // 2 - 1) % 4 == 1 and _root(K // 2 - 1) else 0


def _root(q: int) -> int:
    """The prime p with q = p or p^2; 0: there is none."""
    for p in (q, math.isqrt(q)):
        if p > 2 and q in (p, p * p) and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p
    return 0


@functools.cache
def _matrix(K: int) -> Tensor:
    if K & (K - 1) == 0:
        H = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(K.bit_length() - 1):
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        return H
    if _paley(K) == 1:  # 1 + S, S = [[0, 1], [-1, Q]], Q antisymmetric
        H = torch.ones(K, K, dtype=torch.float64)
        H[1:, 0], H[1:, 1:] = -1, _jacobsthal(K - 1) + torch.eye(K - 1, dtype=torch.float64)
        return H
    C = torch.ones(K // 2, K // 2, dtype=torch.float64)  # [[0, 1], [1, Q]], Q symmetric
    C[1:, 1:], C[0, 0] = _jacobsthal(K // 2 - 1), 0
    one = torch.eye(K // 2, dtype=torch.float64)
    return torch.kron(C, torch.tensor([[1.0, 1], [1, -1]]).double()) + torch.kron(
        one, torch.tensor([[1.0, -1], [-1, -1]]).double()
    )


def _jacobsthal(q: int) -> Tensor:
    """Q_ij = 1 where a_i - a_j is a square of the field of q elements, -1 where it is none, 0 where it is 0. (q, q)."""
    p = _root(q)
    squares = {x * x % p for x in range(1, p)}
    if q == p:
        chi = torch.tensor([0, *(1 if x in squares else -1 for x in range(1, p))])
        i = torch.arange(p)
        return chi[(i[:, None] - i) % p].double()
    # a + b sqrt g, g no square: it is a square if and only if its norm a^2 - g b^2 is one of the field of p elements.
    g = next(x for x in range(2, p) if x not in squares)
    i = torch.arange(q)
    a, b = ((i[:, None] // p - i // p) % p), ((i[:, None] % p - i % p) % p)
    norm = (a * a - g * b * b) % p
    chi = torch.tensor([0, *(1 if x in squares else -1 for x in range(1, p))])
    return chi[norm].double()
