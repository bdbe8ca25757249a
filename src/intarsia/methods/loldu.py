"""LoLDU: some diagonal numbers of an LDU decomposition are trained.    dW = s P L_r diag(z - z_0) U_r of W = P L diag(D) U,  s = alpha / r

Shi et al. 2024, "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
arXiv:2410.13618, section 3. L is unit lower, U unit upper triangular, P a permutation; the first r components, not the largest.
Trained: r numbers a weight, as in the released code, which holds s fixed (the paper counts it). alpha defaults to r.

``start`` is what z_0 is: lu (D), uniform (within half of D's mean), normal (D's mean and deviation), constant (D's mean), ones,
zeros. The start is subtracted with the z_0 that is used, so that every one starts as the base (in the released code some do not);
they differ in what weight decay pulls to, and without it not at all. Which one the paper's tables use is not said.
The decomposition is made in float64; a component whose |D| is below 1e-6 stays in the weight: its column of B is 0. The file holds
P L_r and U_r, r (O + I) numbers beside the r trained ones, so that nothing has to be decomposed at a switch. The learning rate is SVFit's, and not measured here.
"""

import math
from dataclasses import dataclass

import torch

from intarsia.forms import Factored
from intarsia.method import option
from intarsia.registry import register

STARTS = ("lu", "uniform", "normal", "constant", "ones", "zeros")
TINY = 1e-6


@register
@dataclass(frozen=True)
class Loldu(Factored):
    rank: int | None = option(64, "how many components are trained, the first; none: all")
    alpha: float | None = option(None, "the update is multiplied by alpha / r; none: r")
    start: str = option("lu", "what the trained numbers start from: " + ", ".join(STARTS))

    name, title, paper = "loldu", "LoLDU", "arXiv:2410.13618"
    formula, trained = "W' = W + s P L_r diag(z - z_0) U_r", "r"
    default_lr = 1e-2
    core = "diagonal"
    small = ({"rank": 3}, {"rank": 4, "alpha": 6.0, "start": "normal"})

    def __post_init__(self):
        self.require(self.rank is None or self.rank >= 1, "rank", "1 or more, or none")
        positive = self.alpha is None or (self.rank is not None and 0 < self.alpha < math.inf)
        self.require(positive, "alpha", "positive, or none; none where rank is none")
        self.require(self.start in STARTS, "start", "one of " + ", ".join(STARTS))

    @property
    def scale(self):
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    def learns(self):
        return "C"

    def init(self, site, start):
        r = self.rank_at(site.shape)
        P, L, U = torch.linalg.lu(site.weight.detach().double())
        D = U.diagonal()
        some = D.abs() >= TINY
        unit = U / torch.where(some, D, 1.0)[:, None]
        made = {"A": unit[:r], "B": P @ (L * some)[:, :r], "C": self._first(D, start)[:r]}
        return self.begin(site, made, made)

    def _first(self, D, start):
        draw = {"uniform": torch.rand, "normal": torch.randn}.get(self.start)
        if draw is None:
            return {
                "lu": D,
                "constant": D.mean().expand_as(D),
                "ones": torch.ones_like(D),
                "zeros": torch.zeros_like(D),
            }[self.start]
        drawn = draw(len(D), generator=start.generator(), dtype=D.dtype).to(D.device)
        return (drawn - 0.5) * D.mean() if self.start == "uniform" else D.mean() + D.std() * drawn
