"""DyLoRA: one LoRA for every rank: its first b rows and columns are trained to act alone.    dW_b = s_b B[:, :b] A[:b]

Valipour et al. 2022, "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
arXiv:2210.07558, section 4.
Trained: r (O + I) numbers a weight.  A and B start as LoRA's.

In each optimizer step one rank b is drawn for the whole adapter, and dW_b acts (``Nested``); in eval mode all of r does. Any rank that was drawn can be taken out of the saved adapter, as a plain LoRA:
``intarsia compress ADAPTER OUT --to prefix --rank b``. s_b is alpha / b (``scaling="paper"``), or alpha / sqrt(r b) ("code").
``update="frozen"`` trains only the last ``unit`` rows and columns of the b and leaves all others to the bit as they were; "full" trains
the first b, and as in the authors' code the optimizer's moments may still move those behind.
Deviations: rows and columns beyond b are multiplied by 0 and not cut off (static shapes), so a step costs what one of rank r does; a rank is
drawn for a step, not for a forward. The learning rate is LoRA's; it was not measured for this method.
"""

import math
from dataclasses import dataclass

import torch

from intarsia.edits import LowRank
from intarsia.errors import IntarsiaError
from intarsia.forms import Factored, Nested, Paced
from intarsia.inits import make
from intarsia.method import option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Dylora(Nested, Paced, Factored):
    rank: int = option(8, "highest rank r")
    alpha: float | None = option(None, "the update of rank b is multiplied by alpha / b; none: 2 r")
    scaling: str = option("paper", "of rank b; paper: alpha / b, code: alpha / sqrt(r b)")
    lowest: int = option(1, "lowest rank that is drawn")
    unit: int = option(1, "ranks are multiples of this")
    decay: float = option(1.0, "how likely a rank is beside the one below it, up to 1: all alike")
    update: str = option("full", "full: the first b rows and columns are trained; frozen: the last of them")
    seed: int = option(0, "of the sequence of ranks")

    name, title, paper = "dylora", "DyLoRA", "arXiv:2210.07558"
    formula, trained = "W' = W + s_b B[:, :b] A[:b]", "r (O + I)"
    role, default_lr = "allocator", 4e-3
    small = ({"rank": 4}, {"rank": 4, "unit": 2, "lowest": 2, "update": "frozen", "scaling": "code", "decay": 0.5})

    def __post_init__(self):
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.scaling in ("paper", "code"), "scaling", "paper or code")
        self.require(self.unit >= 1 and self.rank >= 1 and self.rank % self.unit == 0, "rank", "a multiple of unit")
        self.require(1 <= self.lowest <= self.rank, "lowest", f"from 1 to rank={self.rank}")
        self.require(0 < self.decay <= 1, "decay", "above 0, and 1 at most")
        self.require(self.update in ("full", "frozen"), "update", "full or frozen")

    def scale_at(self, b):
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (b if self.scaling == "paper" else (self.rank * b) ** 0.5)

    @property
    def scale(self):
        return self.scale_at(self.rank)

    def init(self, site, start):
        return self._started(self.begin(site, make("lora", self, site, start, self.shapes(site.shape))))

    def restore(self, edit, site):
        return self._started(super().restore(edit, site))

    def _started(self, state):
        return self.nested(self.kept(state, "AB") if self.update == "frozen" else state)

    def thin(self, p):
        B, A = super().thin(p)
        if not p.training:
            return B, A
        if self.update == "frozen":
            new = self.newest(p)
            A, B = torch.where(new[:, None], A, A.detach()), torch.where(new, B, B.detach())
        return B * (self.acting(p) * (self.scale_at(p.drawn.double()) / self.scale)).to(B.dtype), A

    def paces(self, p):
        return {"A": self.newest(p)[:, None], "B": self.newest(p)} if self.update == "frozen" else {}

    def after_step(self, p, lr):
        super().after_step(p, lr)
        self.next_draw(p)

    def prefix(self, edit, rank):
        if rank not in self.ranks():
            raise IntarsiaError(f"rank={rank} was not trained; expected one of {', '.join(map(str, self.ranks()))}")
        return LowRank(edit.shape, edit.B[:, :rank].contiguous(), edit.A[:rank].contiguous(), self.scale_at(rank))
