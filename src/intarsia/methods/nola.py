"""NOLA: LoRA whose factors are mixtures of random matrices.    dW = s B A,  A = A_0 + sum_i a_i E_i,  B = sum_j c_j F_j

Abbasi Koohpayegani et al. 2024, "NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv:2310.02556, section 3.
Trained: k + l numbers a weight, whatever its shape and the rank.  A_0 ~ Kaiming uniform (a = sqrt 5), a = c = 0, so B = 0.

E_i and F_j are U(-1, 1) / sqrt(k) and / sqrt(l), as in the authors' code; they and A_0 follow from one seed a weight, which is drawn at the
start and stands in the file beside the coefficients. They are made by blocks in forward and again in backward and never kept:
k r I + l r O random numbers each time, about 2 ns each on a processor's core, which is what NOLA costs there: choose a small k and l.
Deviations: the random numbers are of our own generator (``support.noise``), which gives the same on every device; coefficients are not
quantised. The learning rate: on a toy of two layers 1.6e-2 was best of 2.5e-4, 1e-3, 4e-3 and 1.6e-2 after 120 steps, 4e-3 next; the
authors' script has 5e-3; not measured on a pretrained model.
"""

import math
from dataclasses import dataclass, replace

import torch

from intarsia.edits import Combined, combined_factors
from intarsia.forms import Delta
from intarsia.method import Start, as_parameters, option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Nola(Delta):
    rank: int = option(8, "rank r of the update, which costs no trained number")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: 2 r")
    down: int = option(1024, "how many random matrices are mixed into A, k")
    up: int = option(1024, "how many random matrices are mixed into B, l")

    name, title, paper = "nola", "NOLA", "arXiv:2310.02556"
    formula, trained = "W' = W + s (sum_j c_j F_j) (A_0 + sum_i a_i E_i)", "k + l"
    default_lr = 1e-2
    small = ({"rank": 2, "down": 5, "up": 7}, {"rank": 3, "down": 8, "up": 4, "alpha": 3.0})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.down >= 1, "down", "1 or more")
        self.require(self.up >= 1, "up", "1 or more")

    @property
    def scale(self):
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def check(self, site):
        if self.rank > min(site.shape):
            return f"{site.name}: rank={self.rank} is above {min(site.shape)}, the rank of a {site.shape[0]} x {site.shape[1]} weight"

    def trained_count(self, shape):
        return self.down + self.up

    def init(self, site, start):
        return self._state(site, {"a": torch.zeros(self.down), "c": torch.zeros(self.up)}, start.key)

    def _state(self, site, coefficients, seed):
        return as_parameters(site, coefficients) | {"seed": torch.tensor(seed, device=site.weight.device)}

    def factors(self, p):
        return combined_factors(p.a, p.c, p.seed, p.shape, self.rank)

    def delta(self, p):
        B, A = self.factors(p)
        return self.scale * (B @ A)

    def branch(self, p, x):
        return self.scale * p.operator.low_rank(x, *self.factors(p))

    def edit(self, p):
        return Combined(p.shape, p.a.detach().clone(), p.c.detach().clone(), self.rank, int(p.seed), self.scale)

    def restore(self, edit, site):
        drawn = Start.at(site.name, 0).key  # what `own` compares with; any seed is one of ours
        like = replace(edit, seed=drawn) if isinstance(edit, Combined) else edit
        return self._state(site, self.own(like, site), edit.seed)
