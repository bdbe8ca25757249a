"""IncreLoRA: every weight starts at rank 1, and rank is added where the update matters most.    dW = s_R B diag(lam) A

Zhang et al. 2023, "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning", arXiv:2308.12043, section 3.
Trained: cap (O + I + 1) numbers a weight are there, of which the R in use and the reserve move.  A, B ~ N(0, 0.02^2), lam = 0.

How many ranks R of the ``cap`` are in use is part of the state: shapes that stay keep compiled code, checkpoints and DDP as they are, for the
memory of the cap from the start. Growth is done by :func:`intarsia.allocators.reallocate`; without it R stays 1. After the first step each weight
gets a reserve of ``add`` = target / 2 ranks, trained with lam = 1e-5 fixed, so that they point somewhere when they are taken into use. A round takes the
reserve of the ``top`` weights by score into use and lays in another: score = I * U, smoothed from S = sum |D * G| / sqrt(O I), D = dW and G its
gradient (``carry``; D is formed in training). The last round is cut to reach ``target`` on average exactly; then the reserves are gone.
``scaling="fixed"``: s = alpha / target, and growth does not change what is there; "by_rank" is the authors': s = alpha / (R + 1e-5), which
at every growth shrinks the update by R / (R + add).
Deviations: rounds are spread evenly from ``warmup`` to ``until`` of the run (theirs: every nu steps, which may not get done); what is taken into
use has its own warm-up of ``warm`` steps by its pace (``Paced``), not a learning rate schedule of its own; over accumulated batches S is the sum of each one's.
The reserve begins after the first step, so that the start is the base to the bit. The learning rate is LoRA's, and was not measured here.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from intarsia.edits import LowRank
from intarsia.errors import IntarsiaError
from intarsia.forms import Delta, Paced, carried, carry, smooth
from intarsia.method import option
from intarsia.registry import register

TINY = 1e-5  # lam of the reserve, and what keeps s finite


@register
@dataclass(frozen=True)
class Increlora(Paced, Delta):
    target: int = option(4, "rank of a weight at the end, on average")
    cap: int | None = option(None, "highest rank of a weight; none: 4 target")
    alpha: float = option(16.0, "the update is multiplied by alpha / target, or by alpha / R")
    scaling: str = option("fixed", "fixed: alpha / target, by_rank: alpha / R, which shrinks the update at every growth")
    top: int = option(4, "weights that grow in a round")
    warmup: float = option(0.1, "share of the run before the first round")
    until: float = option(0.6, "share of the run after which no rank is added")
    warm: int = option(20, "optimizer steps in which a new rank comes up to full speed")
    orthogonal: float = option(0.1, "weight of ||A A^T - 1|| + ||B^T B - 1||, mean over the weights")
    smoothing: float = option(0.85, "how much of sensitivity and uncertainty is kept from step to step, in [0, 1)")

    name, title, paper = "increlora", "IncreLoRA", "arXiv:2308.12043"
    formula, trained = "W' = W + s B diag(lam) A, ranks added", "cap (O + I + 1)"
    role, default_lr, allots = "allocator", 4e-3, "ranks"
    small = ({"target": 2}, {"target": 2, "cap": 3, "scaling": "by_rank", "warm": 0, "orthogonal": 0.0})

    def __post_init__(self):
        self.require(self.target >= 1, "target", "1 or more")
        self.require(self.cap is None or self.cap >= self.target, "cap", f"target={self.target} or more, or none")
        self.require(0 < self.alpha < math.inf, "alpha", "positive")
        self.require(self.scaling in ("fixed", "by_rank"), "scaling", "fixed or by_rank")
        self.require(self.top >= 1, "top", "1 or more")
        self.require(0 <= self.warmup <= self.until <= 1, "until", f"from warmup={self.warmup} to 1")
        self.require(self.warm >= 0, "warm", "0 or more")
        self.require(0 <= self.smoothing < 1, "smoothing", "in [0, 1)")

    def room(self, shape):
        return min(*shape, 4 * self.target if self.cap is None else self.cap)

    def scale_at(self, R):
        return self.alpha / (self.target if self.scaling == "fixed" else R + TINY)

    def carriers(self):
        return frozenset({"note"})

    def stays_wide(self):
        return frozenset({"note", "lam"})

    def trained_count(self, shape):
        return self.room(shape) * (sum(shape) + 1)

    def init(self, site, start):
        (O, I), g, most = site.shape, start.generator(), self.room(site.shape)
        A, B = 0.02 * torch.randn(most, I, generator=g), 0.02 * torch.randn(O, most, generator=g)
        return self._state(site, {"A": A, "B": B, "lam": torch.zeros(most)}, 1)

    def _state(self, site, trained, count):
        device, wide = site.weight.device, torch.promote_types(site.weight.dtype, torch.float32)
        state = {k: nn.Parameter(t.to(device, wide)) for k, t in {**trained, "note": torch.zeros(())}.items()}
        state |= {k: torch.zeros((), dtype=wide, device=device) for k in ("importance", "spread", "weight")}
        began = torch.full_like(state["lam"], -self.warm, dtype=torch.int64)
        whole = {"count": torch.tensor(count), "reserve": torch.tensor(0), "step": torch.tensor(0)}
        return self.kept(state | {"began": began} | {k: t.to(device) for k, t in whole.items()}, ("A", "B", "lam"))

    def _upto(self, p, count):
        return torch.arange(len(p.lam), device=p.lam.device) < count

    def _factors(self, p):
        """(O, r) and (r, I), the scale and lam in the first."""
        acts = self._upto(p, p.count + p.reserve if p.training else p.count)
        gate = torch.where(acts, p.lam, 0) * self.scale_at(p.count.to(p.lam.dtype))
        return p.B * gate.to(p.B.dtype), p.A

    def delta(self, p):
        B, A = self._factors(p)
        return B @ A

    def branch(self, p, x):
        B, A = self._factors(p)
        if not (p.training and torch.is_grad_enabled()):
            return p.operator.low_rank(x, B, A)
        D = B @ A
        seen = D.detach()
        score = lambda G: (seen.float() * G.float()).abs().sum() / seen.numel() ** 0.5  # noqa: E731
        return p.operator.product(x, carry(D, p.note, score))

    def paces(self, p):
        used, pace = self._upto(p, p.count), ((p.step - p.began + 1) / (self.warm + 1)).clamp(max=1)
        both = torch.where(used, pace, self._upto(p, p.count + p.reserve).to(pace.dtype))
        return {"A": both[:, None], "B": both, "lam": torch.where(used, pace, 0)}

    def before_step(self, p):
        super().before_step(p)
        if (now := carried(p.note)) is not None:
            smooth(p.importance, p.spread, now, self.smoothing)

    def after_step(self, p, lr):
        super().after_step(p, lr)
        p.step.add_(1)

    def penalty(self, p):
        acts = self._upto(p, p.count + p.reserve).to(p.A.dtype)
        A, B = acts[:, None] * p.A, acts * p.B
        return self.orthogonal * p.weight * sum((G - acts.diag()).norm() for G in (A @ A.T, B.T @ B))

    def reallocate(self, states, step, steps):
        return Growth(self, states).after(step, steps)
