"""WaRA: a low rank in each band of a wavelet transform of the weight's change.    dW = sum over bands of s T_out^T B A T_in,  s = alpha / r

Heidari et al. 2025, "WaRA: Wavelet Low Rank Adaptation", arXiv:2506.24092: its abstract (version 1) and the figure of that version, for
the code could not be read. One level of Haar: T has the low-pass rows (x_2i + x_2i+1) / sqrt 2 and the high-pass ones, their difference;
an odd side is filled up with one 0. A band is two letters, outputs first: ``ll, lh, hl, hh``.

The bands' low ranks are their own (the abstract's reading), or one pair for all, ``shared``. ``bands="ll,hh", shared=True`` is the figure's
reading: there x is transformed along its features and along its tokens, the pair acts on the features alone, so that the second
transform cancels. With Haar it collapses: dW = s (B A) kron 1_2, of rank 2 r.  ``bands="ll"`` is constant on tiles of 2 x 2.
Version 2 (patch tokens put on their grid, one shared pair) is LoRA itself: what acts on features commutes with a transform over
tokens. It needs no method and is not built, nor is Tiny-WaRA; wavelet, level and ranks of the paper are not confirmed.

Trained: r ((O + 1) // 2 + (I + 1) // 2) numbers a weight and band, once if shared.  A ~ Kaiming uniform, B = 0, so W' = W.
alpha defaults to 2 r.  default_lr: LoRA's, not measured.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from intarsia.edits import LowRank, Sum, Transformed
from intarsia.forms import Structured
from intarsia.method import option
from intarsia.registry import register

NAMES = {"l": "haar-low", "h": "haar-high"}


@register
@dataclass(frozen=True)
class Wara(Structured):
    rank: int = option(8, "rank r in each band")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: 2 r")
    bands: str = option("ll,lh,hl,hh", "bands that change: l low, h high, of outputs and of inputs")
    shared: bool = option(False, "one A and B for all bands")

    name, title, paper = "wara", "WaRA", "arXiv:2506.24092"
    formula, trained = "W' = W + sum s T_out^T B A T_in", "r (O + I) / 2 a band"
    default_lr = 4e-3
    small = ({"rank": 2}, {"rank": 3, "bands": "ll,hh", "shared": True})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        known = len(set(self.pairs_of())) == len(self.pairs_of()) and all(
            len(pair) == 2 and set(pair) <= set(NAMES) for pair in self.pairs_of()
        )
        self.require(known, "bands", "some of ll, lh, hl, hh, with commas between them")

    def pairs_of(self):
        return self.bands.split(",")

    def check(self, site):
        if self.rank > (most := (min(site.shape) + 1) // 2):
            return f"{site.name}: rank={self.rank} is above {most}, the rank of a band of a {site.shape[0]} x {site.shape[1]} weight"

    def shapes(self, shape):
        count, (O, I) = 1 if self.shared else len(self.pairs_of()), shape
        return {"A": (count, self.rank, (I + 1) // 2), "B": (count, (O + 1) // 2, self.rank)}

    def init(self, site, start):
        shapes, generator = self.shapes(site.shape), start.generator()
        A = torch.empty(shapes["A"])
        for one in A:
            nn.init.kaiming_uniform_(one, a=math.sqrt(5), generator=generator)
        return self.state(site, {"A": A, "B": torch.zeros(shapes["B"])})

    def structure(self, p):
        scale = (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank
        pairs = tuple((NAMES[out], NAMES[into]) for out, into in self.pairs_of())
        groups = [pairs] if self.shared else [(pair,) for pair in pairs]
        parts = [
            Transformed(p.shape, LowRank((B.shape[0], A.shape[1]), B, A, scale), group)
            for B, A, group in zip(p.B, p.A, groups, strict=True)
        ]
        return parts[0] if len(parts) == 1 else Sum(p.shape, tuple(parts))

    def tensors(self, edit):
        parts = edit.parts if isinstance(edit, Sum) else (edit,)
        return {name: torch.stack([getattr(part.inner, name) for part in parts]) for name in ("A", "B")}  # type: ignore[union-attr]
