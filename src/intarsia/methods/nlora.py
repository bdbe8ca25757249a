"""NLoRA: a small matrix between LoRA's factors, all three cut out of the weight.    dW = s (B N A - B0 N0 A0),  s = alpha / r

Guo et al. 2025, "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", arXiv:2502.14482, section 3.
Trained: r (O + I) + r^2 numbers a weight; r^2 with ``trains="core"``, which is IntTune. alpha defaults to r, as in the authors' scripts.

The start: ``residual``, A = W[:r, :], B = W[:, :r], N = W[:r, :r], and s B N A is subtracted, so that the model starts as the base;
``paper``, the same and nothing is subtracted, as in the released code, so that it does not; ``pinv``, the Nyström approximation itself,
N = pinv(W[:r, :r]), subtracted (its line is commented out in that code); ``slora``, A and N Kaiming uniform (a = sqrt 5), B = 0. The
default is ours. What the paper's text says of the pseudo-inverse was not at hand. A subtracted start leaves the weight as it is.
In a small regression only ``pinv`` is ahead of LoRA after the same steps (``bench methods --behaviour nlora``). The learning rate is LoRA's, and not measured here; the scripts have 2e-4 for LoRA and NLoRA alike.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from intarsia.forms import Factored
from intarsia.method import option
from intarsia.registry import register

STARTS = ("residual", "paper", "pinv", "slora")


@register
@dataclass(frozen=True)
class Nlora(Factored):
    rank: int = option(8, "rank r of the update")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: r")
    start: str = option("residual", "how A, N and B start: " + ", ".join(STARTS))
    trains: str = option("all", "all: A, N and B; core: N alone, which is IntTune")

    name, title, paper = "nlora", "NLoRA", "arXiv:2502.14482"
    formula, trained = "W' = W + s (B N A - B0 N0 A0)", "r (O + I) + r^2"
    default_lr = 4e-3
    core = "square"
    small = ({"rank": 2, "start": "pinv"}, {"rank": 3, "alpha": 4.0, "trains": "core"})

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.start in STARTS, "start", "one of " + ", ".join(STARTS))
        self.require(self.trains in ("all", "core"), "trains", "all or core")
        self.require(self.trains == "all" or self.start != "slora", "trains", "all with start=slora, where B is 0")
        object.__setattr__(self, "starts_as_identity", self.start != "paper")

    @property
    def scale(self):
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def learns(self):
        return "ABC" if self.trains == "all" else "C"

    def init(self, site, start):
        (O, I), r = site.shape, self.rank
        if self.start == "slora":
            generator = start.generator()
            A, N = (nn.init.kaiming_uniform_(torch.empty(r, n), a=math.sqrt(5), generator=generator) for n in (I, r))
            return self.begin(site, {"A": A, "B": torch.zeros(O, r), "C": N})
        W = site.weight.detach().to(torch.promote_types(site.weight.dtype, torch.float32))
        N = torch.linalg.pinv(W[:r, :r], rtol=1e-6) if self.start == "pinv" else W[:r, :r]
        made = {"A": W[:r], "B": W[:, :r], "C": N}
        return self.begin(site, made, made if self.start != "paper" else None)
