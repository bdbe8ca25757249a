"""Thresholds that make small numbers exactly 0, and how their height may grow over the stages of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def soft(x: Tensor, t: Tensor | float) -> Tensor:
    """sign(x) max(|x| - t, 0): the proximal step of t ||x||_1."""
    return x.sign() * (x.abs() - t).clamp_min(0)


def soft_in_turns(x: Tensor, t: Tensor | float) -> Tensor:
    """The three lines of SoRA's authors, one after another: x - t above t, x + t below -t, then 0 where |x| < t; so what was up to 2 t is 0."""
    x = torch.where(x > t, x - t, x)
    x = torch.where(x < -t, x + t, x)
    return torch.where(x.abs() < t, torch.zeros_like(x), x)


Height = Callable[[float, float, float], float]
HEIGHTS: dict[str, Height] = {  # from first to last, by the share t of the way
    "linear": lambda first, last, t: first + t * (last - first),
    "log_linear": lambda first, last, t: math.log(math.exp(first) + t * (math.exp(last) - math.exp(first))),
    "exp_linear": lambda first, last, t: math.exp(math.log(first) + t * (math.log(last) - math.log(first))),
}
