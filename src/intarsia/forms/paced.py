"""The paced form: parts of trained tensors take a step of their own size, or none.    P <- P0 + pace * (P - P0)

An optimizer has one learning rate for a tensor, and its moments and weight decay move also what has no gradient. Here the tensors are kept
aside before a step (P0), and after it each part is put where its pace takes it: at 0 it stays to the bit, at 1 it is where the optimizer
has put it. Mixed into a method; static shapes, so that compiled code, checkpoints and DDP know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Paced:
    """State, besides the trained tensors: ``kept_<name>`` for each that is paced, its values before the optimizer's step."""

    def paces(self, p: Any) -> Mapping[str, Tensor]:
        """How far each part goes, from 0 to 1, by tensor; shaped so that it can be multiplied with it."""
        raise NotImplementedError

    def kept(self, state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """The state with room for the values of these tensors."""
        return {**state, **{f"kept_{name}": state[name].detach().clone() for name in names}}

    def before_step(self, p: Any) -> None:
        for name in self.paces(p):
            getattr(p, f"kept_{name}").copy_(getattr(p, name))

    def after_step(self, p: Any, lr: float) -> None:
        for name, pace in self.paces(p).items():
            P, before = getattr(p, name), getattr(p, f"kept_{name}")
            P.copy_(torch.lerp(before, P, pace.to(P.dtype).expand_as(P)))
