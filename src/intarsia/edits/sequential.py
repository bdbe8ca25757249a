"""The sequential edit: a low-rank matrix behind the layer, which reads what the layer makes.    W' = (I + s U D) W"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from intarsia.edits.edit import KINDS, Edit, want_numbers, want_scale, want_tensors
from intarsia.errors import IntarsiaError
from intarsia.support import Shape


@dataclass(frozen=True, eq=False)
class Sequential(Edit):
    """W' = W + scale * U D W; of a bias, seen as a matrix of one column, b' = b + scale * U D b."""

    U: Tensor  # (O, r)
    D: Tensor  # (r, O)
    scale: float

    kind = "sequential"

    def tensors(self) -> dict[str, Tensor]:
        return {"U": self.U, "D": self.D}

    def facts(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"U", "D"})
        U, D = tensors["U"], tensors["D"]
        if U.ndim != 2 or tuple(D.shape) != (U.shape[1], U.shape[0]) or len(U) != shape[0]:
            raise IntarsiaError(
                f"U {tuple(U.shape)} and D {tuple(D.shape)} do not multiply to {(shape[0], shape[0])}, the outputs of {tuple(shape)}"
            )
        want_numbers("U", U)
        want_numbers("D", D)
        return cls(shape, U, D, want_scale(facts))

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        return self.scale * (self.U.to(W.dtype) @ (self.D.to(W.dtype) @ W))

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, U=self.U.to(dtype), D=self.D.to(dtype))

    @property
    def needs_weight(self) -> bool:
        return True

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1]


KINDS[Sequential.kind] = Sequential
