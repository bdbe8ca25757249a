"""LoRA-SB: a small trained core between factors that span the first step of full training.    dW = B R A,  R (r, r) trained

Ponkshe et al. 2024, "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
arXiv:2411.19557, section 3.
Trained: r^2 numbers a weight. Of G, the loss gradient of the base summed over calibration data, the first AdamW step would be
-e sign(G); its truncated SVD U S V^T gives B = U_r, A = V_r^T (frozen) and R = S_r, so that the adapted model starts one step
on and not as the base. As B^T B = A A^T = 1, an SGD step on R moves W by the full step projected onto both spans.

``first_step`` is e, in the paper lr / (warm-up share * steps), what the schedule has at its first step. alpha is r in the
paper, so s = 1, and there is none here. The SVD is exact, in float32 or wider, where the code has a randomised one and keeps the
factors in bfloat16. The file holds B and A, r (O + I) numbers, because nobody who loads it has the gradient.
The learning rate is the paper's for GLUE (1e-4 to 2e-3 for others), and not measured here.
"""

from dataclasses import dataclass

import torch

from intarsia.forms import Factored
from intarsia.method import option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class LoraSb(Factored):
    rank: int = option(32, "rank r; r^2 numbers are trained at each weight")
    first_step: float = option(5e-5, "size of the first step of full training, of which the factors are made")

    name, title, paper = "lora-sb", "LoRA-SB", "arXiv:2411.19557"
    role = "init"
    formula, trained = "W' = W + B R A, of the first full step", "r^2"
    default_lr = 1e-3
    starts_as_identity = False
    core, scale = "square", 1.0
    small = ({"rank": 2, "first_step": 0.01},)

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(0 < self.first_step < float("inf"), "first_step", "positive")

    def learns(self):
        return "C"

    def needs(self):
        return frozenset({"gradient"})

    def init(self, site, start):
        step = -self.first_step * start.given("gradient").sign()
        U, S, V = torch.linalg.svd(step, full_matrices=False)
        r = self.rank
        return self.begin(site, {"A": V[:r], "B": U[:, :r], "C": torch.diag(S[:r])})
