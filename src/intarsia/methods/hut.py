"""HUT: the weight multiplied entry by entry by a matrix of low rank.    W' = W * (1 + s U_B U_A),  s = alpha / r

Zhang, Zhou, Chen 2024, "HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation", arXiv:2409.13501.
The paper's text was not at hand: that it is a Hadamard product of W with what two low-rank matrices make, and merges, is certain; the
construct and its start are our choice. ``form="one"`` is the algebra of HF PEFT's HiRA (s = 1 there), ``form="pure"`` is
W' = W * (U_B U_A), which is diag(u) W diag(v) for r = 1, and (IA)^3's scaling of outputs where v = 1; it has no s.

Trained: r (O + I) numbers a weight.  U_A ~ Kaiming uniform (a = sqrt 5), U_B = 0; pure: the first column of U_B and the first row of U_A
are 1, the rest of U_B is 0. So W' = W.  An entry that is 0 stays 0.  The rank of the change reaches r rank(W).
W' is built once in a forward, whatever the number of tokens, and again in backward; one product follows.  default_lr: LoRA's, not measured.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from intarsia.edits import LowRank, Multiplied
from intarsia.forms import Guided
from intarsia.method import option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Hut(Guided):
    rank: int = option(8, "rank r of the factor")
    alpha: float | None = option(None, "the factor's product is multiplied by alpha / r; none: r")
    form: str = option("one", "one: W * (1 + s U_B U_A), pure: W * (U_B U_A)")

    name, title, paper = "hut", "HUT", "arXiv:2409.13501"
    formula, trained = "W' = W * (1 + s U_B U_A)", "r (O + I)"
    default_lr = 4e-3
    small = ({"rank": 2}, {"rank": 3, "form": "pure"})
    pairs = (("B", "A"),)

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.form in ("one", "pure"), "form", "one or pure")
        self.require(self.alpha is None or self.form == "one", "alpha", "none where form is pure, which has no scale")

    @property
    def scale(self):
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self, site):
        if self.rank > min(site.shape):
            return f"{site.name}: rank={self.rank} is above {min(site.shape)}, the rank of a {site.shape[0]} x {site.shape[1]} matrix"

    def shapes(self, shape):
        return {"B": (shape[0], self.rank), "A": (self.rank, shape[1])}

    def init(self, site, start):
        B, A = (torch.zeros(shape) for shape in self.shapes(site.shape).values())
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=start.generator())
        if self.form == "pure":
            A[0], B[:, 0] = 1, 1
        return self.state(site, {"B": B, "A": A})

    def structure(self, p):
        return Multiplied(p.shape, LowRank(p.shape, p.B, p.A, self.scale), 1.0 if self.form == "one" else 0.0)
