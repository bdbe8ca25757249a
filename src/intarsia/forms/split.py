"""The split form: trained tensors whose entries belong to disjoint experts, one of which is trained a step.    P = P0 + 1/E sum_i M_i (P_i - P0)

As the masks M_i do not meet, all experts of a tensor P are one tensor of its shape, and each one's own is that tensor inside its
mask, P0 outside. Mixed into a method that has ``experts``; the draws come from the state alone, so that a resumed run, and every
process of several, draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.method import Start
from intarsia.support import draw, permute


class Split:
    """State, besides the trained tensors: for each one that is split ``<name>0``, its values at the start, and ``expert_<name>``,
    the expert of each entry; ``key`` and ``step``, of which ``drawn`` follows, this step's expert for each trained tensor."""

    experts: int

    def split(self, state: dict[str, Tensor], names: Sequence[str], start: Start) -> dict[str, Tensor]:
        """The state with its ``names`` split; sizes of the experts differ by one at most."""
        device = state[names[0]].device
        key = torch.tensor([Start.at(name, start.key).key % 2**32 for name in state], device=device)
        step = torch.zeros((), dtype=torch.int64, device=device)
        more = {"key": key, "step": step, "drawn": draw(key, step, self.experts)}
        for name, seed in zip(state, key.tolist(), strict=True):
            if name in names:
                n = state[name].numel()
                expert = permute(torch.arange(n), n, seed) * self.experts // n
                more[f"{name}0"] = state[name].detach().clone()
                more[f"expert_{name}"] = expert.to(device, torch.uint8).view(state[name].shape)
        return state | more

    def after_step(self, p: Any, lr: float) -> None:
        p.step.add_(1)
        p.drawn.copy_(draw(p.key, p.step, self.experts))

    def merged(self, p: Any, names: Sequence[str]) -> list[Tensor]:
        """The tensors with all experts merged into them."""
        return [self._merged(getattr(p, name), getattr(p, f"{name}0", None)) for name in names]

    def _merged(self, P: Tensor, P0: Tensor | None) -> Tensor:
        return P if P0 is None or self.experts == 1 else P0 + (P - P0) / self.experts

    def now(self, p: Any, names: Sequence[str]) -> list[Tensor]:
        """The trained tensors, all of them in order, as they act now: in training those of the drawn experts, otherwise merged."""
        if not p.training:
            return self.merged(p, names)
        return [
            torch.where(getattr(p, f"expert_{name}") == p.drawn[number], getattr(p, name), getattr(p, f"{name}0"))
            if hasattr(p, f"{name}0")
            else getattr(p, name)
            for number, name in enumerate(names)
        ]
