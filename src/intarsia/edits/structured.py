"""Edits of a structure: one tile all over the weight, and two that multiply the weight that they are set into.

Shapes: O out_features, I in_features, r rows or columns of a tile or block, m its other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.edits.edit import KINDS, Edit, LowRank, inner_edit, want_numbers, want_tensors
from intarsia.errors import IntarsiaError
from intarsia.support import Shape


class Everywhere(Edit):
    """An edit W' = W + delta(W) that reaches every entry: what is left to say is ``delta``, and how it is kept."""

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Tiled(Everywhere):
    """W'[o, j] = W[o, j] + D[j mod r, o mod m]: the tile D^T side by side over the weight, cut off at its edges (Bone)."""

    D: Tensor  # (r, m)

    kind = "tiled"

    def tensors(self) -> dict[str, Tensor]:
        return {"D": self.D}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"D"})
        D = tensors["D"]
        if D.ndim != 2 or not 1 <= D.shape[0] <= shape[1] or not 1 <= D.shape[1] <= shape[0]:
            raise IntarsiaError(f"D is {tuple(D.shape)}; expected a tile of at most {(shape[1], shape[0])}")
        want_numbers("D", D)
        return cls(shape, D)

    def delta(self, W: Tensor) -> Tensor:
        D, (O, I) = self.D.to(W.dtype), self.shape
        tiles: Tensor = D.mT.repeat(-(-O // D.shape[1]), -(-I // D.shape[0]))[:O, :I]
        return tiles

    def times(self, x: Tensor) -> Tensor:
        (r, m), (O, I) = self.D.shape, self.shape
        chunks = F.pad(x, (0, -I % r)).unflatten(-1, (-1, r))
        y: Tensor = chunks.sum(-2) @ self.D.to(x.dtype)  # (..., m)
        if m < O:
            y = y.repeat(*(1,) * (y.ndim - 1), -(-O // m))[..., :O]
        return y

    def low_rank(self) -> LowRank:
        (O, I), D = self.shape, self.D
        one = torch.eye(len(D), dtype=D.dtype, device=D.device)
        B = D.mT.repeat(-(-O // D.shape[1]), 1)[:O]
        return LowRank(self.shape, B, one.repeat(1, -(-I // len(D)))[:, :I], 1.0)

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, D=self.D.to(dtype))


class _OfWeight(Everywhere):
    """What it adds depends on the weight."""

    @property
    def needs_weight(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class BlockAffine(_OfWeight):
    """W'_pq = W_pq + W_pq B_p + B_p for the blocks W_pq (r, r) of W: one B_p for every row of blocks (BAT)."""

    B: Tensor  # (O / r, r, r)

    kind = "block_affine"

    def tensors(self) -> dict[str, Tensor]:
        return {"B": self.B}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"B"})
        B = tensors["B"]
        r = B.shape[-1] if B.ndim == 3 else 0
        if not r or tuple(B.shape) != (shape[0] // r, r, r) or shape[0] % r or shape[1] % r:
            raise IntarsiaError(f"B is {tuple(B.shape)}; expected (O / r, r, r), r a divisor of both of {tuple(shape)}")
        want_numbers("B", B)
        return cls(shape, B)

    def delta(self, W: Tensor) -> Tensor:
        B, r = self.B.to(W.dtype)[:, None], self.B.shape[-1]  # (O / r, 1, r, r)
        blocks = W.unflatten(1, (-1, r)).unflatten(0, (-1, r)).transpose(1, 2)  # (O / r, I / r, r, r)
        changes: Tensor = (blocks @ B + B).transpose(1, 2).reshape(W.shape)
        return changes

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, B=self.B.to(dtype))


@dataclass(frozen=True, eq=False)
class Multiplied(_OfWeight):
    """W' = W * (one + D) entry by entry, D what the inner edit adds; ``one`` is 1, or 0: W' = W * D (HUT, HiRA)."""

    inner: Edit
    one: float = 1.0

    kind = "multiplied"

    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors()

    def facts(self) -> dict[str, Any]:
        return {"inner": {"type": self.inner.kind} | self.inner.facts(), "one": self.one}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        one = facts.get("one")
        if one not in (0, 1):
            raise IntarsiaError(f"one is {one!r}; expected 1: W * (1 + D), or 0: W * D")
        return cls(shape, inner_edit(shape, tensors, facts), float(one))

    def delta(self, W: Tensor) -> Tensor:
        change = W * self.inner.delta(W)
        return change if self.one else change - W

    def fold(self, W: Tensor) -> Tensor:
        D = self.inner.delta(W)
        return W * (1 + D) if self.one else W * D

    def supports(self) -> dict[str, int]:
        return self.inner.supports()

    def rounded(self, dtype: torch.dtype) -> Edit:
        # Where D itself multiplies the weight, rounding it would change the weight by more than what was learned.
        return replace(self, inner=self.inner.rounded(dtype)) if self.one else self


for _kind in (Tiled, BlockAffine, Multiplied):
    KINDS[_kind.kind] = _kind
