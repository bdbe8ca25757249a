"""The nested form: in each optimizer step only the first b of r ranks act, b drawn for the whole adapter.

The draws follow from the step and a seed alone, so that a resumed run, all layers, and every process of several draw the same b. What
does not act is multiplied by 0, not cut off: shapes stay. Mixed into a method that has ``rank``, ``lowest``, ``unit``, ``decay`` and ``seed``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from intarsia.method import Start
from intarsia.support import draw

FINE = 2**24  # equal chances that a drawn number is one of


class Nested:
    """State, besides the trained tensors: ``step``, of which ``drawn``, this step's b, follows."""

    rank: int
    lowest: int  # that is drawn
    unit: int  # ranks are multiples of this
    decay: float  # how likely a rank is beside the one below it
    seed: int
    name: ClassVar[str]

    def ranks(self) -> range:
        """All that may be drawn."""
        return range(-(-self.lowest // self.unit) * self.unit, self.rank + 1, self.unit)

    def nested(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state at step 0."""
        step = torch.zeros((), dtype=torch.int64, device=next(iter(state.values())).device)
        return state | {"step": step, "drawn": self._draw(step)}

    def _draw(self, step: Tensor) -> Tensor:
        chances = torch.tensor([self.decay**number for number in range(len(self.ranks()))], dtype=torch.float64)
        key = torch.tensor([Start.at(self.name, self.seed).key % 2**32], device=step.device)
        at = draw(key, step, FINE)[0] / FINE
        number = (at >= (chances.cumsum(0) / chances.sum())[:-1].to(step.device)).sum()
        return self.ranks().start + self.unit * number

    def acting(self, p: Any) -> Tensor:
        """Which of the r ranks act in this step. (r,)"""
        return torch.arange(self.rank, device=p.drawn.device) < p.drawn  # type: ignore[no-any-return]

    def newest(self, p: Any) -> Tensor:
        """Of those the last ``unit``. (r,)"""
        return self.acting(p) & (torch.arange(self.rank, device=p.drawn.device) >= p.drawn - self.unit)  # type: ignore[no-any-return]

    def next_draw(self, p: Any) -> None:
        """For ``after_step``."""
        p.step.add_(1)
        p.drawn.copy_(self._draw(p.step))
