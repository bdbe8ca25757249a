"""The core edit: two factors, perhaps a small core between them, and what they were at the start.    W' = W + s (B C A - B0 C0 A0)

Shapes: O out_features, I in_features, r rank; A (r, I), B (O, r), C (r, r), or (r,) for a diagonal, or none.
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


def times(B: Tensor, C: Tensor | None) -> Tensor:
    """B C, C being a matrix, the diagonal of one, or 1. (O, r), (r, q) -> (O, q)."""
    return B if C is None else B * C if C.ndim == 1 else B @ C


def thin(now: Mapping[str, Tensor], start: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two factors whose product is B C A, or B C A - B0 C0 A0 where there is a start, in ``dtype`` or wider. -> (O, q), (q, I).

    ``now`` and ``start`` have the tensors by name; what ``start`` lacks has not moved. A difference is taken of each tensor and not of the
    products: it is 0 at the start, and no difference of two large numbers after it.
    """

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, dtype))

    A, B, C = wide(now["A"]), wide(now["B"]), wide(now["C"]) if "C" in now else None
    if not start:
        if C is not None and C.ndim == 2 and A.shape[1] < B.shape[0]:  # into the thinner one
            return B, C @ A
        return times(B, C), A
    B0 = wide(start["B"]) if "B" in start else B
    C0 = wide(start["C"]) if "C" in start else C
    moved = [times(B - B0, C)] if "B" in start else []
    moved += [times(B0, C - C0)] if C is not None and C0 is not None and "C" in start else []
    left, right = ([moved[0] + moved[1]] if len(moved) == 2 else moved), [A] * bool(moved)
    if "A" in start:
        left, right = [*left, times(B0, C0)], [*right, A - wide(start["A"])]
    return torch.cat(left, 1), torch.cat(right)


@dataclass(frozen=True, eq=False)
class Core(Edit):
    """W' = W + scale * (B C A - B0 C0 A0). ``start``: those of A, B, C that have moved, as they were, by name; {}: nothing is subtracted."""

    now: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    scale: float

    kind = "core"

    def tensors(self) -> dict[str, Tensor]:
        return {**self.now, **{f"{name}0": tensor for name, tensor in self.start.items()}}

    def facts(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"A", "B"} | tensors.keys() & {"C", "A0", "B0", "C0"})
        if "C0" in tensors and "C" not in tensors:
            raise IntarsiaError("found the tensor C0 without C, which it is the start of")
        now = {name: tensor for name, tensor in tensors.items() if not name.endswith("0")}
        start = {name[0]: tensor for name, tensor in tensors.items() if name.endswith("0")}
        r = now["A"].shape[0]
        expected: dict[str, set[tuple[int, ...]]] = {
            "A": {(r, shape[1])},
            "B": {(shape[0], r)},
            "C": {(r, r), (r,)} if "C" in now else set(),
        }
        for group in (now, start):
            for name, tensor in group.items():
                if tuple(tensor.shape) not in expected[name] or tensor.shape != now[name].shape:
                    raise IntarsiaError(
                        f"{name} is {tuple(tensor.shape)}; B C A is to be {tuple(shape)}, with A {tuple(now['A'].shape)}"
                    )
                want_numbers(name, tensor)
        return cls(shape, now, start, want_scale(facts))

    def low_rank(self) -> LowRank:
        B, A = thin(self.now, self.start, torch.float32)
        return LowRank(self.shape, B, A, self.scale)

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        B, A = thin(self.now, self.start, W.dtype)
        return (self.scale * (B @ A)).to(W.dtype)

    def rounded(self, dtype: torch.dtype) -> Edit:
        # A factor and what it was at the start are far larger than their difference, of which rounding would leave nothing.
        return self if self.start else replace(self, now={name: tensor.to(dtype) for name, tensor in self.now.items()})

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1]


KINDS[Core.kind] = Core
