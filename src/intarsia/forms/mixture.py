"""The mixture form: an insert whose function chooses, for each token, a few of its experts.    y' = y + s g(v),  g = sum of gate_i e_i

It owns what is the same whatever an expert is: the choice is made once a forward, how often each expert was chosen travels on the
gradient of ``b``, and ``b`` moves before the next step. What an expert is, and how a gate is made of logits, says the function.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from intarsia.edits import Routing
from intarsia.forms.carry import carried, carry
from intarsia.forms.insert import Insert
from intarsia.method import Below


class Mixture(Insert):
    """State: the function's tensors, of which ``b`` (N,) is one.

    Balanced without a loss: b_i <- b_i + speed sign(k / N - c_i), c_i the share that chose i of the tokens since the last step.
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
        return carry(y, p.b, lambda gy: _wanting(which, gy, len(p.b))) if p.training else y

    def carriers(self) -> frozenset[str]:
        return frozenset({"b"})

    def stays_wide(self) -> frozenset[str]:
        return frozenset({"b"})

    def before_step(self, p: Any) -> None:
        wanting = carried(p.b)
        if wanting is not None:
            p.b.add_(self.speed * wanting.sign())


def _wanting(which: Tensor, gy: Tensor, experts: int) -> Tensor:
    """How many tokens each expert falls short of an even share, times N: whole numbers, so that any sum of them has the right sign.

    Tokens on which no loss depends, padding above all, have a gradient of 0 and do not count. which (..., k), gy (..., m) -> (N,).
    """
    counted = (gy != 0).any(-1, keepdim=True).expand_as(which).flatten().to(which.dtype)
    counts = counted.new_zeros(experts).scatter_add(0, which.flatten(), counted)
    return counted.sum() - experts * counts
