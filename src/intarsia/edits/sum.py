"""The sum of edits: what several do to one weight, each beside the others.    W' = W + sum_i (fold_i(W) - W)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from intarsia.edits.edit import KINDS, Edit, build_edit
from intarsia.errors import IntarsiaError
from intarsia.support import Shape


@dataclass(frozen=True, eq=False)
class Sum(Edit):
    """W' = W + sum_i delta_i(W). In a file the tensors of part i are called ``<i>_<name>``."""

    parts: tuple[Edit, ...]

    kind = "sum"

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}_{name}": tensor for i, part in enumerate(self.parts) for name, tensor in part.tensors().items()}

    def facts(self) -> dict[str, Any]:
        return {"parts": [{"type": part.kind} | part.facts() for part in self.parts]}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        parts = facts.get("parts")
        if not isinstance(parts, list) or not parts or not all(isinstance(part, Mapping) for part in parts):
            raise IntarsiaError("a sum needs a list of the edits that it is the sum of")
        named: list[dict[str, Tensor]] = [{} for _ in parts]
        for name, tensor in tensors.items():
            number, _, rest = name.partition("_")
            if not number.isdecimal() or int(number) >= len(parts) or f"{int(number)}_{rest}" != name:
                raise IntarsiaError(f"found the tensor {name}; expected 0_... to {len(parts) - 1}_...")
            named[int(number)][rest] = tensor
        return cls(shape, tuple(build_edit(p.get("type"), shape, t, p) for p, t in zip(parts, named, strict=True)))

    def supports(self) -> dict[str, int]:
        return {f"{i}_{name}": units for i, part in enumerate(self.parts) for name, units in part.supports().items()}

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, parts=tuple(part.rounded(dtype) for part in self.parts))

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        total = self.parts[0].delta(W)
        for part in self.parts[1:]:
            total = total + part.delta(W)
        return total

    @property
    def needs_weight(self) -> bool:
        return any(part.needs_weight for part in self.parts)

    @property
    def touched(self) -> int:
        return min(sum(part.touched for part in self.parts), self.shape[0] * self.shape[1])


KINDS[Sum.kind] = Sum
