"""The block edit: low ranks side by side on the diagonal.    W' = W + scale * blockdiag(B_1 A_1, ..., B_n A_n)

Shapes: O out_features, I in_features, n blocks, r rank of each; B (n, O / n, r), A (n, r, I / n).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from intarsia.edits.edit import KINDS, Edit, LowRank, want_numbers, want_scale, want_tensors
from intarsia.errors import IntarsiaError
from intarsia.support import Shape


def diagonal(blocks: Tensor) -> Tensor:
    """Each block in its place, zeros elsewhere. (n, a, b) -> (n a, n b)."""
    whole: Tensor = torch.block_diag(*blocks.unbind())
    return whole


@dataclass(frozen=True, eq=False)
class Blocks(Edit):
    """W' = W + scale * blockdiag(B_i A_i): the rank is n r, the numbers are those of one low rank r."""

    B: Tensor  # (n, O / n, r)
    A: Tensor  # (n, r, I / n)
    scale: float

    kind = "blocks"

    def tensors(self) -> dict[str, Tensor]:
        return {"B": self.B, "A": self.A}

    def facts(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"A", "B"})
        A, B = tensors["A"], tensors["B"]
        if A.ndim != 3 or B.ndim != 3 or len(A) < 1 or (B.shape[0], B.shape[2]) != tuple(A.shape[:2]):
            raise IntarsiaError(f"B {tuple(B.shape)} and A {tuple(A.shape)} are no blocks (n, ., r) and (n, r, .)")
        if (len(B) * B.shape[1], len(A) * A.shape[2]) != tuple(shape):
            raise IntarsiaError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not make up {tuple(shape)}")
        want_numbers("A", A)
        want_numbers("B", B)
        return cls(shape, B, A, want_scale(facts))

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))

    def delta(self, W: Tensor) -> Tensor:
        return diagonal(self.scale * (self.B.to(W.dtype) @ self.A.to(W.dtype)))

    def low_rank(self) -> LowRank:
        return LowRank(self.shape, diagonal(self.B), diagonal(self.A), self.scale)

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1] // len(self.A)


KINDS[Blocks.kind] = Blocks
