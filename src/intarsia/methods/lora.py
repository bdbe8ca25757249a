"""LoRA: a low-rank update.    dW = s B A,  s = alpha / r

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
Trained: r (O + I) numbers a weight.  A ~ Kaiming uniform (a = sqrt 5), B = 0, as in the authors' code.

``scaling="rslora"`` is s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732): the update stays of one size as r
grows.  alpha defaults to 2 r.  ``start`` is another way for A and B to begin, of :mod:`intarsia.inits`; where B A is not 0
then, what it is at the start is subtracted.
"""

import math
from dataclasses import dataclass

from intarsia.forms import Factored
from intarsia.inits import INITIALISERS, find, is_initialiser, make
from intarsia.method import option
from intarsia.registry import register

SCALINGS = {"lora": lambda r: r, "rslora": math.sqrt, "none": lambda r: 1.0}


@register
@dataclass(frozen=True)
class Lora(Factored):
    rank: int = option(8, "rank r of the update")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: 2 r")
    scaling: str = option("lora", "lora: alpha / r, rslora: alpha / sqrt(r), none: alpha")
    start: str = option("lora", "how A and B start: " + ", ".join(INITIALISERS))

    name, title, paper = "lora", "LoRA", "arXiv:2106.09685"
    formula, trained = "W' = W + s B A", "r (O + I)"
    default_lr = 4e-3
    pairs = (("B", "A"),)
    small = ({"rank": 2}, {"rank": 3, "alpha": 4.0, "scaling": "rslora", "start": "pissa"})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.scaling in SCALINGS, "scaling", "one of " + ", ".join(SCALINGS))
        self.require(is_initialiser(self.start), "start", "one of " + ", ".join(INITIALISERS))

    @property
    def scale(self):
        return (2.0 * self.rank if self.alpha is None else self.alpha) / SCALINGS[self.scaling](self.rank)

    def needs(self):
        return find(self.start).needs

    def chooses_together(self):
        return find(self.start).settle is not None

    def survey(self, site, start):
        looked = find(self.start).survey
        return looked(self, site, start) if looked else super().survey(site, start)

    def settle(self, sites, surveys, seed):
        chosen = find(self.start).settle
        return chosen(self, sites, surveys, seed) if chosen else super().settle(sites, surveys, seed)

    def at(self, edit, site):
        known = INITIALISERS.get(self.start)  # a file that is loaded imports nothing
        return known.at(self, edit, site) if known and known.at else self

    def observer(self, site):
        looks = find(self.start).observer
        return looks(self, site) if looks else super().observer(site)

    def confer(self, observers):
        settles = find(self.start).confer
        if settles:
            settles(self, observers)

    def init(self, site, start):
        made = make(self.start, self, site, start, self.shapes(site.shape))
        return self.begin(site, made, made if find(self.start).subtracted else None)
