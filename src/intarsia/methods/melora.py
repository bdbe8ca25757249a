"""MELoRA: small LoRAs side by side, each from a slice of the input to a slice of the output.    dW = s blockdiag(B_1 A_1, ..., B_n A_n)

Ren et al. 2024, "MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning", arXiv:2402.17263, section 3.
Trained: r (O + I) numbers a weight, whatever n is: the rank is n r for the price of r.  A_i ~ Kaiming uniform (a = sqrt 5) by the
width of its slice, B_i = 0.  With n = 1 it is LoRA.

Slices are of outputs and inputs as they come, so n has to divide both. s = alpha / r with the rank r of one of the small ones.
Deviations: no dropout (theirs is 0.05, on every slice); the authors' own merge does not run, this one is the sum of the blocks.
In a Linear the slices are multiplied alone; at other layers the blocks are laid out between zeros first, which costs n times as much.
The learning rate is LoRA's: on a toy of two layers (120 steps of 2.5e-4, 1e-3, 4e-3, 1.6e-2) its losses rank and lie as LoRA's do; not
measured on a pretrained model.
"""

import math
from dataclasses import dataclass

import torch

from intarsia.edits import Blocks, diagonal
from intarsia.forms import Delta
from intarsia.method import as_parameters, option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Melora(Delta):
    rank: int = option(8, "rank r of each of the small LoRAs")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: 2 r")
    blocks: int = option(2, "into how many slices inputs and outputs are cut, n")

    name, title, paper = "melora", "MELoRA", "arXiv:2402.17263"
    formula, trained = "W' = W + s blockdiag(B_i A_i)", "r (O + I)"
    default_lr = 4e-3
    pairs = (("B", "A"),)
    small = ({"rank": 2, "blocks": 4}, {"rank": 1, "blocks": 2, "alpha": 4.0})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.blocks >= 1, "blocks", "1 or more")

    @property
    def scale(self):
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def check(self, site):
        O, I = site.shape
        if O % self.blocks or I % self.blocks:
            return f"{site.name}: blocks={self.blocks} does not divide both sides of the {O} x {I} weight"
        if self.rank > min(O, I) // self.blocks:
            return f"{site.name}: rank={self.rank} is above {min(O, I) // self.blocks}, the rank of one of {self.blocks} blocks"

    def trained_count(self, shape):
        return self.rank * (shape[0] + shape[1])

    def init(self, site, start):
        (O, I), n = site.shape, self.blocks
        bound = 1 / math.sqrt(I / n)
        A = torch.empty(n, self.rank, I // n).uniform_(-bound, bound, generator=start.generator())
        return as_parameters(site, {"B": torch.zeros(n, O // n, self.rank), "A": A})

    def delta(self, p):
        return diagonal(self.scale * (p.B @ p.A))

    def branch(self, p, x):
        if p.operator.kind != "linear":
            return self.scale * p.operator.low_rank(x, diagonal(p.B), diagonal(p.A))
        # Not einsum, which is no product to autocast where r is 1.
        slices = x.reshape(-1, self.blocks, p.A.shape[2]).transpose(0, 1)  # (n, tokens, I / n)
        return self.scale * (slices @ p.A.mT @ p.B.mT).transpose(0, 1).reshape(*x.shape[:-1], -1)

    def edit(self, p):
        return Blocks(p.shape, p.B.detach().clone(), p.A.detach().clone(), self.scale)

    def restore(self, edit, site):
        return as_parameters(site, self.own(edit, site))
