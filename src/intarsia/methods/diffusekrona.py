"""DiffuseKronA: the Kronecker product of two small matrices.    dW = s A kron B

Marjit, Singh, Mathur, Paul, Yu, Chen 2024, "DiffuseKronA: A Parameter Efficient Fine-tuning Method for Personalized Diffusion Models",
arXiv:2402.17412, and the authors' code; HF PEFT's LoKr with two whole factors is the same.
dW[i b1 + p, j b2 + q] = s A[i, j] B[p, q], A (a1, a2), B (b1, b2) = (O / a1, I / a2), of rank rank(A) rank(B).

Trained: a1 a2 + (O / a1) (I / a2) numbers a weight.  A ~ N(0, 1 / a1^2), B = 0, so W' = W.  s = 1: the code's network_alpha is off.
x is taken as X (a2, b2) row by row and y is A X B^T: the product of Kronecker is never built in a Linear.
Deviation: the authors' forward lays y out by B's rows first, a permutation of the rows of A kron B that is of the same power; here it is
the textbook's product, so that merging is torch.kron.  default_lr is the paper's, not measured here.
"""

import math
from dataclasses import dataclass

import torch

from intarsia.edits import Kronecker
from intarsia.forms import Structured
from intarsia.method import option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class DiffuseKronA(Structured):
    a1: int = option(64, "rows of A, a divisor of the outputs")
    a2: int = option(8, "columns of A, a divisor of the inputs")
    scale: float = option(1.0, "s, the product is multiplied by it")

    name, title, paper = "diffusekrona", "DiffuseKronA", "arXiv:2402.17412"
    formula, trained = "W' = W + s A kron B", "a1 a2 + (O / a1) (I / a2)"
    default_lr = 1e-3
    small = ({"a1": 4, "a2": 2}, {"a1": 2, "a2": 8, "scale": 0.5})

    def __post_init__(self):
        self.require(self.a1 >= 1, "a1", "1 or more")
        self.require(self.a2 >= 1, "a2", "1 or more")
        self.require(0 < self.scale < math.inf, "scale", "positive")

    def check(self, site):
        for field, given, side, of in (
            ("a1", self.a1, site.shape[0], "outputs"),
            ("a2", self.a2, site.shape[1], "inputs"),
        ):
            if side % given:
                near = max(d for d in range(1, given + 1) if side % d == 0)
                return f"{site.name}: {field}={given} does not divide the layer's {side} {of}; the next lower divisor is {near}"

    def shapes(self, shape):
        return {"A": (self.a1, self.a2), "B": (shape[0] // self.a1, shape[1] // self.a2)}

    def init(self, site, start):
        shapes = self.shapes(site.shape)
        A = torch.randn(shapes["A"], generator=start.generator()) / self.a1
        return self.state(site, {"A": A, "B": torch.zeros(shapes["B"])})

    def structure(self, p):
        return Kronecker(p.shape, p.A, p.B, self.scale)
