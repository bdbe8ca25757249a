"""SNELL: a sparse update that two thin factors make by a kernel.    dW = sparsify(D),  D_ij = 0.1 ||B1_i - A1_j|| - 0.1 ||B2_i - A2_j||

Shen et al. 2024, "Expanding Sparse Tuning for Low Memory Usage", arXiv:2411.01800, section 3 (kernels: appendix).
Trained: r (O + I) numbers a weight, as LoRA, and no index is stored.  The entries of the dense D compete: the share ``sparsity`` of them, the
smallest, is 0, and an entry above the threshold t becomes d (|d| - t) (equation 5; t and the factor get no gradient).

Start: A, B ~ Kaiming uniform, as in the authors' code, so that dW is tiny and not 0 (below 1e-4 with a threshold, below 1e-2 with
``sparsity=0``): it does not start as the base. ``zero_start=True`` subtracts that first dW for good, at twice the cost of a
forward; the change then has up to twice as many entries.
``rule="square"`` is the authors' code, d |d|; "hard" is ours, d. ``sparsity=0`` has no competition and no factor (their KLoRA).
Deviations: t is the ceil(s O I)-th smallest size (the paper), not torch.quantile (the code), which zeroes one entry less and takes no weight
above 16 million; no dropout on the input, no DropPath on the output; 0.1 and -0.1 are constants, as in the code.
The learning rate 6e-2 is that of small regression nets here (the best of 1e-3..0.25 was 0.12 and above); it is not measured on language models.
The paper: 1e-3 over 100 epochs. D is formed in every forward and backward anew: set the adapter into the base to serve it.
"""

import math
from dataclasses import dataclass

from intarsia.edits import KERNELS
from intarsia.forms import Kernel
from intarsia.method import option
from intarsia.registry import register

RULES = ("soft", "square", "hard")


@register
@dataclass(frozen=True)
class Snell(Kernel):
    rank: int = option(8, "rank r of the factors, even: two pieces of r / 2")
    sparsity: float = option(0.9, "share of the entries of the change that is 0, in [0, 1); 0: no competition")
    rule: str = option("soft", "what an entry d above the threshold t becomes; soft: d(|d|-t), square: d|d|, hard: d")
    kernel: str = option("distance", "distance, or linear: B A^T as in LoRA")
    zero_start: bool = option(False, "subtract the first change, so that training starts from the base to the bit")

    name, title, paper = "snell", "SNELL", "arXiv:2411.01800"
    formula, trained = "W' = W + sparsify(D), D_ij = k(B_i, A_j)", "r (O + I)"
    default_lr = 6e-2
    starts_as_identity = False
    small = ({"rank": 4}, {"rank": 2, "sparsity": 0.5, "rule": "square", "zero_start": True},
             {"rank": 4, "sparsity": 0.0}, {"rank": 4, "sparsity": 0.7, "rule": "hard", "kernel": "linear"})  # fmt: skip

    def __post_init__(self):
        self.require(self.rank >= 2 and self.rank % 2 == 0, "rank", "even, 2 or more")
        self.require(0 <= self.sparsity < 1, "sparsity", "in [0, 1), a share of the entries")
        self.require(self.rule in RULES, "rule", "one of " + ", ".join(RULES))
        self.require(self.kernel in KERNELS, "kernel", "one of " + ", ".join(KERNELS))

    def zeros_at(self, shape):
        return math.ceil(self.sparsity * shape[0] * shape[1])
