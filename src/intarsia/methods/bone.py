"""Bone: one matrix shared by all blocks of the inputs, or one for each row of blocks, guided by them.    dW[o, j] = D[j mod r, o]

Kang 2024, "Bone: Block-Affine Adaptation of Large Language Models", arXiv:2409.15371; since version 11, with Yin, "MiSS: Revisiting the
Trade-off in LoRA with an Efficient Shard-Sharing Structure". As in the layers of HF PEFT, ``MissConfig``.

``variant="bone"`` (MiSS, of rank r at most):  dW[o, j] = D[j mod r, o], so y += (sum of x's chunks of r) D;  a last chunk may be shorter.
``variant="mini"``:  D (r, mini_rank) is repeated over the outputs too.
``variant="bat"`` (block affine, of any rank):  dW_pq = W_pq B_p + B_p for the blocks (r, r) of W, grouped by rows as in PEFT.

Trained: r O numbers a weight, r mini_rank for mini.  All 0 at the start, so W' = W, and with a gradient from the first step on.
There is no scale, as in PEFT.  PEFT's mini needs a divisor of O; so does this.  default_lr: not measured.
"""

from dataclasses import dataclass

import torch

from intarsia.edits import BlockAffine, Tiled
from intarsia.forms import Guided
from intarsia.method import option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Bone(Guided):
    rank: int = option(64, "side r of a block")
    variant: str = option(
        "bone", "bone: D on every block (MiSS), mini: of fewer outputs, bat: guided by the blocks of W"
    )
    mini_rank: int = option(1, "with mini: outputs that D has, a divisor of O")

    name, title, paper = "bone", "Bone", "arXiv:2409.15371"
    formula, trained = "W' = W + [D D ... D]^T, or W + W_pq B_p + B_p", "r O"
    default_lr = 1e-3
    small = ({"rank": 3}, {"rank": 4, "variant": "bat"})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.variant in ("bone", "mini", "bat"), "variant", "bone, mini or bat")
        self.require(self.mini_rank >= 1, "mini_rank", "1 or more")

    @property
    def reads_weights_below(self):  # type: ignore[override]
        return self.variant == "bat"

    def check(self, site):
        (O, I), r = site.shape, self.rank
        if r > I:
            return f"{site.name}: rank={r} is above {I}, the layer's inputs; choose a lower rank"
        if self.variant == "bat" and (O % r or I % r):
            return f"{site.name}: rank={r} does not divide both sides of a {O} x {I} weight, as the blocks of bat must"
        if self.variant == "mini" and O % self.mini_rank:
            return f"{site.name}: mini_rank={self.mini_rank} does not divide {O}, the layer's outputs"

    def shapes(self, shape):
        r = self.rank
        if self.variant == "bat":
            return {"B": (shape[0] // r, r, r)}
        return {"D": (r, shape[0] if self.variant == "bone" else self.mini_rank)}

    def init(self, site, start):
        return self.state(site, {name: torch.zeros(shape) for name, shape in self.shapes(site.shape).items()})

    def structure(self, p):
        return BlockAffine(p.shape, p.B) if self.variant == "bat" else Tiled(p.shape, p.D)
