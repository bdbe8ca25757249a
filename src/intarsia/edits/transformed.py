"""The transformed edit: another edit's change between two fixed orthogonal transforms.    W' = W + scale * sum T_out^T C T_in

C is what the inner edit adds, of any kind that adds to any weight: a low rank in a wavelet's band (WaRA), single coefficients of a
Hadamard transform (QWHA). Several pairs of transforms with one C are several bands that share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from intarsia.edits.edit import KINDS, Edit, LowRank, inner_edit, want_scale
from intarsia.edits.structured import Everywhere
from intarsia.edits.transforms import TRANSFORMS
from intarsia.errors import IntarsiaError, nearest
from intarsia.support import Shape

Pairs = tuple[tuple[str, str], ...]  # (of the outputs, of the inputs), by their names


@dataclass(frozen=True, eq=False)
class Transformed(Everywhere):
    """W' = W + scale * sum over pairs of T_out^T C T_in. C (P, Q), as long and wide as the coefficients."""

    inner: Edit  # of shape (P, Q)
    pairs: Pairs
    scale: float = 1.0

    kind = "transformed"

    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors()

    def facts(self) -> dict[str, Any]:
        inner = {"type": self.inner.kind} | self.inner.facts()
        return {"inner": inner, "pairs": [list(pair) for pair in self.pairs], "scale": self.scale}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        found = facts.get("pairs")
        if not isinstance(found, list) or not found or not all(isinstance(p, list) and len(p) == 2 for p in found):
            raise IntarsiaError(f"pairs is {found!r}; expected a list of [transform of outputs, transform of inputs]")
        for name in (name for pair in found for name in pair):
            if not isinstance(name, str) or name not in TRANSFORMS:
                raise IntarsiaError(f"unknown transform {name!r}; {nearest(str(name), TRANSFORMS)}")
        pairs: Pairs = tuple((out, into) for out, into in found)
        if len(shapes := {coefficients(shape, pair) for pair in pairs}) > 1:
            raise IntarsiaError(
                f"the pairs {found} have coefficients of different shapes, and C is one: {sorted(shapes)}"
            )
        return cls(shape, inner_edit(shapes.pop(), tensors, facts), pairs, want_scale(facts))

    def delta(self, W: Tensor) -> Tensor:
        C, (O, I) = self.inner.delta(W), self.shape
        parts = [TRANSFORMS[out].back(TRANSFORMS[into].back(C, I).mT, O).mT for out, into in self.pairs]
        return self.scale * sum(parts[1:], parts[0])

    def times(self, x: Tensor) -> Tensor:
        # The transforms act on x and y, rows of numbers, and C in between: no matrix of the weight's size of their own.
        parts = [
            TRANSFORMS[out].back(self.inner.times(TRANSFORMS[into].forward(x)), self.shape[0])
            for out, into in self.pairs
        ]
        return self.scale * sum(parts[1:], parts[0])

    def low_rank(self) -> LowRank | None:
        C, (O, I) = self.inner.low_rank(), self.shape
        if C is None:
            return None
        B = torch.cat([TRANSFORMS[out].back(C.B.mT, O).mT for out, _ in self.pairs], dim=1)
        A = torch.cat([TRANSFORMS[into].back(C.A, I) for _, into in self.pairs])
        return LowRank(self.shape, B, A, self.scale * C.scale)

    def supports(self) -> dict[str, int]:
        return self.inner.supports()

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, inner=self.inner.rounded(dtype))


def coefficients(shape: Shape, pair: tuple[str, str]) -> Shape:
    """The shape of C between two transforms. Raises IntarsiaError where a side has no such transform."""
    return TRANSFORMS[pair[0]].size(shape[0]), TRANSFORMS[pair[1]].size(shape[1])


KINDS[Transformed.kind] = Transformed
