"""IncreLoRA: every weight starts at rank 1, and rank is added where the update matters most.    dW = s_R B diag(lam) A

Zhang et al. 2023, "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning", arXiv:2308.12043, section 3.
Trained: cap (O + I + 1) numbers a weight are there, of which the R in use and the reserve move.  A, B ~ N(0, 0.02^2), lam = 0.

How many ranks R of the cap are in use is part of the state (``Growing``: static shapes, for the memory of the cap from the start).
:func:`intarsia.allocators.reallocate` adds them; without it R stays 1. After the first step each weight gets a reserve of target / 2 ranks,
trained with lam = 1e-5 fixed, so that they point somewhere when they are taken into use. A round takes the reserve of the ``top`` weights by
score into use and lays in another: score = I * U, smoothed from S = sum |D * G| / sqrt(O I), D = dW and G its gradient (D is formed in
training). The last round is cut so that ``target`` on average is met; then the reserves are gone.
``scaling="fixed"``: s = alpha / target, and growth leaves what is there as it is; "by_rank" is the authors': s = alpha / (R + 1e-5), and
growth shrinks the update to R / (R + added).
Deviations: rounds are spread evenly from ``warmup`` to ``until`` of the run (theirs: every nu steps, which may not get done); a new rank's own warm-up
is a part of the optimizer's step (``Paced``), at its learning rate, not a schedule from the start; over accumulated batches S is the sum of theirs.
The reserve begins after the first step, so that the start is the base to the bit. The learning rate is LoRA's, and was not measured here.
"""

import math
from dataclasses import dataclass

import torch

from intarsia.forms import Growing
from intarsia.method import option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Increlora(Growing):
    target: int = option(4, "rank of a weight at the end, on average")
    cap: int | None = option(None, "highest rank of a weight; none: 4 target")
    alpha: float = option(16.0, "the update is multiplied by alpha / target, or by alpha / R")
    scaling: str = option("fixed", "fixed: alpha / target, by_rank: alpha / R, and growth shrinks the update")
    top: int = option(4, "weights that grow in a round")
    warmup: float = option(0.1, "share of the run before the first round")
    until: float = option(0.6, "share of the run after which no rank is added")
    warm: int = option(20, "optimizer steps in which a new rank comes up to full speed")
    orthogonal: float = option(0.1, "weight of ||A A^T - 1|| + ||B^T B - 1||, mean over the weights")
    smoothing: float = option(0.85, "how much of the scores is kept from one step to the next, in [0, 1)")

    name, title, paper = "increlora", "IncreLoRA", "arXiv:2308.12043"
    formula, trained = "W' = W + s B diag(lam) A, ranks added", "cap (O + I + 1)"
    role, default_lr, allots = "allocator", 4e-3, "ranks"
    small = ({"target": 2}, {"target": 1, "cap": 2, "scaling": "by_rank", "warm": 0, "orthogonal": 0.0})

    def __post_init__(self):
        self.require(self.target >= 1, "target", "1 or more")
        self.require(self.cap is None or self.cap >= self.target, "cap", f"target={self.target} or more, or none")
        self.require(0 < self.alpha < math.inf, "alpha", "positive")
        self.require(self.scaling in ("fixed", "by_rank"), "scaling", "fixed or by_rank")
        self.require(min(self.top, self.warm + 1) >= 1, "top", "1 or more, and warm 0 or more")
        self.require(0 <= self.warmup <= self.until <= 1, "until", f"from warmup={self.warmup} to 1")
        self.require(0 <= self.smoothing < 1, "smoothing", "in [0, 1)")

    def room(self, shape):
        return min(*shape, 4 * self.target if self.cap is None else self.cap)

    def scale_at(self, R):
        return self.alpha / (self.target if self.scaling == "fixed" else R + 1e-5)

    def init(self, site, start):
        (O, I), g, most = site.shape, start.generator(), self.room(site.shape)
        A, B = 0.02 * torch.randn(most, I, generator=g), 0.02 * torch.randn(O, most, generator=g)
        return self.begin(site, {"A": A, "B": B, "lam": torch.zeros(most)}, 1)

    def penalty(self, p):
        return self.orthogonal * p.weight * self.off_orthogonal(p) if self.orthogonal else None
