"""A weight with 64 directions of its own, and a change that brings in one more: what tests of intruder dimensions work on."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.edits import LowRank

N = 64


def base_of_distinct_values() -> Tensor:
    """(64, 64), diagonal: its singular vectors are the axes."""
    return torch.diag(torch.linspace(3, 1, N))


def planted(size: float) -> LowRank:
    """size * u v^T with u = v = ones / 8: of length 1, and as far from every axis as a direction can be."""
    u = torch.ones(N, 1) / 8
    return LowRank((N, N), u, u.mT.contiguous(), size)
