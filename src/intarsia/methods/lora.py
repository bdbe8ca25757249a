"""LoRA: a low-rank update.    dW = s B A,  s = alpha / r

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
Trained: r (O + I) numbers a weight.  A ~ Kaiming uniform (a = sqrt 5), B = 0, as in the authors' code.

``scaling="rslora"`` is s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732): the update stays of one size as r
grows.  alpha defaults to 2 r.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from intarsia.edits import LowRank
from intarsia.errors import IntarsiaError
from intarsia.forms import Delta
from intarsia.method import option
from intarsia.registry import register

SCALINGS = {"lora": lambda r: r, "rslora": math.sqrt, "none": lambda r: 1.0}


@register
@dataclass(frozen=True)
class Lora(Delta):
    rank: int = option(8, "rank r of the update")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: 2 r")
    scaling: str = option("lora", "lora: alpha / r, rslora: alpha / sqrt(r), none: alpha")

    name, title, paper = "lora", "LoRA", "arXiv:2106.09685"
    formula, trained = "W' = W + s B A", "r (O + I)"
    default_lr = 4e-3
    pairs = (("B", "A"),)
    small = ({"rank": 2}, {"rank": 3, "alpha": 4.0, "scaling": "rslora"})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.scaling in SCALINGS, "scaling", "one of " + ", ".join(SCALINGS))

    @property
    def scale(self):
        return (2.0 * self.rank if self.alpha is None else self.alpha) / SCALINGS[self.scaling](self.rank)

    def check(self, site):
        if self.rank > min(site.shape):
            return f"{site.name}: rank={self.rank} is above {min(site.shape)}, the rank of a {site.shape[0]} x {site.shape[1]} weight"

    def trained_count(self, shape):
        return self.rank * (shape[0] + shape[1])

    def init(self, site, start):
        (O, I), wide = site.shape, torch.promote_types(site.weight.dtype, torch.float32)
        A = torch.empty(self.rank, I)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=start.generator())
        B = torch.zeros(O, self.rank)
        return {k: nn.Parameter(t.to(site.weight.device, wide)) for k, t in (("A", A), ("B", B))}

    def delta(self, p):
        return self.scale * (p.B @ p.A)

    def branch(self, p, x):
        return self.scale * p.operator.low_rank(x, p.B, p.A)

    def edit(self, p):
        return LowRank(p.shape, p.B.detach().clone(), p.A.detach().clone(), self.scale)

    def restore(self, edit, site):
        found = (edit.A.shape[0], edit.scale) if isinstance(edit, LowRank) else edit.kind
        if found != (self.rank, self.scale):
            raise IntarsiaError(f"{site.name}: the file has (rank, scale) {found}; its own config asks for {self}")
        wide = torch.promote_types(site.weight.dtype, torch.float32)
        return {k: nn.Parameter(t.to(wide, copy=True)) for k, t in edit.tensors().items()}
