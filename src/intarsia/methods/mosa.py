"""MoSA: LoRA whose factors are split into experts, one trained a step, and merged into one LoRA.    P = P0 + 1/E sum_i M_i (P_i - P0),  P = A, B

Zhang et al. 2023, "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning" (later "Split & Merge"), arXiv:2312.02923, section 3.
Trained: r (O + I) numbers a weight, as LoRA: the masks M_1..M_E of a factor are disjoint, so the experts together are one tensor.
A ~ LoRA's, B = 0 at the start; the merged adapter is a plain LoRA, in memory, file and cost.

A training step draws one expert for A and one for B, from the state; entries of the others stand at P0. In eval mode, and in what is
saved, the experts are merged; an adapter that is loaded again starts a new split around that. This is the LoRA form (MoSL in the
authors' code); the bottleneck form is left out. Deviations: one Adam state for all experts, so an
entry drifts on by momentum while others are drawn; the consistency loss (two passes with unlike experts) is for a training loop and
left out; weight decay moves every entry. The learning rate is LoRA's, and not measured here.
"""

from dataclasses import dataclass

import torch

from intarsia.edits import LowRank
from intarsia.forms import Split
from intarsia.inits import INITIALISERS
from intarsia.method import Start, option
from intarsia.methods.lora import Lora
from intarsia.registry import register

SPLIT = {"none": "AB", "down": "B", "up": "A"}  # which factors are split


@register
@dataclass(frozen=True)
class Mosa(Split, Lora):
    experts: int = option(4, "experts E that each split factor has")
    share: str = option("none", "the factor that all experts share; none: both are split, down: A is shared, up: B")

    name, title, paper = "mosa-sparse-adapters", "MoSA", "arXiv:2312.02923"
    formula, trained = "W' = W + s B A, of E disjoint experts", "r (O + I)"
    default_lr = 4e-3
    small = ({"rank": 2}, {"rank": 3, "experts": 3, "share": "down"})

    def __post_init__(self):
        super().__post_init__()
        starts = [name for name, each in INITIALISERS.items() if not each.subtracted]  # A0 and B0 are the split's here
        self.require(self.start in starts, "start", "one of " + ", ".join(starts))
        self.require(1 <= self.experts <= 255, "experts", "from 1 to 255")
        self.require(self.share in SPLIT, "share", "one of " + ", ".join(SPLIT))

    def init(self, site, start):
        return self.split(super().init(site, start), SPLIT[self.share], start)

    def restore(self, edit, site):
        return self.split(super().restore(edit, site), SPLIT[self.share], Start.at(site.name, 0))

    def delta(self, p):
        A, B = (P.to(torch.promote_types(P.dtype, p.dtype)) for P in self.now(p, "AB"))
        return self.scale * (B @ A)

    def branch(self, p, x):
        A, B = (P.to(p.dtype) for P in self.now(p, "AB"))
        return self.scale * p.operator.low_rank(x, B, A)

    def edit(self, p):
        A, B = (P.detach().clone() for P in self.merged(p, "AB"))
        return LowRank(p.shape, B, A, self.scale)
