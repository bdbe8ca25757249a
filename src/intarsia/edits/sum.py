"""The sum of edits: what several do to one weight, each beside the others.    W' = W + sum_i c_i (fold_i(W) - W)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from intarsia.edits.edit import KINDS, Edit, LowRank, Sparse, build_edit, joined
from intarsia.edits.insert import AHEAD, Insert
from intarsia.errors import IntarsiaError
from intarsia.support import Shape


@dataclass(frozen=True, eq=False)
class Sum(Edit):
    """W' = W + sum_i c_i delta_i(W). In a file the tensors of part i are called ``<i>_<name>``."""

    parts: tuple[Edit, ...]
    factors: tuple[float, ...] = ()  # c, all 1 where none are given

    kind = "sum"

    def __post_init__(self) -> None:
        if not self.factors:
            object.__setattr__(self, "factors", (1.0,) * len(self.parts))
        for factor, insert in self.inserts():
            if insert.place == AHEAD:
                insert.inserted.times(factor)  # which says why not, where it cannot be

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}_{name}": tensor for i, part in enumerate(self.parts) for name, tensor in part.tensors().items()}

    def facts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"parts": [{"type": part.kind} | part.facts() for part in self.parts]}
        # Factors of 1 go without saying: so it was in the first files.
        return parts | ({"factors": list(self.factors)} if any(c != 1 for c in self.factors) else {})

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
        made = tuple(build_edit(p.get("type"), shape, t, p) for p, t in zip(parts, named, strict=True))
        return cls(shape, made, _factors(facts.get("factors"), len(parts)))

    def supports(self) -> dict[str, int]:
        return {f"{i}_{name}": units for i, part in enumerate(self.parts) for name, units in part.supports().items()}

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, parts=tuple(part.rounded(dtype) for part in self.parts))

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        total = self.factors[0] * self.parts[0].delta(W)
        for part, factor in zip(self.parts[1:], self.factors[1:], strict=True):
            total = total + factor * part.delta(W)
        return total

    def times(self, x: Tensor) -> Tensor:
        parts = [factor * part.times(x) for part, factor in zip(self.parts, self.factors, strict=True)]
        return sum(parts[1:], parts[0])

    def sparse_parts(self) -> list[Sparse] | None:
        found: list[Sparse] = []
        for part, factor in zip(self.parts, self.factors, strict=True):
            sparse = part.sparse_parts()
            if sparse is None:
                return None
            found += [one if factor == 1 else replace(one, values=factor * one.values) for one in sparse]
        return found

    def low_rank(self) -> LowRank | None:
        found = [part.low_rank() for part in self.parts]
        low = [
            replace(one, scale=factor * one.scale)
            for one, factor in zip(found, self.factors, strict=True)
            if one is not None
        ]
        return joined(low) if len(low) == len(self.parts) else None

    def in_weight(self) -> Edit | None:
        if not self.inserts():
            return self
        kept = [
            (part, c) for one, c in zip(self.parts, self.factors, strict=True) if (part := one.in_weight()) is not None
        ]
        return Sum(self.shape, tuple(part for part, _ in kept), tuple(c for _, c in kept)) if kept else None

    def inserts(self) -> list[tuple[float, Insert]]:
        pairs = zip(self.parts, self.factors, strict=True)
        return [(factor * inner, insert) for part, factor in pairs for inner, insert in part.inserts()]

    @property
    def needs_weight(self) -> bool:
        return any(part.needs_weight for part in self.parts)

    @property
    def touched(self) -> int:
        return min(sum(part.touched for part in self.parts), self.shape[0] * self.shape[1])


def _factors(found: Any, count: int) -> tuple[float, ...]:
    if found is None:
        return ()
    if not isinstance(found, list) or len(found) != count:
        raise IntarsiaError(f"a sum of {count} edits needs as many factors; found {found!r}")
    for factor in found:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not abs(factor) < float("inf"):
            raise IntarsiaError(f"a factor of a sum is {factor!r}; expected a finite number")
    return tuple(map(float, found))


KINDS[Sum.kind] = Sum
