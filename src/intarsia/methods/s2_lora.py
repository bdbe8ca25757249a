"""S2-LoRA: one pair of factors for all weights of a shape; each weight has its own sparse coefficients.    dW_l = P diag(lam_l) Q

Liu et al. 2023, "Sparsely Shared LoRA on Whisper for Child Speech Recognition", arXiv:2309.11756, section 2.
Trained: r numbers a weight, and r (O + I) once for every shape. P, Q ~ N(0, 0.02^2), the same at all sites of a shape whatever
the other targets are, lam = 0: the first step moves lam alone.

P and Q are to be orthogonal (``orthogonal`` times ||P^T P - 1||^2 + ||Q Q^T - 1||^2, once a pair) and lam sparse (``sparse`` times |lam|_1:
``proximal``, a soft threshold of lr * sparse after every step, which gives exact zeros, or ``subgradient``, a term of the loss). The
non-zero coefficients of a weight are its rank. That weights of unlike shapes have pairs of their own, the threshold and both
strengths are ours; of the paper sharing and sparse coefficients are certain, and its text was not at hand. Sites on other devices have a pair of
their own. The learning rate is LoRA's, and not measured here.
"""

from dataclasses import dataclass

import torch

from intarsia.forms import Factored
from intarsia.method import option
from intarsia.registry import register

WIDTH = 0.02  # standard deviation of P and Q at the start, as AdaLoRA's


@register
@dataclass(frozen=True)
class S2Lora(Factored):
    rank: int = option(32, "rank r of the shared pair, and coefficients at each weight")
    orthogonal: float = option(0.1, "strength by which P and Q are made orthogonal; 0: not at all")
    sparse: float = option(1e-3, "strength by which coefficients are made 0; 0: not at all")
    threshold: str = option("proximal", "how they are made 0: proximal, after each step, or subgradient, by the loss")

    name, title, paper = "s2-lora", "S2-LoRA", "arXiv:2309.11756"
    formula, trained = "W' = W + P diag(lam) Q, P and Q of all", "r, and r (O + I) a shape"
    default_lr = 4e-3
    core, scale = "diagonal", 1.0
    small = ({"rank": 2}, {"rank": 3, "threshold": "subgradient"})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(0 <= self.orthogonal < float("inf"), "orthogonal", "0 or more")
        self.require(0 <= self.sparse < float("inf"), "sparse", "0 or more")
        self.require(self.threshold in ("proximal", "subgradient"), "threshold", "proximal or subgradient")

    def shares(self):
        return frozenset({"A", "B"})

    def init(self, site, start):
        generator = torch.Generator().manual_seed(start.common)
        (O, I), r = site.shape, self.rank
        Q, P = (WIDTH * torch.randn(n, m, generator=generator) for n, m in ((r, I), (O, r)))
        return self.begin(site, {"A": Q, "B": P, "C": torch.zeros(r)})

    def penalty(self, p):
        one = torch.eye(self.rank, dtype=p.A.dtype, device=p.A.device)
        total = self.orthogonal * sum((gram - one).square().sum() for gram in (p.B.mT @ p.B, p.A @ p.A.mT))
        return total if self.threshold == "proximal" else total + self.sparse * p.C.abs().sum()

    def after_step(self, p, lr):
        if self.threshold == "proximal":
            p.C.copy_(torch.nn.functional.softshrink(p.C, lr * self.sparse))
