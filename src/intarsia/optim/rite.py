"""LoRA-RITE: an adaptive optimizer for pairs (B, A) whose effect on B A does not depend on how the product is split.

Yen et al. 2024, "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", arXiv:2410.20625, section 3.
Of a pair with A' = A^T (n, r), B (m, r):    B = U_B R_B,  A' = U_A R_A  (QR)
    u_A = (dL/dA)^T R_B^+,  u_B = (dL/dB) R_A^+                       the gradients, without the size of the other factor
    P_A = U_B^T U_B(before),  V_A <- b2 P_A V_A P_A^T + (1 - b2) u_A^T u_A / n,  b at step t: b (1 - b^(t-1)) / (1 - b^t)
    M_A <- b1 M_A P_A^T + (1 - b1) u_A V_A^(-1/2),  A' <- A' - lr M_A R_B^(-T);  B likewise
State: 2 r (m + n) + 2 r^2 numbers a pair (Adam's: 2 r (m + n)).

At the start B = 0 and so R_B = 0: A waits for one step. As in the authors' code u is dropped (taken as 0) where its RMS is above
``drop``, and all of them are scaled down together where their norm is above ``clip``; V^(-1/2) is 1 / (sqrt w + eps) of the
eigenvalues w, those below 0 by rounding taken as 0. Left out: the escape mass of the theory, which the released code has
off, its clipping of updates and its balancing of norms, also off. Decompositions are in float32 at least. What is in no
pair goes to AdamW with the same learning rate; weight decay on a factor is added to its update, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.named import option
from intarsia.optim.parts import Part, grouped, pairs
from intarsia.optim.recipe import Recipe, register
from intarsia.optim.wrapped import Inner, Params, Wrapped


class LoraRite(Wrapped):
    """LoRA-RITE for groups with ``paired: True``, whose parameters are B, A, B, A, ...; ``inner`` for the others.

    Args:
        drop: an unmagnified gradient whose root mean square is above this counts as 0; 0: none does.
        clip: the norm of all unmagnified gradients together is at most this; 0: no limit.
    """

    own = frozenset({"pair_step", "moment", "second", "basis"})

    def __init__(
        self,
        params: Params,
        inner: Inner = torch.optim.AdamW,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        drop: float = 1.0,
        clip: float = 1.0,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> None:
        options = {"paired": False, "rite_betas": betas, "rite_eps": eps, "drop": drop, "clip": clip}
        super().__init__(params, inner, lr, weight_decay, settings, **options)

    def check(self, options: Mapping[str, Any]) -> None:
        for field in ("rite_eps", "drop", "clip"):
            if not 0 <= options[field] < float("inf"):
                raise IntarsiaError(f"LoraRite: {field}={options[field]!r} must be 0 or more")
        shapes = [tuple(t.shape) for t in options["params"]]
        fits = len(shapes) % 2 == 0 and all(
            len(B) == len(A) == 2 and B[1] == A[0] <= min(B[0], A[1])
            for B, A in zip(shapes[::2], shapes[1::2], strict=True)
        )
        if options["paired"] and not fits:
            raise IntarsiaError(
                f"LoraRite: a paired group is B (m, r), A (r, n), B, A, ... with r of at most m and n; found {shapes[:6]}"
            )

    def selects(self, group: Mapping[str, Any], p: Tensor) -> bool:
        return bool(group["paired"])

    def proxy_shape(self, group: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, ...]:
        return (0,)

    def down(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any]) -> None:
        return None

    def move(self, p: Tensor, G: Tensor, group: Mapping[str, Any], state: dict[str, Any], q: Tensor | None) -> None:
        pass  # pairs move together, below

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        pairs = [
            _Pair(B, A, group)
            for group in self.param_groups
            if group["paired"]
            for B, A in zip(group["params"][::2], group["params"][1::2], strict=True)
            if B.grad is not None and A.grad is not None
        ]
        total = sum(
            (u.square().sum().double().cpu() for pair in pairs for u in pair.u), torch.zeros((), dtype=torch.float64)
        )
        for pair in pairs:
            clip = pair.group["clip"]
            pair.step(
                self.state[pair.B],
                self.state[pair.A],
                min(1.0, clip / max(float(total.sqrt()), 1e-300)) if clip else 1.0,
            )
        return loss


class _Pair:
    """One step of a pair: A' = A^T (n, r) and B (m, r), each with the basis and the size of the other."""

    def __init__(self, B: Tensor, A: Tensor, group: Mapping[str, Any]) -> None:
        self.B, self.A, self.group = B, A, group
        assert B.grad is not None
        assert A.grad is not None
        wide = torch.promote_types(B.dtype, torch.float32)
        (U_B, R_B), (U_A, R_A) = (torch.linalg.qr(X.to(wide)) for X in (B, A.mT))
        self.bases = (U_A, U_B)  # that B's gradient is written in, and A's
        self.inverses = (torch.linalg.pinv(R_A), torch.linalg.pinv(R_B))
        self.u = tuple(self._kept(G.to(wide) @ R) for G, R in zip((B.grad, A.grad.mT), self.inverses, strict=True))

    def _kept(self, u: Tensor) -> Tensor:
        drop = self.group["drop"]
        return torch.zeros_like(u) if drop and float(u.square().mean().sqrt()) > drop else u

    def step(self, state_B: dict[str, Any], state_A: dict[str, Any], shrink: float) -> None:
        """Move both. ``shrink``: what the clipped norm leaves of every u."""
        lr, decay = float(self.group["lr"]), self.group["weight_decay"]
        for X, u, U, R, state in zip(
            (self.B, self.A), self.u, self.bases, self.inverses, (state_B, state_A), strict=True
        ):
            update = advance(state, shrink * u, U, self.group["rite_betas"], self.group["rite_eps"]) @ R.mT
            update = update if X is self.B else update.mT
            X.add_((update + decay * X if decay else update).to(X.dtype), alpha=-lr)


def advance(state: dict[str, Any], u: Tensor, U: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """One step of a factor's moments, in the basis U of the other factor. -> M, in the rows of u (k, r)."""
    if not state:
        r = u.shape[1]
        state |= {
            "pair_step": 0,
            "moment": torch.zeros_like(u),
            "second": u.new_zeros(r, r),
            "basis": torch.zeros_like(U),
        }
    state["pair_step"] += 1
    b1, b2 = (corrected(b, state["pair_step"]) for b in betas)
    P = U.mT @ state["basis"]
    V = b2 * (P @ state["second"] @ P.mT) + (1 - b2) * (u.mT @ u / len(u))
    V = (V + V.mT) / 2
    M: Tensor = b1 * (state["moment"] @ P.mT) + (1 - b1) * (u @ inverse_root(V, eps))
    state |= {"moment": M, "second": V, "basis": U}
    return M


def corrected(beta: float, t: int) -> float:
    """b (1 - b^(t - 1)) / (1 - b^t): with it an average weighs all steps so far as bias correction would."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def inverse_root(V: Tensor, eps: float) -> Tensor:
    """V^(-1/2) of a symmetric V (r, r), 1 / (sqrt w + eps) of its eigenvalues."""
    w, Q = torch.linalg.eigh(V)
    root: Tensor = Q * (1 / (w.clamp_min(0).sqrt() + eps)) @ Q.mT
    return root


@register
@dataclass(frozen=True)
class RiteRecipe(Recipe):
    """LoRA-RITE, as :class:`LoraRite` has it; ``inner`` is for what is in no pair."""

    eps: float = option(1e-6, "added to the roots of the second moments")
    drop: float = option(1.0, "an unmagnified gradient with a root mean square above this counts as 0; 0: none does")
    clip: float = option(1.0, "the norm of all unmagnified gradients together is at most this; 0: no limit")

    name, title, paper = "lora-rite", "LoRA-RITE", "arXiv:2410.20625"
    formula, state = "A' <- A' - lr M R_B^-T,  M of u V^(-1/2),  u = G^T U_B", "2 r (m + n) + 2 r^2 a pair"
    default_lr = 1e-3
    needs_pairs = True
    small = ({}, {"drop": 0.0, "clip": 0.0})

    def make(self, groups: Params, lr: float, weight_decay: float) -> LoraRite:
        inner, _ = self.inside()
        own: dict[str, Any] = {"betas": (self.beta1, self.beta2), "eps": self.eps, "drop": self.drop, "clip": self.clip}
        return LoraRite(groups, inner, lr, weight_decay=weight_decay, **own)

    def groups(self, found: list[Part], lr: float) -> list[dict[str, Any]]:
        paired = [part for pair in pairs(found) for part in pair]
        inside = {part.name for part in paired}
        others = [part for part in found if part.name not in inside]
        return [
            {"params": [part.parameter for part in paired], "paired": True},
            *grouped({"other": others}, {"other": {}}),
        ]

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Of a factor: its first moment, the basis of the other one's rows is counted there, and a second moment."""
        if len(shape) != 2:
            return self.moments() * math.prod(shape)
        return 2 * math.prod(shape) + min(shape) ** 2
