"""Edits on random matrices that a seed stands for: what was learned is how these are mixed, and only that is in a file.

    combined    W' = W + scale * B A,  A = A_0 + sum_i a_i E_i,  B = sum_j c_j F_j
    scaled      W' = W + scale * sum_j B_j diag(lambda_j) A diag(gamma_j)

The random matrices are made by :func:`intarsia.support.noise`, each time that they are needed.
Shapes: O out_features, I in_features, r rank, k and l matrices combined, D the larger and d the smaller of O and I, n bases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from intarsia.edits.edit import KINDS, Edit, LowRank, want_numbers, want_scale, want_tensors
from intarsia.errors import IntarsiaError
from intarsia.support import Shape, combination, noise

START, DOWN, UP = 0, 1, 2  # streams of the combined edit: A_0, E, F
LARGE, SMALL = 0, 1  # streams of the scaled edit: B, A
BASES = ("dense", "sparse", "very_sparse")
ORDERS = ("paper", "peft", "summed")


def combined_factors(a: Tensor, c: Tensor, key: Tensor, shape: Shape, rank: int) -> tuple[Tensor, Tensor]:
    """B (O, r) and A (r, I) of the combined edit, in the coefficients' dtype. ``key``: () int64 on their device."""
    (O, I), wide = shape, torch.promote_types(a.dtype, torch.float32)
    A0 = noise(key, START, (0, rank), (0, I), wide) / math.sqrt(I)  # as Kaiming uniform with a = sqrt 5
    A = A0 + combination(a.to(wide), key, DOWN, rank * I).view(rank, I)
    B = combination(c.to(wide), key, UP, O * rank).view(O, rank)
    return B.to(c.dtype), A.to(a.dtype)


def bases(key: Tensor, shape: Shape, rank: int, count: int, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B (D, n, r) and A (r, d) of the scaled edit, of variance 1; those of a smaller weight are slices of a larger one's.

    dense: U(-1, 1) sqrt 3. Otherwise -sqrt s and sqrt s with a chance of 1 / 2s each, else 0; s is 3 where sparse, sqrt d where
    very sparse.
    """
    D, d = max(shape), min(shape)
    wide = torch.promote_types(dtype, torch.float32)
    both = [noise(key, LARGE, (0, D), (0, count * rank), wide), noise(key, SMALL, (0, rank), (0, d), wide)]
    if kind == "dense":
        B, A = (math.sqrt(3) * N for N in both)
    else:
        s = 3.0 if kind == "sparse" else math.sqrt(d)
        B, A = (math.sqrt(s) * N.sign() * (N.abs() < 1 / s) for N in both)
    return B.view(D, count, rank).to(dtype), A.to(dtype)


def scaled_factors(
    lam: Tensor, gamma: Tensor, key: Tensor, shape: Shape, kind: str, order: str
) -> tuple[Tensor, Tensor]:
    """Two factors (O, m) and (m, I) whose product is the scaled edit's sum; m = n r. lam (r, n), gamma (n, d).

    ``order``: paper pairs basis j's column k with row (j, k) of the scaled A; peft pairs it with the row that comes as far down
    where k goes first, as HF PEFT lays them out: the same in distribution, other numbers. summed is the paper's ablation
    (sum_j B_j diag(lambda_j)) (A sum_j diag(gamma_j)), m = r.
    """
    B, A = bases(key, shape, lam.shape[0], lam.shape[1], kind, lam.dtype)
    if order == "summed":
        large, small = torch.einsum("Djk,kj->Dk", B, lam), A * gamma.sum(0)
    else:
        rows: Tensor = _Scaled.apply(A, lam, gamma)  # type: ignore[no-untyped-call]  # (r, n, d)
        large, small = B.flatten(1), (rows.transpose(0, 1) if order == "paper" else rows).flatten(0, 1)
    return (large, small) if shape[0] >= shape[1] else (small.mT, large.mT)


class _Scaled(torch.autograd.Function):
    """U_kjt = lambda_kj A_kt gamma_jt, of which only A, lambda and gamma are kept. -> (r, n, d)."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(A, lam, gamma)
        return lam[:, :, None] * A[:, None] * gamma

    @staticmethod
    @once_differentiable  # what is kept has no graph, so a second derivative would be wrong without a word
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        A, lam, gamma = ctx.saved_tensors
        return None, torch.einsum("kjt,kt,jt->kj", g, A, gamma), torch.einsum("kjt,kt,kj->jt", g, A, lam)


def _seed(facts: Mapping[str, Any]) -> int:
    seed = facts.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise IntarsiaError(f"seed is {seed!r}; expected a whole number from 0 to 2^63 - 1")
    return seed


@dataclass(frozen=True, eq=False)
class Combined(Edit):
    """W' = W + scale * B A of rank r, both factors mixtures of random ones: k + l numbers, whatever the shape and the rank."""

    a: Tensor  # (k,)
    c: Tensor  # (l,)
    rank: int
    seed: int
    scale: float

    kind = "combined"

    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a, "c": self.c}

    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "seed": self.seed, "scale": self.scale}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"a", "c"})
        for name, tensor in tensors.items():
            if tensor.ndim != 1 or not len(tensor):
                raise IntarsiaError(f"{name} is {tuple(tensor.shape)}; expected one row of coefficients")
            want_numbers(name, tensor)
        rank = facts.get("rank")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(shape):
            raise IntarsiaError(f"rank is {rank!r}; expected a whole number from 1 to {min(shape)}")
        return cls(shape, tensors["a"], tensors["c"], rank, _seed(facts), want_scale(facts))

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        B, A = self._factors(W.dtype)
        return self.scale * (B @ A)

    def low_rank(self) -> LowRank:
        return LowRank(self.shape, *self._factors(self.a.dtype), self.scale)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = torch.tensor(self.seed, device=self.a.device)
        return combined_factors(self.a.to(dtype), self.c.to(dtype), key, self.shape, self.rank)

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Scaled(Edit):
    """W' = W + scale * sum_j B_j diag(lambda_j) A diag(gamma_j), transposed where O < I: of full rank where n r >= d."""

    lam: Tensor  # (r, n), "lambda" in a file
    gamma: Tensor  # (n, d)
    seed: int
    bases: str
    order: str
    scale: float

    kind = "scaled"

    def tensors(self) -> dict[str, Tensor]:
        return {"lambda": self.lam, "gamma": self.gamma}

    def facts(self) -> dict[str, Any]:
        return {"seed": self.seed, "bases": self.bases, "order": self.order, "scale": self.scale}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"lambda", "gamma"})
        lam, gamma = tensors["lambda"], tensors["gamma"]
        if lam.ndim != 2 or not lam.numel() or tuple(gamma.shape) != (lam.shape[1], min(shape)):
            raise IntarsiaError(
                f"lambda {tuple(lam.shape)} and gamma {tuple(gamma.shape)} are not (r, n) and (n, {min(shape)})"
            )
        want_numbers("lambda", lam)
        want_numbers("gamma", gamma)
        kind, order = facts.get("bases"), facts.get("order")
        if kind not in BASES or order not in ORDERS:
            raise IntarsiaError(
                f"bases {kind!r} and order {order!r}; expected one of {', '.join(BASES)} and of {', '.join(ORDERS)}"
            )
        return cls(shape, lam, gamma, _seed(facts), kind, order, want_scale(facts))

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        left, right = self._factors(W.dtype)
        return self.scale * (left @ right)

    def low_rank(self) -> LowRank | None:
        if self.order != "summed":
            return None
        left, right = self._factors(self.lam.dtype)
        return LowRank(self.shape, left, right, self.scale)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = torch.tensor(self.seed, device=self.lam.device)
        return scaled_factors(self.lam.to(dtype), self.gamma.to(dtype), key, self.shape, self.bases, self.order)

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1]


for _kind in (Combined, Scaled):
    KINDS[_kind.kind] = _kind
