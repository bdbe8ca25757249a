"""Importance: how much a loss feels a change, smoothed over the steps, and the budget that is dealt out by it.

Sensitivity times uncertainty is that of AdaLoRA (Zhang et al. 2023, arXiv:2303.10512, section 3.2), as is the cubic fall of a budget.
"""

from __future__ import annotations

from torch import Tensor


def smooth(importance: Tensor, spread: Tensor, now: Tensor, kept: float) -> None:
    """Take this step's sensitivity in, in place: its running mean, and that of its distance from the mean. One shape for all three.

    ``kept``: how much of the means stays, in [0, 1). What is not finite counts as 0.
    """
    now = now.nan_to_num(0.0, posinf=0.0)
    importance.lerp_(now, 1 - kept)
    spread.lerp_((now - importance).abs(), 1 - kept)


def falling(step: int, first: float, last: float, start: float, target: float) -> int:
    """A budget after a step: ``start`` up to the step ``first``, ``target`` from ``last`` on, a cubic between them."""
    t = min(1.0, max(0.0, (step - first) / (last - first))) if last > first else float(step > first)
    return round(target + (start - target) * (1 - t) ** 3)
