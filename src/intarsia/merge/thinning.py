"""Which entries of one change are kept: pure functions of the numbers. n entries."""

from __future__ import annotations

import torch
from torch import Tensor


def ascending(values: Tensor) -> Tensor:
    """The order of their sizes, smallest first; of equal ones the first in the row counts as the larger. (n,) -> (n,)."""
    order: Tensor = values.abs().flip(0).argsort(stable=True)
    return len(values) - 1 - order


def largest(values: Tensor, density: float) -> Tensor:
    """The share ``density`` that is largest in size, the rest at 0; of a few entries one at least. (n,) -> (n,).

    int(density n) are kept, cut off and not rounded, as in mergekit and PEFT.
    """
    if density >= 1 or not len(values):
        return values
    count = max(1, int(density * len(values))) if density > 0 else 0
    return kept(values, ascending(values)[len(values) - count :])


def kept(values: Tensor, at: Tensor) -> Tensor:
    """The values at these places, the rest at 0. (n,) -> (n,)."""
    return torch.zeros_like(values).index_copy(0, at, values[at])


def same_length(thinned: Tensor, values: Tensor) -> Tensor:
    """What was kept, multiplied so that its sizes sum to what they did before (mergekit's ``rescale``)."""
    before, after = values.abs().sum(), thinned.abs().sum()
    return thinned * (before / after) if before > 0 and after > 0 else thinned
