"""Importance: how much a loss feels a change, smoothed over the steps, and the budget that is dealt out by it.

Sensitivity times uncertainty is that of AdaLoRA (Zhang et al. 2023, arXiv:2303.10512, section 3.2), as is the cubic fall of a budget.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intarsia.forms.carry import carried, carry
from intarsia.forms.delta import Delta


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


class Sensed(Delta):
    """A delta that knows how much the loss feels it: S = sum |D * G| / sqrt(O I), D the change and G the loss gradient of it, smoothed
    from step to step into I and its uncertainty U. For that D is formed in training. Over several processes S is the mean of theirs.

    State: ``note``, by which S comes from the backward pass; ``importance``, I, and ``spread``, U: () each.
    """

    smoothing: float  # how much of I and U is kept from one step to the next

    def sensed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state with what is needed for that, all 0."""
        zeros = {k: next(iter(state.values())).detach().new_zeros(()) for k in ("importance", "spread")}
        return state | zeros | {"note": nn.Parameter(zeros["spread"].clone())}

    def carriers(self) -> frozenset[str]:
        return frozenset({"note"})

    def stays_wide(self) -> frozenset[str]:
        return frozenset({"note"})

    def branch(self, p: Any, x: Tensor) -> Tensor:
        if not (p.training and torch.is_grad_enabled()):
            return self.quick_branch(p, x)
        D = self.delta(p)
        size, small = D.detach(), D.numel() ** -0.5
        sensed = carry(D, p.note, lambda G: small * (size * G).abs().sum())
        return p.operator.product(x, sensed.to(p.dtype))  # type: ignore[no-any-return]

    def quick_branch(self, p: Any, x: Tensor) -> Tensor:
        """The branch where nothing is sensed."""
        return super().branch(p, x)

    def before_step(self, p: Any) -> None:
        super().before_step(p)
        if (now := carried(p.note)) is not None:
            smooth(p.importance, p.spread, now, self.smoothing)

    def score(self, p: Any) -> float:
        """I * U."""
        return float(p.importance * p.spread)
