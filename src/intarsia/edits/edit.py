"""Edits: what a finished adapter does to one weight. They know no method.

Every edit but the insert is W' = fold(W). Most are additive, W' = W + delta, and their weighted sums are exact on the union of
their supports. Shapes: O out_features, I in_features, k units, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.support import GRANULARITIES, Column, Element, Granularity, Shape, file_index_dtype, named_granularity

if TYPE_CHECKING:
    from intarsia.edits.insert import Insert


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """One change of one weight of ``shape`` (O, I). ``kind`` is its name in a file."""

    shape: Shape

    kind: ClassVar[str]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The numbers, by the name that they have in a file."""

    def facts(self) -> dict[str, Any]:
        """What a file must say besides the numbers, as plain JSON values."""
        return {}

    @classmethod
    @abstractmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`tensors` and :meth:`facts`. Raises IntarsiaError where they do not make an edit."""

    @abstractmethod
    def fold(self, W: Tensor) -> Tensor:
        """(O, I) -> (O, I), in W's dtype (float32 or wider)."""

    def delta(self, W: Tensor) -> Tensor:
        """fold(W) - W. (O, I) -> (O, I)."""
        return self.fold(W) - W

    def in_weight(self) -> Edit | None:
        """The part that changes the weight; None where there is none."""
        return self

    def inserts(self) -> list[tuple[float, Insert]]:
        """The parts that act beside the layer and fold into no weight, each with its factor."""
        return []

    def sparse_parts(self) -> list[Sparse] | None:
        """Sparse edits that together make the same change, where it is sparse; None where it reaches every entry."""
        return None

    def low_rank(self) -> LowRank | None:
        """The same change as two thin factors, for kinds that are made of such; None for others. Its rank may be above the weight's."""
        return None

    def times(self, x: Tensor) -> Tensor:
        """x delta^T beside the layer, in x's dtype, of an edit that needs no weight: without its matrix where there is a way.

        (..., I) -> (..., O).
        """
        return F.linear(x, self.delta(x))

    @property
    def needs_weight(self) -> bool:
        """Whether what the edit adds depends on the weight that it is set into."""
        return False

    @property
    @abstractmethod
    def touched(self) -> int:
        """How many entries of the weight it can change."""

    @property
    def bytes(self) -> int:
        """Bytes of the numbers it stores."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def supports(self) -> dict[str, int]:
        """Which of its tensors are the sorted indices of a support, and of how many units each."""
        return {}

    def rounded(self, dtype: torch.dtype) -> Edit:
        """The same edit with what it adds rounded once to a narrower type; what must stay wide stays."""
        return self

    def to(self, device: torch.device | str) -> Self:
        """The same edit on another device."""
        return self.made_of({k: t.to(device) for k, t in self.tensors().items()})

    def made_of(self, tensors: Mapping[str, Tensor]) -> Self:
        """An edit of the same kind and facts of other tensors, checked as those of a file are."""
        return self.build(self.shape, tensors, {"type": self.kind} | self.facts())


@dataclass(frozen=True, eq=False)
class Sparse(Edit):
    """W' = W + values on a support: k units of one granularity. Index sorted; values as the granularity shapes them."""

    granularity: Granularity
    index: Tensor  # (k,) int64, ascending
    values: Tensor  # delta, float32 or float64

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The granularity's plural: elements, columns, ..."""
        return self.granularity.plural

    def tensors(self) -> dict[str, Tensor]:
        return {"indices": self.index.to(file_index_dtype(self.shape)), "values": self.values}

    def facts(self) -> dict[str, Any]:
        # A width of 1 goes without saying: so it was in the first files.
        return {k: v for k, v in self.granularity.facts().items() if v != 1}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """From what a file says: ``facts`` has the edit's type and, where units are wide, their width."""
        kind, width = _PLURALS[facts["type"]], facts.get("width")
        if width is not None and not (isinstance(width, int) and 1 <= width <= max(shape)):
            raise IntarsiaError(f"width is {width!r}; expected a whole number from 1 to {max(shape)}")
        unit = named_granularity(kind, width if width is not None else 1 if kind in ("row", "column") else None)
        return cls.of(unit, shape, tensors)

    @classmethod
    def of(cls, unit: Granularity, shape: Shape, tensors: Mapping[str, Tensor]) -> Self:
        """From tensors by their names in a file, checked."""
        want_tensors(tensors, {"indices", "values"})
        index, values = tensors["indices"], tensors["values"]
        units = unit.units(shape)
        if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
            raise IntarsiaError(f"indices are {tuple(index.shape)} {index.dtype}; expected one row of int32 or int64")
        expected = unit.values_shape(shape, len(index))
        if tuple(values.shape) != expected:
            raise IntarsiaError(f"values are {tuple(values.shape)}; {len(index)} indices need {expected}")
        want_numbers("values", values)
        if (
            len(index)
            and not index.is_meta
            and not (int(index[0]) >= 0 and int(index[-1]) < units and bool((index.diff() > 0).all()))
        ):
            low, high = int(index.min()), int(index.max())
            what = f"reach from {low} to {high}" if low < 0 or high >= units else "are not strictly ascending"
            raise IntarsiaError(f"indices {what}; expected ascending {unit.name} numbers in 0..{units - 1}")
        return cls(shape, unit, index.to(torch.int64), values)

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def delta(self, W: Tensor) -> Tensor:
        return self.granularity.scatter(self.shape, self.index, self.values.to(W.dtype))

    def supports(self) -> dict[str, int]:
        return {"indices": self.granularity.units(self.shape)}

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, values=self.values.to(dtype))

    def sparse_parts(self) -> list[Sparse]:
        return [self]

    @property
    def touched(self) -> int:
        return self.values.numel()


def elements(shape: Shape, index: Tensor, values: Tensor) -> Sparse:
    """Single entries: ``index`` are flat positions row * I + column, ``values`` (k,)."""
    return Sparse(shape, Element(), index, values)


def columns(shape: Shape, index: Tensor, values: Tensor) -> Sparse:
    """Input columns: ``index`` are column numbers, ``values`` (O, k)."""
    return Sparse(shape, Column(), index, values)


@dataclass(frozen=True, eq=False)
class LowRank(Edit):
    """W' = W + scale * B A."""

    B: Tensor  # (O, r)
    A: Tensor  # (r, I)
    scale: float

    kind = "low_rank"

    def tensors(self) -> dict[str, Tensor]:
        return {"B": self.B, "A": self.A}

    def facts(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"A", "B"})
        A, B = tensors["A"], tensors["B"]
        if A.ndim != 2 or B.ndim != 2 or (B.shape[0], A.shape[1]) != tuple(shape) or B.shape[1] != A.shape[0]:
            raise IntarsiaError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply to {tuple(shape)}")
        want_numbers("A", A)
        want_numbers("B", B)
        return cls(shape, B, A, want_scale(facts))

    def fold(self, W: Tensor) -> Tensor:
        return W + self.delta(W)

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))

    def delta(self, W: Tensor) -> Tensor:
        return self.scale * (self.B.to(W.dtype) @ self.A.to(W.dtype))

    def low_rank(self) -> LowRank:
        return self

    def times(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.A.to(x.dtype).mT @ self.B.to(x.dtype).mT)

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1]


def joined(parts: Sequence[LowRank]) -> LowRank:
    """The sum of low-rank edits as one, the ranks side by side. Scales that differ go into B, and signs that do."""
    sizes = {abs(part.scale) for part in parts}
    dtype = parts[0].B.dtype
    for part in parts:
        dtype = torch.promote_types(torch.promote_types(dtype, part.B.dtype), part.A.dtype)
    first = parts[0].scale
    if len(sizes) == 1:
        factors = [part.B.to(dtype) if part.scale == first else -part.B.to(dtype) for part in parts]
    else:
        first, factors = 1.0, [without_scale(part).B.to(dtype) for part in parts]
    return LowRank(parts[0].shape, torch.cat(factors, dim=1), torch.cat([part.A.to(dtype) for part in parts]), first)


def without_scale(edit: LowRank) -> LowRank:
    """The same with the scale multiplied into B, which is then rounded once to its dtype."""
    return LowRank(edit.shape, (edit.B.double() * edit.scale).to(edit.B.dtype), edit.A, 1.0)


@dataclass(frozen=True, eq=False)
class Rescaled(Edit):
    """W' = m * V / ||V|| by rows, V = inner.fold(W): any edit with a length for every row after it (DoRA)."""

    inner: Edit
    magnitude: Tensor  # (O,)

    kind = "rescaled"

    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors() | {"magnitude": self.magnitude}

    def facts(self) -> dict[str, Any]:
        return {"inner": {"type": self.inner.kind} | self.inner.facts()}

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        inner = facts.get("inner")
        if not isinstance(inner, Mapping) or "magnitude" not in tensors:
            raise IntarsiaError("a rescaled edit needs a magnitude and an inner edit")
        magnitude = tensors["magnitude"]
        if tuple(magnitude.shape) != (shape[0],):
            raise IntarsiaError(f"magnitude is {tuple(magnitude.shape)}; expected {(shape[0],)}")
        want_numbers("magnitude", magnitude)
        rest = {k: t for k, t in tensors.items() if k != "magnitude"}
        edit = build_edit(inner.get("type"), shape, rest, inner)
        if edit.inserts():
            raise IntarsiaError(
                "the lengths of a rescaled edit are those of a weight, and its inner edit has an insert"
            )
        return cls(shape, edit, magnitude)

    def supports(self) -> dict[str, int]:
        return self.inner.supports()

    def rounded(self, dtype: torch.dtype) -> Edit:
        # Not the lengths: they multiply whole rows, which rounding would change by more than what was learned.
        return replace(self, inner=self.inner.rounded(dtype))

    def fold(self, W: Tensor) -> Tensor:
        V = self.inner.fold(W)
        return (self.magnitude.to(W.dtype) / row_norms(V))[:, None] * V

    @property
    def needs_weight(self) -> bool:
        return True

    @property
    def touched(self) -> int:
        return self.shape[0] * self.shape[1]


def inner_edit(shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Edit:
    """The edit that stands inside another one, additive and in the weight. Raises IntarsiaError where it is none of these."""
    inner = facts.get("inner")
    if not isinstance(inner, Mapping):
        raise IntarsiaError(f"a {facts['type']} edit needs an inner edit; found {inner!r}")
    edit = build_edit(inner.get("type"), shape, tensors, inner)
    if edit.inserts() or edit.needs_weight:
        raise IntarsiaError(
            f"inside a {facts['type']} edit there is a {edit.kind} one; expected one that adds to any weight"
        )
    return edit


def row_norms(V: Tensor) -> Tensor:
    """||V_i||, never zero. (O, I) -> (O,)."""
    norms: Tensor = torch.linalg.vector_norm(V, dim=1)
    return norms.clamp_min(torch.finfo(V.dtype).tiny)


_PLURALS = {kind.plural: name for name, kind in GRANULARITIES.items()}
KINDS: dict[str, type[Edit]] = dict.fromkeys(_PLURALS, Sparse) | {kind.kind: kind for kind in (LowRank, Rescaled)}


def build_edit(kind: Any, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Edit:
    """An edit from what a file says of it.

    Raises:
        IntarsiaError: for an unknown type, missing, extra or misshapen tensors, indices out of range or out of order,
            numbers that are not finite.
    """
    if kind not in KINDS:
        raise IntarsiaError(f"unknown edit type {kind!r}; this version knows {', '.join(KINDS)}")
    return KINDS[kind].build(shape, tensors, {**facts, "type": kind})


def want_tensors(tensors: Mapping[str, Tensor], names: set[str]) -> None:
    """Raise IntarsiaError where these are not the tensors of a file that are expected."""
    if tensors.keys() != names:
        raise IntarsiaError(
            f"found the tensors {', '.join(sorted(tensors)) or 'none'}; expected {', '.join(sorted(names))}"
        )


def want_numbers(name: str, tensor: Tensor) -> None:
    """Raise IntarsiaError where a tensor of a file holds no floating-point numbers, or some that are not finite."""
    if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise IntarsiaError(f"{name} is {tensor.dtype}; expected floating-point numbers")
    # On the meta device there are no numbers: an edit is built so of what a file says, before its tensors are read.
    if not tensor.is_meta and not bool(tensor.isfinite().all()):
        raise IntarsiaError(
            f"{name} has {int((~tensor.isfinite()).sum())} numbers that are not finite (NaN or infinity)"
        )


def want_scale(facts: Mapping[str, Any]) -> float:
    scale = facts.get("scale")
    if not isinstance(scale, int | float) or not abs(scale) < float("inf"):
        raise IntarsiaError(f"scale is {scale!r}; expected a finite number")
    return float(scale)
