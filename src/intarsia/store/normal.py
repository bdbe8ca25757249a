"""Numbers in 1, 2, 4 or 8 bits: the k-medians of a standard normal, moved and stretched.    w = mu + sd * q_i

Jie, Wang & Deng 2023, "Revisiting the parameter efficiency of adapters from the perspective of precision redundancy", sec. 3.2. The
2^b levels q are those with the least mean |x - q| over a standard normal x, so each is the median of what is nearest to it:

    Phi(q_i) = (Phi(t_{i-1}) + Phi(t_i)) / 2,    t_i = (q_i + q_{i+1}) / 2,    Phi(t_{-1}) = 0, Phi(t_{2^b - 1}) = 1

The authors go 500 times from levels to bounds and back; here the equations are solved by Newton's method, which ends where they would.
The table is part of the file format: levels are rounded to multiples of 2^-16, so that every machine has the very same.
Deviation: a matrix is divided by sd, not by sd + 1e-5, which would be a tenth of the sd of many a sparse change.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BITS = (1, 2, 4, 8)
STEP = 2.0**-16  # of the levels in the table


@functools.cache
def levels(bits: int) -> NDArray[np.float32]:
    """The 2^b levels, ascending and symmetric. -> (2^b,) float32, not to be written to."""
    count = 1 << bits
    # Points for the least mean |error| lie as the root of the density does: a normal of twice the variance.
    start = NormalDist(0, math.sqrt(2))
    q = np.array([start.inv_cdf((i + 0.5) / count) for i in range(count)])
    wrong = _unfair(q)
    for _ in range(60):
        t = (q[:-1] + q[1:]) / 2
        side = -_density(t) / 2
        slope = np.diag(2 * _density(q)) + np.diag(side, 1) + np.diag(side, -1)
        slope += np.diag(np.append(side, 0) + np.insert(side, 0, 0))
        step, share = np.linalg.solve(slope, wrong), 1.0
        # The tails are nearly flat, where a whole step may leave the order.
        while share > 1e-6 and not (np.diff(q - share * step) > 0).all():
            share /= 2
        q = q - share * step
        wrong = _unfair(q)
        if np.abs(step).max() < STEP / 1e6:
            break
    table: NDArray[np.float32] = (np.round((q - q[::-1]) / 2 / STEP) * STEP).astype(np.float32)
    table.flags.writeable = False
    return table


@dataclass(frozen=True)
class Code:
    """How a tensor's numbers are told apart: ``mu`` + ``sd`` * one of 2^``bits`` levels, in float32."""

    bits: int
    mu: float
    sd: float

    @classmethod
    def of(cls, tensor: Tensor, bits: int) -> Code:
        """With the tensor's own mean and standard deviation (unbiased; 0 for fewer than two numbers)."""
        wide = tensor.detach().double()
        sd = float(wide.std().float()) if wide.numel() > 1 else 0.0
        return cls(bits, float(wide.mean().float()) if wide.numel() else 0.0, sd)

    @property
    def table(self) -> NDArray[np.float32]:
        """The 2^b numbers that it can say. -> (2^b,) float32."""
        # Two roundings, product and sum, and never a fused one: the same bits on every machine.
        return levels(self.bits) * np.float32(self.sd) + np.float32(self.mu)

    def nearest(self, tensor: Tensor) -> NDArray[np.int64]:
        """Which level is nearest to each number. -> (n,), 0..2^b - 1."""
        x = (tensor.detach().double().reshape(-1).numpy() - self.mu) / (self.sd or 1.0)
        q = levels(self.bits).astype(np.float64)
        return np.searchsorted((q[:-1] + q[1:]) / 2, x, side="left")

    def rounded(self, tensor: Tensor) -> Tensor:
        """The tensor in this code, float32 (float64 for float64). -> the same shape."""
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return torch.from_numpy(self.table[self.nearest(tensor)]).view(tensor.shape).to(dtype)


def _unfair(q: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 Phi(q) less the bounds' on both sides: 0 where each level is the median of what is nearest to it."""
    bounds = np.concatenate([[0.0], _cdf((q[:-1] + q[1:]) / 2), [1.0]])
    unfair: NDArray[np.float64] = 2 * _cdf(q) - bounds[:-1] - bounds[1:]
    return unfair


def _cdf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([math.erfc(-each / math.sqrt(2)) / 2 for each in x])


def _density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([math.exp(-each * each / 2) / math.sqrt(2 * math.pi) for each in x])
