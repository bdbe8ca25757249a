"""SMoRA: every rank of a LoRA is an expert.    y' = y + s B (g * A x),  g: k of r, chosen by W_g x + b

Zhao et al. 2025, "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning", arXiv:2501.15103.
Trained: r (O + I) + r I numbers a layer (``gate="binary"``: r (O + I)), and r of b that move by rule.  B = 0 at the start, so y' = y.

For each token z = W_g x; T, the k largest of z + b, act: g_i = k softmax(z_T)_i there and 0 elsewhere, so that an indifferent router
is a LoRA of k ranks with g = 1. ``gate``: logit (g = z), sigmoid, or binary (g = 1; nothing teaches the router then, it stays as drawn).
Before every step b_i += speed sign(k / r - c_i), c_i the share that chose rank i of the tokens, over accumulated batches and processes, on
which the loss depends: those of padding have a gradient of 0 and do not count.
Decisions, as what we had was a summary of the paper and no code: the gates and their factor k; speed 1e-3, that of loss-free balancing (Wang et
al. 2024, arXiv:2408.15664); alpha / k, not alpha / r, so that what is added does not shrink with the ranks that rest. A and W_g ~ Kaiming uniform
(a = sqrt 5). All r ranks are computed and those not chosen are multiplied by 0: the paper's kernel that skips them is not here, and gathering the
rows of A and columns of B for a single token took longer than that up to r = 64 (CPU, widths 576 to 4096).
The learning rate is LoRA's, which this is where k = r; it was not measured by itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from intarsia.edits import GATES, Routed
from intarsia.forms import Mixture
from intarsia.method import as_parameters, option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Smora(Mixture):
    rank: int = option(64, "ranks r, each an expert")
    active: int = option(8, "ranks k that act at a token")
    alpha: float | None = option(None, "what is added is multiplied by alpha / k; none: 2 k")
    gate: str = option("softmax", "how much a chosen rank counts: " + ", ".join(GATES))
    speed: float = option(1e-3, "step of the balance b, after every optimizer step; 0: no balancing")

    name, title, paper = "smora", "SMoRA", "arXiv:2501.15103"
    formula, trained = "y' = y + s B (g * A x), g: k of r by W_g x + b", "r (O + 2 I)"
    role, cost = "mixture", "r (O + 2 I)"
    default_lr = 4e-3
    small = ({"rank": 4, "active": 2}, {"rank": 3, "active": 1, "alpha": 3.0, "gate": "sigmoid"})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(1 <= self.active <= self.rank, "active", f"from 1 to rank={self.rank}")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.gate in GATES, "gate", "one of " + ", ".join(GATES))
        self.require(0 <= self.speed < math.inf, "speed", "0 or a small positive number")

    @property
    def scale(self):  # type: ignore[override]
        return 2.0 if self.alpha is None else self.alpha / self.active

    def trained_count(self, shape):
        return self.rank * (shape[0] + (1 if self.gate == "binary" else 2) * shape[1])

    def init(self, site, start):
        (O, I), generator = site.shape, start.generator()
        A, router = torch.empty(self.rank, I), torch.empty(self.rank, I)
        for matrix in (A, router):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        state = {"A": A, "B": torch.zeros(O, self.rank), "router": router, "b": torch.zeros(self.rank)}
        return self.taught(as_parameters(site, state))

    def restore(self, edit, site):
        return self.taught(super().restore(edit, site))

    def taught(self, state):
        return state | {"router": state["router"].detach()} if self.gate == "binary" else state

    def inserted(self, p):
        return Routed(p.A, p.B, p.router, p.b, self.active, self.gate)
