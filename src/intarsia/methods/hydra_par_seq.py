"""Hydra: a low-rank branch beside the layer and one behind it.    y = h + s U_p D_p x + s U_s D_s h,  h = W x + b

Kim et al. 2023, "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", arXiv:2309.06922, section 3. (Not HydraLoRA.)
Trained: r_p (I + O) + 2 r_s O numbers a weight.  U_p = U_s = 0 at the start, so y = h.

Folded: W' = W + s U_p D_p + s U_s D_s W, and b' = b + s U_s D_s b: what stands behind the layer reads its bias too. With ``sequential=0`` it
is LoRA with alpha / r = s, with ``parallel=0`` SeqLoRA. ``start``: the D as in the authors' code, kaiming
uniform with a = sqrt 5 (GLUE), xavier uniform (VTAB) or N(0, 0.02^2) (ELEVATER). The branches have no biases of their own, which are
optional there. s is 1 there in ELEVATER and searched from 0.1 to 4.5 in VTAB; ours is 2, as LoRA's, and so is the learning rate, which
was not measured for both branches on a language model. Beside linear layers only.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from intarsia.edits import Edit, LowRank, Sequential, Sum
from intarsia.method import Method, as_parameters, option
from intarsia.registry import register

STARTS = {
    "kaiming": lambda D, g: nn.init.kaiming_uniform_(D, a=math.sqrt(5), generator=g),
    "xavier": lambda D, g: nn.init.xavier_uniform_(D, generator=g),
    "normal": lambda D, g: nn.init.normal_(D, std=0.02, generator=g),
}


@register
@dataclass(frozen=True)
class Hydra(Method):
    parallel: int = option(4, "rank r_p of the branch beside the layer, which reads x; 0: none")
    sequential: int = option(4, "rank r_s of the branch behind it, which reads what the layer makes; 0: none")
    scale: float = option(2.0, "factor s in front of both")
    start: str = option("kaiming", "how the matrices D start: " + ", ".join(STARTS))

    name, title, paper = "hydra-par-seq", "Hydra", "arXiv:2309.06922"
    formula, trained = "W' = W + s U_p D_p + s U_s D_s W", "r_p (I + O) + 2 r_s O"
    default_lr = 4e-3
    pairs = (("U_p", "D_p"), ("U_s", "D_s"))
    small = ({"parallel": 2, "sequential": 3, "start": "xavier"}, {"parallel": 0, "sequential": 2, "scale": 0.5})

    def __post_init__(self):
        self.require(self.parallel >= 0, "parallel", "0 or more")
        some = self.sequential >= 0 and self.parallel + self.sequential > 0
        self.require(some, "sequential", "0 or more, and not both 0")
        self.require(math.isfinite(self.scale) and self.scale != 0, "scale", "a finite number other than 0")
        self.require(self.start in STARTS, "start", "one of " + ", ".join(STARTS))

    def branches(self, shape):  # by letter: (rank, inputs)
        sizes = {"p": (self.parallel, shape[1]), "s": (self.sequential, shape[0])}
        return {letter: size for letter, size in sizes.items() if size[0]}

    def trained_count(self, shape):
        return sum(rank * (inputs + shape[0]) for rank, inputs in self.branches(shape).values())

    def init(self, site, start):
        generator, state = start.generator(), dict[str, torch.Tensor]()
        for letter, (rank, inputs) in self.branches(site.shape).items():
            D = STARTS[self.start](torch.empty(rank, inputs), generator)
            state |= {f"U_{letter}": torch.zeros(site.shape[0], rank), f"D_{letter}": D}
        return as_parameters(site, state)

    def forward(self, p, x, below):
        h = y = below(x)
        if self.parallel:
            y = y + self.scale * p.operator.low_rank(x, p.U_p, p.D_p)
        return y + self.scale * p.operator.low_rank(h, p.U_s, p.D_s) if self.sequential else y

    def fold(self, p, W, b):
        beside = self.scale * (p.U_p @ p.D_p) if self.parallel else 0
        if not self.sequential:
            return W + beside, b
        behind = (self.scale * (p.U_s @ p.D_s)).to(W.dtype)
        return W + beside + behind @ W, None if b is None else b + behind @ b

    def edit(self, p):
        kept = {name: getattr(p, name).detach().clone() for pair in self.pairs for name in pair if hasattr(p, name)}
        parts: list[Edit] = [LowRank(p.shape, kept["U_p"], kept["D_p"], self.scale)] if self.parallel else []
        parts += [Sequential(p.shape, kept["U_s"], kept["D_s"], self.scale)] if self.sequential else []
        return Sum(p.shape, tuple(parts)) if len(parts) > 1 else parts[0]

    def bias_edit(self, p):
        behind = getattr(self.edit(p), "parts", (self.edit(p),))[-1]
        return replace(behind, shape=(p.shape[0], 1)) if self.sequential else None

    def restore(self, edit, site):
        names = [f"{matrix}_{letter}" for letter in self.branches(site.shape) for matrix in "UD"]
        return as_parameters(site, dict(zip(names, self.own(edit, site).values(), strict=True)))
