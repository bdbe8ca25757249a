"""The mixture form: an insert whose function chooses, for each token, a few of its experts.    y' = y + s g(v),  g = sum of gate_i e_i

It owns what is the same whatever an expert is: the choice is made once a forward, how often each expert was chosen travels on the
gradient of ``b``, and ``b`` moves before the next step. What an expert is, and how a gate is made of logits, says the function.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from intarsia.edits import Routing
from intarsia.forms.carry import carried, carry
from intarsia.forms.insert import Insert
from intarsia.method import Below


class Mixture(Insert):
    """State: the function's tensors, of which ``b`` (N,) is one.

    Balanced without a loss: b_i <- b_i + speed sign(k / N - c_i), c_i the share of the tokens since the last step that chose i.
    """

    place = "parallel"
    speed: float

    @abstractmethod
    def inserted(self, p: Any) -> Routing:
        """g, of the tensors of p."""

    def forward(self, p: Any, x: Tensor, below: Below) -> Tensor:
        function = self.inserted(p)
        gates, which = function.route(x)
        y = below(x) + self.scale * function.mixed(x, gates, which)
        return carry(y, p.b, lambda gy: _wanting(which, len(p.b))) if p.training else y

    def carriers(self) -> frozenset[str]:
        return frozenset({"b"})

    def stays_wide(self) -> frozenset[str]:
        return frozenset({"b"})

    def before_step(self, p: Any) -> None:
        wanting = carried(p.b)
        if wanting is not None:
            p.b.add_(self.speed * wanting.sign())


def _wanting(which: Tensor, experts: int) -> Tensor:
    """How many tokens each expert falls short of an even share, times N: whole numbers, so that any sum of them has the right sign.

    (..., k) -> (N,).
    """
    flat = which.flatten()
    counts = torch.zeros(experts, dtype=flat.dtype, device=flat.device).scatter_add(0, flat, torch.ones_like(flat))
    return flat.numel() - experts * counts
