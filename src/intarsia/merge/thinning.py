"""Which entries of one change are kept, and how what is left is rescaled: pure functions of the numbers. n entries."""

from __future__ import annotations

import torch
from torch import Tensor

RESCALES = ("expectation", "l1", "none")


def ascending(values: Tensor) -> Tensor:
    """The places in the order of their sizes, smallest first; of equal ones the first place counts as the larger. (n,) -> (n,)."""
    order: Tensor = values.abs().flip(0).argsort(stable=True)
    return len(values) - 1 - order


def largest(values: Tensor, density: float) -> Tensor:
    """The share ``density`` that is largest in size, the rest at 0; of a few entries one at least. (n,) -> (n,).

    int(density n) are kept, cut off and not rounded, as in mergekit and PEFT.
    """
    return between(values, density, 0.0, least=1 if density > 0 else 0)


def between(values: Tensor, density: float, gamma: float, least: int = 0) -> Tensor:
    """The share ``density`` that comes after the largest ``gamma``, in size; the rest at 0. (n,) -> (n,).

    Where the two come to more than all, fewer of the largest are left out.
    """
    n = len(values)
    if density >= 1 or not n:
        return values
    count = max(least, int(density * n))
    first = max(0, n - count - int(gamma * n))
    at = ascending(values)[first : first + count]
    return torch.zeros_like(values).index_copy(0, at, values[at])


def ranks_in_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Where each entry stands among those of its row by size: 0 the smallest, 1 the largest, 1/2 alone. (n,) -> (n,) float64.

    ``rows`` (n,): the row of each. Of equal ones the first counts as the larger.
    """
    order = ascending(values)
    order = order[rows[order].argsort(stable=True)]  # by row, and within it by size
    _, counts = rows[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    last = (counts - 1).repeat_interleave(counts)
    place = torch.arange(len(values)) - starts
    share = torch.where(last > 0, place.double() / last.clamp_min(1), 0.5)
    return torch.empty(len(values), dtype=torch.float64).index_copy(0, order, share)


def rescaled(kept: Tensor, values: Tensor, probability: Tensor | float, how: str) -> Tensor:
    """What was kept at random, made larger for what was dropped. (n,) -> (n,).

    expectation: each by the inverse of the probability with which it was kept, so that the mean over draws is the whole;
    l1: all by one factor, so that the sizes sum to what they did before.
    """
    if how == "expectation":
        return torch.where(kept == 0, 0, kept / probability).to(values.dtype)
    before, after = values.abs().sum(), kept.abs().sum()
    return kept * (before / after) if how == "l1" and before > 0 and after > 0 else kept
