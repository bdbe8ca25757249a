"""SVFit: the largest singular values of the weight are trained.    dW = U_r diag(d) V_r^T of W = U S V^T,  d = s - s_0

Sun et al. 2024, "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", arXiv:2409.05926.
Trained: r numbers a weight. d = 0 at the start, so W' = W; U_r and V_r are frozen.

The paper trains s in W_e + U_r diag(s) V_r^T with W_e the rest of W; what is trained here is how far s has moved, which is the same
function, needs no copy of the weight, and lets weight decay pull towards the base. A value may become negative, as in
the paper. ``rank=none`` takes all of them. The file holds U_r and V_r, r (O + I) numbers beside the r trained ones: an SVD of the
base is not the same to the bit on every machine, and takes long at every switch.
The paper's text was not at hand, nor its code; formula and count are those of the catalogue. The learning rate is the
largest of the rates named for it, 1e-3 to 1e-2, and not measured here.
"""

from dataclasses import dataclass

import torch

from intarsia.forms import Factored
from intarsia.method import option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Svfit(Factored):
    rank: int | None = option(64, "how many singular values are trained, the largest; none: all")

    name, title, paper = "svfit", "SVFit", "arXiv:2409.05926"
    formula, trained = "W' = W + U_r diag(d) V_r^T", "r"
    default_lr = 1e-2
    core, scale = "diagonal", 1.0
    small = ({"rank": 3}, {"rank": None})

    def __post_init__(self):
        self.require(self.rank is None or self.rank >= 1, "rank", "1 or more, or none")

    def learns(self):
        return "C"

    def init(self, site, start):
        r, W = self.rank_at(site.shape), site.weight.detach()
        U, _, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
        return self.begin(site, {"A": V[:r], "B": U[:, :r], "C": torch.zeros(r)})
