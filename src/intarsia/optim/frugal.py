"""FRUGAL: a small part of each gradient with a stateful optimizer, the rest with its sign.    W <- W - lr (up(inner(down G)) + kappa sign(rest))

Zmushko et al. 2024, "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
arXiv:2411.07837, section 4. What is stateful is drawn anew every ``gap`` steps, and by default the inner begins anew there.
State around Adam: 2 density m n numbers a matrix, and what the selector keeps (columns: density n; rows: density m;
entries: density m n; svd and random: r times the shorter side; block: nothing, and all of it or none).

Around any inner optimizer, by default ``torch.optim.AdamW``. Weight decay comes first and is decoupled.
Selectors: columns, rows, entries (the paper's RandK), block (whole tensors in turn), svd, random (a subspace; there sign(rest)
moves the subspace as well, as in the authors' code). ``density=0`` keeps no state of a matrix at all (signSGD).
GaLore is svd + none without reset; BAdam block + none. ``order`` of blocks: random, ascending, descending, mirror (to and fro).
Here a draw depends on the seed, the tensor's number and the period alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.named import option
from intarsia.optim.galore import decay
from intarsia.optim.projection import Entries, Lines, Projection, Shape, Subspace, Whole, generator
from intarsia.optim.recipe import Projecting, register
from intarsia.optim.wrapped import Inner, Params, Wrapped, one_of, whole

SELECTORS = ("columns", "rows", "entries", "block", "svd", "random")
RESTS = ("sign", "sgd", "none")
ORDERS = ("random", "ascending", "descending", "mirror")


class Frugal(Wrapped):
    """FRUGAL around ``inner``, which is made with ``settings``.

    Args:
        density: rho, the share with a state, in [0, 1].
        selector: of what it is a share.
        gap: optimizer steps from one draw to the next.
        kappa: the rest moves at kappa times the learning rate: 1 from scratch, 0.1 in fine-tuning.
        scale: of the learning rate of all that is projected.
        rest: sign, sgd (the rest as it is) or none.
        reset: whether the inner begins anew at each draw.
        order: block: which tensors come next.
    """

    own = Wrapped.own | {"active"}

    def __init__(
        self,
        params: Params,
        inner: Inner = torch.optim.AdamW,
        lr: float = 1e-3,
        *,
        density: float = 0.25,
        selector: str = "columns",
        gap: int = 200,
        kappa: float = 1.0,
        scale: float = 1.0,
        rest: str = "sign",
        reset: bool = True,
        order: str = "random",
        weight_decay: float = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(
            params, inner, lr, weight_decay, settings, density=density, selector=selector, gap=gap, kappa=kappa,
            scale=scale, rest=rest, reset=reset, order=order, seed=seed,
        )  # fmt: skip

    def check(self, options: Mapping[str, Any]) -> None:
        whole(self, options, "gap")
        one_of(self, options, selector=SELECTORS, rest=RESTS, order=ORDERS)
        if not 0 <= options["density"] <= 1:
            raise IntarsiaError(f"Frugal: density={options['density']!r} must be in [0, 1]")

    def projection(self, group: Mapping[str, Any], shape: Shape) -> Projection:
        return selector(group["selector"], group["density"], shape)

    def projects(self, group: Mapping[str, Any], shape: Shape) -> bool:
        return True

    def proxy_shape(self, group: Mapping[str, Any], shape: Shape) -> tuple[int, ...]:
        return self.projection(group, shape).seen(shape)

    def down(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> Tensor | None:
        turn, projection = state.get("turn", 0), self.projection(group, _shape(p))
        if turn % group["gap"] == 0:
            self._draw(p, G, group, state, turn // group["gap"])
        state["turn"] = turn + 1
        return projection.down(G, state) if state["active"] else None

    def _draw(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any], period: int) -> None:
        projection, place = self.projection(group, _shape(p)), self.places()
        if group["reset"]:
            self.forget(p)
        if group["selector"] == "block":
            state["active"] = place[p] in blocks(len(place), group["density"], group["order"], period, group["seed"])
            if not state["active"]:
                self.forget(p)
        else:
            state["active"] = 0 not in projection.seen(_shape(p))
            state |= projection.draw(G, generator(group["seed"], place[p], period)) if state["active"] else {}

    def move(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any], q: Tensor | None) -> None:
        projection, lr = self.projection(group, _shape(p)), float(group["lr"]) * group["scale"]
        decay(p, group)
        if q is not None:
            p.add_(projection.up(q, state, _shape(p)), alpha=lr)
        if group["rest"] != "none":
            rest = G if q is None else projection.rest(G, state)
            p.add_(rest.sign() if group["rest"] == "sign" else rest, alpha=-lr * group["kappa"])


def selector(name: str, density: float, shape: Shape) -> Projection:
    """The projection of a selector's name at a weight of this shape."""
    if name in ("columns", "rows"):
        return Lines(density, 1 if name == "columns" else 0)
    if name in ("svd", "random"):
        return Subspace(round(density * min(shape)), basis=name)
    return Entries(density) if name == "entries" else Whole()


def blocks(count: int, density: float, order: str, period: int, seed: int = 0) -> set[int]:
    """Which of ``count`` tensors are active in a period: round(density * count) of them, the next ones in the order."""
    size = round(density * count)
    return {_turn(place, count, order, seed) for place in range(period * size, (period + 1) * size)}


def _turn(place: int, count: int, order: str, seed: int) -> int:
    """The tensor whose turn it is at a place of the endless order, in which each sweep has every tensor once."""
    sweep, at = divmod(place, count)
    if order == "random":
        return int(torch.randperm(count, generator=generator(seed, -1, sweep))[at])
    return count - 1 - at if order == "descending" or (order == "mirror" and sweep % 2) else at


@register
@dataclass(frozen=True)
class FrugalRecipe(Projecting):
    """FRUGAL, as :class:`Frugal` has it."""

    density: float = option(0.25, "rho, the share with a state, in [0, 1]")
    selector: str = option("columns", "of what it is a share: " + ", ".join(SELECTORS))
    gap: int = option(200, "optimizer steps from one draw to the next")
    kappa: float = option(1.0, "the rest moves at kappa times the learning rate: 1 from scratch, 0.1 in fine-tuning")
    scale: float = option(1.0, "of the learning rate of all that is projected")
    rest: str = option("sign", "how the rest moves: sign, sgd (as it is), none")
    reset: bool = option(True, "whether the inner optimizer begins anew at each draw")
    order: str = option("random", "block: which tensors come next: " + ", ".join(ORDERS))
    seed: int = option(0, "of the draws")

    name, title, paper = "frugal", "FRUGAL", "arXiv:2411.07837"
    formula, state = "W <- W - lr (up(inner(down G)) + kappa sign(rest))", "2 rho m n + rho n"
    default_lr = 1e-3
    small = (*({"density": 0.5, "gap": 3, "selector": name} for name in ("columns", "entries", "random")),
             {"density": 0.3333, "gap": 2, "selector": "block"},
             {"density": 0.4, "gap": 2, "selector": "svd", "rest": "none", "reset": False},
             {"density": 0.0, "gap": 2, "selector": "rows", "rest": "sgd", "kappa": 0.1})  # fmt: skip

    def make(self, groups: Params, lr: float, weight_decay: float) -> Frugal:
        inner, settings = self.inside()
        return Frugal(
            groups, inner, lr, weight_decay=weight_decay, density=self.density, selector=self.selector, gap=self.gap,
            kappa=self.kappa, scale=self.scale, rest=self.rest, reset=self.reset, order=self.order, seed=self.seed, **settings,
        )  # fmt: skip

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Of a block: its share of the whole, as if it were active that share of the time."""
        if len(shape) != 2:
            return self.moments() * math.prod(shape)
        if self.selector == "block":
            return round(self.density * self.moments() * math.prod(shape))
        m, n = shape
        projection = selector(self.selector, self.density, (m, n))
        seen = math.prod(projection.seen((m, n)))
        return self.moments() * seen + (projection.kept((m, n)) if seen else 0)


def _shape(p: Tensor) -> Shape:
    return p.shape[0], p.shape[1]
