"""SoRA: LoRA with a gate for every rank, of which a soft threshold makes as many exactly 0 as are not needed.    dW = s B diag(g) A

Ding et al. 2023, "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv:2311.11696, section 3; constants: the authors' code.
Trained: r (O + I) + r numbers a weight.  A and B start as LoRA's, g ~ N(0, 1); s = alpha / r.

After every optimizer step g <- sign(g) max(|g| - lr lambda, 0), lr that of the step: the proximal step of lambda ||g||_1. The edit has
only the ranks whose gate is not 0, with the gate in B, and is a plain low rank; what is loaded of it goes on with gates of 1. A gate
at 0 still has a gradient and may come back in training. ``stages`` above 1 raise lambda from ``lam`` to ``last`` in as many equal parts of the
run (the sparsifying schedule, :func:`intarsia.allocators.reallocate`), and the ranks left are told at the end of each.
``code_compat``: the authors' three lines, a threshold of lambda whatever the lr, that also zeroes what ends below it, so all up to 2 lambda.
``l1`` adds l1 * sum |g| to the loss (the code: 10 / number of gates in the model). lambda = 0.5 is ours, 3e-4 with ``code_compat`` theirs.
Deviations: the gates share the optimizer (and its weight decay) with A and B; with Adam the threshold follows Adam's step, as in the code; alpha is 2 r
as for our LoRA (theirs: 16 at r = 8, the same). The learning rate is LoRA's; it was not measured for this method.
"""

import math
from dataclasses import dataclass

import torch

from intarsia.forms import HEIGHTS, Gated, soft, soft_in_turns
from intarsia.inits import make
from intarsia.method import Start, option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Sora(Gated):
    rank: int = option(8, "highest rank r")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: 2 r")
    lam: float | None = option(None, "lambda, weight of sum |g|; none: 0.5, or 3e-4 with code_compat")
    stages: int = option(1, "parts of the run, each with a lambda of its own")
    last: float | None = option(None, "lambda of the last stage; needed with stages above 1")
    schedule: str = option("linear", "how lambda goes there: " + ", ".join(HEIGHTS))
    code_compat: bool = option(False, "the authors' threshold: lambda, and what ends below it is 0 too")
    l1: float = option(0.0, "weight of sum |g| that is added to the loss besides")

    name, title, paper = "sora", "SoRA", "arXiv:2311.11696"
    formula, trained = "W' = W + s B diag(g) A", "r (O + I) + r"
    role, default_lr, allots = "allocator", 4e-3, "ranks"
    small = ({"rank": 3}, {"code_compat": True, "l1": 0.01, "stages": 2, "last": 1e-3, "schedule": "exp_linear"})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.lam is None or 0 <= self.lam < math.inf, "lam", "0 or more, or none")
        self.require(self.stages >= 1, "stages", "1 or more")
        self.require(
            (self.last is None) == (self.stages == 1), "last", "given where stages are above 1, and only there"
        )
        self.require(self.schedule in HEIGHTS, "schedule", "one of " + ", ".join(HEIGHTS))
        self.require(0 <= self.l1 < math.inf, "l1", "0 or more")

    @property
    def scale(self):
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def lam_at(self, stage):
        first = self.lam if self.lam is not None else 3e-4 if self.code_compat else 0.5
        return first if self.last is None else HEIGHTS[self.schedule](first, self.last, stage / (self.stages - 1))

    def init(self, site, start):
        gate = torch.randn(self.rank, generator=Start.at("gate", start.key).generator())
        state = self.gated(site, make("lora", self, site, start, self.shapes(site.shape)), gate)
        state["lam"].fill_(self.lam_at(0))
        return state

    def gated(self, site, factors, gate):
        lam = torch.tensor(self.lam_at(self.stages - 1), device=site.weight.device)
        return super().gated(site, factors, gate) | {"lam": lam}

    def penalty(self, p):
        return self.l1 * p.gate.abs().sum() if self.l1 else None

    def after_step(self, p, lr):
        p.gate.copy_(soft_in_turns(p.gate, float(p.lam)) if self.code_compat else soft(p.gate, lr * float(p.lam)))

    def wants_callback(self):
        return self.stages > 1

    def reallocate(self, states, step, steps):
        stage = step * self.stages // steps
        if stage == (step - 1) * self.stages // steps:
            return {}
        for p in states.values():
            p.lam.fill_(self.lam_at(min(stage, self.stages - 1)))
        return {site: int((p.gate != 0).sum()) for site, p in states.items()}
