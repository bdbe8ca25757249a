"""Edits that change every entry: a matrix of its own, and the product of Kronecker of two small ones."""

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
class Dense(Edit):
    """W' = W + values."""

    values: Tensor  # (O, I)

    kind = "dense"

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"values"})
        values = tensors["values"]
        if tuple(values.shape) != tuple(shape):
            raise IntarsiaError(f"values are {tuple(values.shape)}; expected {tuple(shape)}")
        want_numbers("values", values)
        return cls(shape, values)

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        return self.values.to(W.dtype)

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, values=self.values.to(dtype))

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Kronecker(Edit):
    """W' = W + scale * A ⊗ B: B once for every entry of A, each time multiplied by it. A (a, b), B (O / a, I / b)."""

    A: Tensor
    B: Tensor
    scale: float

    kind = "kronecker"

    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B}

    def facts(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"A", "B"})
        A, B = tensors["A"], tensors["B"]
        if A.ndim != 2 or B.ndim != 2 or (A.shape[0] * B.shape[0], A.shape[1] * B.shape[1]) != tuple(shape):
            raise IntarsiaError(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not multiply to {tuple(shape)}")
        want_numbers("A", A)
        want_numbers("B", B)
        return cls(shape, A, B, want_scale(facts))

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        return self.scale * torch.kron(self.A.to(W.dtype), self.B.to(W.dtype))

    def times(self, x: Tensor) -> Tensor:
        # Row-major, x is X (b, I / b), and y is A X B^T.
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        y: Tensor = self.scale * (A @ (x.unflatten(-1, (A.shape[1], B.shape[1])) @ B.mT)).flatten(-2)
        return y

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1]


for _kind in (Dense, Kronecker):
    KINDS[_kind.kind] = _kind
