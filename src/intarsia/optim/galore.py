"""GaLore: full-parameter training whose moments live in a low-rank part of each gradient.    W <- W - lr alpha P inner(P^T G)

Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv:2403.03507, section 4.
State of an m x n matrix, m < n, around Adam: 2 r n + r m numbers instead of 2 m n; a refresh every ``gap`` steps by SVD of
the gradient. The moments stay as they are at a refresh, as in the authors' code.

Around any inner optimizer, by default Adam with eps where the authors have it (``PaperAdamW``). Every 2-D parameter
with sides above the rank is projected unless its group says ``project: False``; the others go to the inner as they are.
Weight decay of what is projected is decoupled, after the step. Left out: 8-bit moments, steps within backward, tensors
of more than two dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intarsia.named import option
from intarsia.optim.adam import PaperAdamW
from intarsia.optim.projection import BASES, SIDES, Subspace, generator
from intarsia.optim.recipe import Projecting, register
from intarsia.optim.wrapped import Inner, Params, Wrapped, one_of, whole


class InSubspace(Wrapped):
    """What GaLore and Fira share: a subspace for every matrix, drawn anew every ``gap`` steps. Group options: rank, gap, side,
    basis, seed."""

    def check(self, options: Mapping[str, Any]) -> None:
        whole(self, options, "rank", "gap")
        one_of(self, options, side=SIDES, basis=tuple(BASES))

    def projection(self, group: Mapping[str, Any]) -> Subspace:
        return Subspace(group["rank"], group["side"], group["basis"])

    def projects(self, group: Mapping[str, Any], shape: tuple[int, int]) -> bool:
        return bool(group["rank"] < min(shape))

    def proxy_shape(self, group: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, ...]:
        return self.projection(group).seen(shape)

    def down(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor:
        turn, projection = state.get("turn", 0), self.projection(group)
        if turn % group["gap"] == 0:
            state |= projection.draw(G, generator(group["seed"], self.places()[p], turn // group["gap"]))
        state["turn"] = turn + 1
        return projection.down(G, state)


class GaLore(InSubspace):
    """GaLore around ``inner``, which is made with ``settings``: betas, eps, momentum.

    Args:
        rank: r; at most the shorter side of a matrix counts.
        gap: optimizer steps from one subspace to the next.
        scale: alpha, in front of the update of what is projected.
        side: std (the shorter side is projected away), reverse_std, left, right, full (both).
        basis: svd, or random (as in the follow-ups that save its time).
    """

    def __init__(
        self,
        params: Params,
        inner: Inner = PaperAdamW,
        lr: float = 1e-2,
        *,
        rank: int = 128,
        gap: int = 200,
        scale: float = 0.25,
        side: str = "std",
        basis: str = "svd",
        weight_decay: float = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(
            params,
            inner,
            lr,
            weight_decay,
            settings,
            rank=rank,
            gap=gap,
            scale=scale,
            side=side,
            basis=basis,
            seed=seed,
        )

    def move(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any], q: Tensor | None) -> None:
        assert q is not None
        p.add_(self.projection(group).up(q, state, (p.shape[0], p.shape[1])), alpha=float(group["lr"] * group["scale"]))
        decay(p, group)


def decay(p: Tensor, group: Mapping[str, Any]) -> None:
    """Decoupled weight decay. In place."""
    if group["weight_decay"]:
        p.mul_(1 - float(group["lr"]) * group["weight_decay"])


@dataclass(frozen=True)
class Subspaced(Projecting):
    """The settings that GaLore and Fira share."""

    inner: str = option(
        "paper-adamw", "the optimizer inside: paper-adamw (eps as the authors have it), adamw, sgd, ..."
    )
    eps: float = option(1e-6, "what keeps the inner optimizer from dividing by zero")
    rank: int = option(128, "rank r of the subspace of each gradient")
    gap: int = option(200, "optimizer steps from one subspace to the next")
    basis: str = option("svd", "what spans it: " + ", ".join(BASES))
    seed: int = option(0, "of random subspaces")

    def subspace(self) -> Subspace:
        return Subspace(self.rank, "std", self.basis)

    def numbers(self, shape: tuple[int, ...]) -> int:
        if len(shape) != 2 or self.rank >= min(shape):
            return self.moments() * math.prod(shape)
        subspace, (m, n) = self.subspace(), shape
        return self.moments() * math.prod(subspace.seen((m, n))) + subspace.kept((m, n))


@register
@dataclass(frozen=True)
class GaloreRecipe(Subspaced):
    """GaLore, as :class:`GaLore` has it."""

    scale: float = option(0.25, "alpha, in front of the update of what is projected")
    side: str = option("std", "what is projected away: std (the shorter side), reverse_std, left, right, full (both)")

    name, title, paper = "galore", "GaLore", "arXiv:2403.03507"
    formula, state = "W <- W - lr alpha P inner(P^T G)", "2 r max(m, n) + r min(m, n)"
    default_lr = 1e-2
    small = ({"rank": 3, "gap": 3}, {"rank": 2, "gap": 2, "side": "full", "inner": "sgdm", "basis": "random"})

    def subspace(self) -> Subspace:
        return Subspace(self.rank, self.side, self.basis)

    def make(self, groups: Params, lr: float, weight_decay: float) -> GaLore:
        inner, settings = self.inside()
        return GaLore(
            groups, inner, lr, weight_decay=weight_decay,
            rank=self.rank, gap=self.gap, scale=self.scale, side=self.side, basis=self.basis, seed=self.seed, **settings,
        )  # fmt: skip

    def usual_lr(self, lr: float) -> float:
        return lr / self.scale
