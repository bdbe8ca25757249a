"""Fira: GaLore that does not throw the rest of the gradient away.    W <- W - lr_t (alpha P N + phi (G - P R)),  R = P^T G

Chen et al. 2024, "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv:2410.01623, section 4.
The rest is a step of SGD whose size, for each column (row, where the projection is on the right), is what the inner
optimizer did to the projected gradient: phi_j = ||N_j|| / ||R_j||. The *limiter* keeps its norm from growing by more than
``limiter`` from one step to the next. State: that of GaLore and one number a matrix, the norm of the last rest.

lr_t = lr sqrt(1 - b2^t) / (1 - b1^t) around an inner with Adam's betas, else lr; what the inner itself returns is divided
by it, so N is the paper's for any Adam. ``residual="official"`` is the authors' code, which takes G - alpha P R, so that
with alpha < 1 a part of what is in the subspace comes back in the rest; the default is the paper's equation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.named import option
from intarsia.optim.adam import PaperAdamW, correction
from intarsia.optim.galore import InSubspace, Subspaced, decay
from intarsia.optim.recipe import register
from intarsia.optim.wrapped import Inner, Params, one_of

FACTORS, RESIDUALS = ("column", "matrix"), ("paper", "official")


class Fira(InSubspace):
    """Fira around ``inner``, which is made with ``settings``.

    Args:
        rank, gap, scale, basis: as in GaLore.
        limiter: gamma, the most that the norm of the rest may grow by in a step; 0: no limit.
        factor: ``column``, a phi for each column or row, or ``matrix``, one for all.
        residual: ``paper`` or ``official``.
    """

    own = InSubspace.own | {"norm"}

    def __init__(
        self,
        params: Params,
        inner: Inner = PaperAdamW,
        lr: float = 1e-2,
        *,
        rank: int = 128,
        gap: int = 200,
        scale: float = 1.0,
        limiter: float = 1.01,
        factor: str = "column",
        residual: str = "paper",
        basis: str = "svd",
        weight_decay: float = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(
            params, inner, lr, weight_decay, settings, rank=rank, gap=gap, scale=scale, side="std", basis=basis,
            limiter=limiter, factor=factor, residual=residual, seed=seed,
        )  # fmt: skip

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        one_of(self, options, factor=FACTORS, residual=RESIDUALS, side=("std",))
        if options["limiter"] and not 1 <= options["limiter"] < float("inf"):
            raise IntarsiaError(f"Fira: limiter={options['limiter']!r} must be 1 or more, or 0 for no limit")

    def move(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any], q: Tensor | None) -> None:
        assert q is not None
        projection, shape = self.projection(group), (p.shape[0], p.shape[1])
        R = projection.down(G, state)
        factor = self._correction(group, state)
        N = q / -factor
        dims = None if group["factor"] == "matrix" else 0 if "P" in state else 1
        phi = _norm(N, dims) / (_norm(R, dims) + 1e-8)
        inside = projection.up(R, state, shape)
        S = self._limited(
            (G - (group["scale"] if group["residual"] == "official" else 1.0) * inside) * phi, group, state
        )
        lr = float(group["lr"])
        p.add_(projection.up(q, state, shape), alpha=lr * group["scale"])
        p.add_(S, alpha=-lr * factor)
        decay(p, group)

    def _correction(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
        if "betas" not in group or "step" not in state:
            return 1.0
        b1, b2 = group["betas"]
        return correction(b1, b2, float(state["step"]))

    def _limited(self, S: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
        norm = torch.linalg.vector_norm(S)
        if "norm" in state and group["limiter"]:
            over = ((norm / (state["norm"] + 1e-8)).clamp_min(group["limiter"])) / group["limiter"]
            S = S / over
            norm = torch.linalg.vector_norm(S)
        state["norm"] = norm.reshape(1)
        return S


def _norm(X: Tensor, dim: int | None) -> Tensor:
    """||X|| by columns (0), rows (1) or as a whole, in a shape that multiplies X."""
    norms: Tensor = torch.linalg.vector_norm(X, dim=dim, keepdim=dim is not None)
    return norms


@register
@dataclass(frozen=True)
class FiraRecipe(Subspaced):
    """Fira, as :class:`Fira` has it."""

    scale: float = option(1.0, "alpha, in front of the update of what is projected")
    limiter: float = option(1.01, "the most that the norm of the rest may grow by in a step; 0: no limit")
    factor: str = option("column", "how the rest is scaled: " + ", ".join(FACTORS))
    residual: str = option("paper", "what the rest is: paper (G - P R), official (G - alpha P R)")

    name, title, paper = "fira", "Fira", "arXiv:2410.01623"
    formula, state = "W <- W - lr (alpha P N + phi (G - P R))", "2 r max(m, n) + r min(m, n) + 1"
    default_lr = 1e-2
    small = ({"rank": 3, "gap": 3}, {"rank": 2, "gap": 2, "factor": "matrix", "residual": "official", "scale": 0.5})

    def make(self, groups: Params, lr: float, weight_decay: float) -> Fira:
        inner, settings = self.inside()
        return Fira(
            groups, inner, lr, weight_decay=weight_decay, rank=self.rank, gap=self.gap, scale=self.scale,
            limiter=self.limiter, factor=self.factor, residual=self.residual, basis=self.basis, seed=self.seed, **settings,
        )  # fmt: skip

    def numbers(self, shape: tuple[int, ...]) -> int:
        return super().numbers(shape) + (len(shape) == 2 and self.rank < min(shape))
