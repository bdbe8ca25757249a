"""NOLA: LoRA whose factors are mixtures of random matrices.    dW = s B A,  A = A_0 + sum_i a_i E_i,  B = sum_j c_j F_j

Abbasi Koohpayegani et al. 2024, "NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv:2310.02556, section 3.
Trained: k + l numbers a weight, whatever its shape and the rank.  A_0 ~ Kaiming uniform (a = sqrt 5), a = c = 0, so B = 0.

E_i and F_j are U(-1, 1) / sqrt(k) and / sqrt(l), as in the authors' code; they and A_0 follow from one seed a weight, which is drawn at the
start and stands in the file beside the coefficients. They are made by blocks in forward and again in backward and never kept:
k r I + l r O random numbers each time, about 2 ns each on a processor's core, which is what NOLA costs there: choose a small k and l.
Deviations: the random numbers are of our own generator (``support.noise``), which gives the same on every device; coefficients are not
quantised. The learning rate is LoRA's, not measured: an Adam step moves an entry of B as far; the authors' script has 5e-3.
"""

from dataclasses import dataclass

import torch
from torch import nn

from intarsia.edits import Combined, combined_factors
from intarsia.errors import IntarsiaError
from intarsia.method import option
from intarsia.methods.lora import Lora
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Nola(Lora):
    down: int = option(1024, "how many random matrices are mixed into A, k")
    up: int = option(1024, "how many random matrices are mixed into B, l")

    name, title, paper = "nola", "NOLA", "arXiv:2310.02556"
    formula, trained = "W' = W + s (sum c_j F_j) (A_0 + sum a_i E_i)", "k + l"
    pairs = ()  # type: ignore[assignment]  # a product of mixtures is none of what is trained
    small = ({"rank": 2, "down": 5, "up": 7}, {"rank": 3, "down": 8, "up": 4, "alpha": 3.0, "scaling": "none"})

    def __post_init__(self):
        super().__post_init__()
        self.require(self.down >= 1, "down", "1 or more")
        self.require(self.up >= 1, "up", "1 or more")

    def trained_count(self, shape):
        return self.down + self.up

    def init(self, site, start):
        return self._state(site, torch.zeros(self.down), torch.zeros(self.up), start.key)

    def _state(self, site, a, c, seed):
        device, wide = site.weight.device, torch.promote_types(site.weight.dtype, torch.float32)
        trained = {k: nn.Parameter(t.to(device, wide, copy=True)) for k, t in (("a", a), ("c", c))}
        return trained | {"seed": torch.tensor(seed, device=device)}

    def delta(self, p):
        B, A = combined_factors(p.a, p.c, p.seed, p.shape, self.rank)
        return self.scale * (B @ A)

    def branch(self, p, x):
        return self.scale * p.operator.low_rank(x, *combined_factors(p.a, p.c, p.seed, p.shape, self.rank))

    def edit(self, p):
        return Combined(p.shape, p.a.detach().clone(), p.c.detach().clone(), self.rank, int(p.seed), self.scale)

    def restore(self, edit, site):
        found = (len(edit.a), len(edit.c), edit.rank, edit.scale) if isinstance(edit, Combined) else edit.kind
        if found != (self.down, self.up, self.rank, self.scale):
            raise IntarsiaError(
                f"{site.name}: the file has (k, l, rank, scale) {found}; its own config asks for {self}"
            )
        return self._state(site, edit.a, edit.c, edit.seed)
