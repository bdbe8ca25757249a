"""RandLoRA: a full-rank sum of random low-rank products, each scaled.    dW = s sum_j B_j diag(lambda_j) A diag(gamma_j),  n = ceil(d / r)

Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv:2502.00987, section 4.
Trained: n (r + d) numbers a weight, d = min(O, I), about d^2 / r: a larger r is fewer.  lambda = 0 and gamma = 1 / max(n, d), so W' = W.
B_j (D, r) and A (r, d), D = max(O, I), of variance 1; transposed where O < I.

The bases are the same for all weights by slicing: they follow from ``basis_seed`` and an entry's place, so no weight needs to know the
largest one. They are made in forward and again in backward; between them x, lambda and gamma are kept.
Deviations: variance 1 is the distribution's, not that of the numbers drawn; sqrt d where very sparse is the weight's own; no dropout.
``peft_order`` pairs columns and rows as HF PEFT lays them out. ``update``: half of the bases is the paper's ablation b, summed its a:
(sum_j B_j diag(lambda_j)) (sum_j A diag(gamma_j)), of rank r.
The learning rate: on a toy of two layers 1e-3 and 4e-3 were alike after 120 steps, 1.6e-2 worse; not measured on a pretrained model.
"""

import math
from dataclasses import dataclass

import torch

from intarsia.edits import BASES, Scaled, scaled_factors
from intarsia.forms import Remade
from intarsia.method import as_parameters, option
from intarsia.registry import register

UPDATES = ("full", "half", "summed")


@register
@dataclass(frozen=True)
class Randlora(Remade):
    rank: int = option(32, "rank r of each random product; a larger one is fewer trained numbers")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: 20 r")
    bases: str = option("dense", "of the random matrices: dense, sparse (a third is not 0), very_sparse (1 / sqrt d)")
    update: str = option("full", "full: n = ceil(d / r) products, half: half as many, summed: one product of two sums")
    peft_order: bool = option(False, "pair the columns and rows as HF PEFT does, not as in the paper")
    basis_seed: int = option(0, "seed of the random matrices, one for all weights")

    name, title, paper = "randlora", "RandLoRA", "arXiv:2502.00987"
    formula, trained = "W' = W + s sum_j B_j diag(lambda_j) A diag(gamma_j)", "ceil(d / r) (r + d)"
    default_lr = 2e-3
    small = ({"rank": 5}, {"rank": 3, "alpha": 30.0, "bases": "sparse", "update": "half", "peft_order": True})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.bases in BASES, "bases", "one of " + ", ".join(BASES))
        self.require(self.update in UPDATES, "update", "one of " + ", ".join(UPDATES))
        self.require(0 <= self.basis_seed < 2**63, "basis_seed", "from 0 to 2^63 - 1")

    def facts(self):
        order = "summed" if self.update == "summed" else "peft" if self.peft_order else "paper"
        scale = 20.0 if self.alpha is None else self.alpha / self.rank
        return {"seed": self.basis_seed, "bases": self.bases, "order": order, "scale": scale}

    def sizes(self, shape):
        n = math.ceil(min(shape) / self.rank)
        n = math.ceil(n / 2) if self.update == "half" else n
        return (self.rank, n), (n, min(shape))  # of lambda and gamma

    def trained_count(self, shape):
        return sum(math.prod(size) for size in self.sizes(shape))

    def init(self, site, start):
        lam, gamma = (torch.zeros(size) for size in self.sizes(site.shape))
        return as_parameters(site, {"lam": lam, "gamma": gamma + 1 / max(gamma.shape)})

    def factors(self, p):
        facts, key = self.facts(), torch.tensor(self.basis_seed, device=p.lam.device)
        return scaled_factors(p.lam, p.gamma, key, p.shape, facts["bases"], facts["order"])

    def delta(self, p):
        left, right = self.factors(p)
        return self.facts()["scale"] * (left @ right)

    def product(self, p, x):
        return self.facts()["scale"] * p.operator.low_rank(x, *self.factors(p))

    def edit(self, p):
        return Scaled(p.shape, p.lam.detach().clone(), p.gamma.detach().clone(), **self.facts())

    def restore(self, edit, site):
        return as_parameters(site, {"lam" if k == "lambda" else k: t for k, t in self.own(edit, site).items()})
