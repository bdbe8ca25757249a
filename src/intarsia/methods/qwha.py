"""QWHA: sparse coefficients of a Walsh-Hadamard transform, chosen to cancel a quantisation error.    dW = alpha / sqrt(O) F H^T / I

Jeon, Lee, Kang, Kim, Kim 2025, "QWHA: Quantization-Aware Walsh-Hadamard Adaptation for Parameter-Efficient Fine-Tuning on Large Language
Models", arXiv:2509.17428, and the authors' code. H (I, I) of +-1; F (O, I) has n = r (O + I) numbers that are not 0.

``start="error"`` (as in the paper; ``attach(..., data=, original=)``): E = W_original - W, G the mean of x x^T, damped. F_full = E H. Row o
gets n_o of the n coefficients in proportion to ||F_full[o]||, at most I, those with the largest (h_k^T G h_k) F_full[o, k]^2; their values
are the least squares of the layer's output error. In float64. The authors take a root R of G, and solve for F_full and for the values
with R H; here it is the normal equations with H^T G H, the same numbers without a root. Does not start as the base: it repairs it.
``start="weight"``: for a base that is not compressed; F_full = W H chooses the places, G = 1, all values 0, so W' = W. Ours, not the paper's.

Trained: r (O + I) numbers a weight; their places are fixed.  H is stored nowhere: its transform acts on x.
Deviation: I must be K 2^k with an H that Paley or Sylvester built, which leaves out 156 and 172 of the authors' list.
alpha = 3000 and default_lr = 2e-4 are the paper's; not measured here.
"""

import math
from dataclasses import dataclass

import torch

from intarsia.edits import TRANSFORMS, Transformed, elements
from intarsia.errors import IntarsiaError
from intarsia.forms import Structured, shared_out
from intarsia.method import option
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Qwha(Structured):
    rank: int = option(64, "as many coefficients as a LoRA of this rank has numbers: r (O + I)")
    alpha: float = option(3000.0, "the update is multiplied by alpha / sqrt(O)")
    start: str = option(
        "error", "error: repair what compressing the base changed, weight: by W's own transform, from 0"
    )
    damping: float = option(1e-4, "of the mean square of the inputs, added to each")

    name, title, paper, role = "qwha", "QWHA", "arXiv:2509.17428", "quantization"
    formula, trained = "W' = W + alpha / sqrt(O) F H^T / I", "r (O + I)"
    default_lr = 2e-4
    small = ({"rank": 2, "start": "weight", "alpha": 20.0}, {"rank": 2, "alpha": 20.0})
    constants, recomputes = ("index",), True

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(0 < self.alpha < math.inf, "alpha", "positive")
        self.require(self.start in ("error", "weight"), "start", "error or weight")
        self.require(0 <= self.damping < math.inf, "damping", "0 or more")
        object.__setattr__(self, "starts_as_identity", self.start == "weight")

    def needs(self):
        return frozenset({"gram", "original"} if self.start == "error" else ())

    def check(self, site):
        (O, I), n = site.shape, self.trained_count(site.shape)
        if n > O * I:
            return f"{site.name}: rank={self.rank} asks for {n} coefficients of a {O} x {I} weight, which has {O * I}; lower it"
        try:
            TRANSFORMS["hadamard"].size(I)
        except IntarsiaError as error:
            return f"{site.name}: {error}"

    def shapes(self, shape):
        return {"values": (self.rank * (shape[0] + shape[1]),)}

    def init(self, site, start):
        T, (O, I), W = TRANSFORMS["hadamard"].forward, site.shape, site.weight.detach().cpu().double()
        repairs = self.start == "error"
        F = math.sqrt(I) * T(start.given("original").detach().cpu().double() - W if repairs else W)  # (O, I) E H
        K = torch.eye(I, dtype=torch.float64)
        if repairs:
            G = start.given("gram") + self.damping * start.given("gram").diagonal().mean() * K
            K = T(T(G).mT) / I  # (I, I) H^T G H / I^2
        counts = shared_out(self.trained_count(site.shape), F.norm(dim=1), I)
        order = (K.diagonal() * F.square()).argsort(dim=1, descending=True, stable=True)
        chosen = [row[:count].sort().values for row, count in zip(order, counts.tolist(), strict=True)]
        values = [
            torch.cholesky_solve((K[S] @ f)[:, None], torch.linalg.cholesky(K[S][:, S]))[:, 0] if repairs else f[S] * 0
            for S, f in zip(chosen, F, strict=True)
        ]
        index = torch.cat([row * I + S for row, S in enumerate(chosen)])
        return self.state(site, {"values": torch.cat(values) * math.sqrt(O) / self.alpha, "index": index})

    def structure(self, p):
        inner = elements(p.shape, p.index, p.values)
        return Transformed(p.shape, inner, (("identity", "hadamard"),), self.alpha / math.sqrt(p.shape[0] * p.shape[1]))

    def tensors(self, edit):
        return {"values": edit.inner.values, "index": edit.inner.index}
