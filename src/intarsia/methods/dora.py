"""DoRA: a learned length for every row of W + dW.    W' = m * V / ||V||,  V = W + dW

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 4; by default the norm is a
constant in the backward pass (section 4.3); ``detach_norm=False`` is the full gradient.
Trained: O numbers a weight, and those of the inner method.  m = ||W|| by rows, so W' = W at the start.

The inner method may be any delta: LoRA as in the paper, or SHiRA or PaCA.
"""

from dataclasses import dataclass, replace

from intarsia.edits import row_norms
from intarsia.forms import Delta, Rescale
from intarsia.method import Method, option
from intarsia.methods.lora import Lora
from intarsia.registry import build, register


@register
@dataclass(frozen=True)
class Dora(Rescale):
    inner: Method = option(Lora(), "the method whose update is rescaled: lora, shira, paca with their fields")
    detach_norm: bool = option(True, "take the norm as a constant in the backward pass, as the paper does")

    name, title, paper = "dora", "DoRA", "arXiv:2402.09353"
    formula, trained = "W' = m * V / ||V||,  V = W + dW", "O + inner"
    default_lr = 4e-3
    small = ({"inner": {"name": "lora", "rank": 2}}, {"inner": {"name": "shira", "density": 0.1}, "detach_norm": False},
             {"inner": {"name": "paca", "rank": 2, "parameterization": "columns"}})  # fmt: skip

    def __post_init__(self):
        if not isinstance(self.inner, Method):
            object.__setattr__(self, "inner", build(self.inner))
        self.require(
            isinstance(self.inner, Delta) and not self.inner.reads_weights_below,
            "inner",
            "a method that adds a delta: lora, shira, paca",
        )

    def inside(self):
        return self.inner

    def around(self, inner):
        return replace(self, inner=inner)

    def length(self, V):
        return row_norms(V.detach() if self.detach_norm else V)
