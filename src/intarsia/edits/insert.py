"""The insert: what no change of a weight can say.    y' = y + c g(v),  v = x or y of one layer

A small function beside one layer, of tensors and facts. What functions there are: :data:`INSERTED`; a further kind is one
file with a class like :class:`intarsia.edits.bottleneck.Bottleneck`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.edits.edit import KINDS, Edit, want_scale
from intarsia.errors import IntarsiaError, nearest
from intarsia.operators import DECODER
from intarsia.support import Shape

PLACES = ("after", "parallel", "before")
AHEAD = "ahead"  # before the tokens of a decoder: see intarsia.edits.ahead
SITS_AT = frozenset({"linear"})  # the kinds of layers whose x and y are rows of numbers


@dataclass(frozen=True, eq=False)
class Inserted(ABC):
    """A function g of rows of numbers, (..., n) -> (..., m). Its tensors are fields, named as in a file."""

    what: ClassVar[str]  # its name in a file
    places: ClassVar[tuple[str, ...]] = PLACES  # where it may stand
    watches: ClassVar[bool] = False  # whether it asks for the tokens of the model's forward
    wide: ClassVar[frozenset[str]] = frozenset()  # tensors that are never rounded

    @abstractmethod
    def __call__(self, v: Tensor) -> Tensor:
        """(..., n) -> (..., m), in v's dtype and on its device."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The numbers, by the name that they have in a file."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a file must say besides the numbers, as plain JSON values."""

    @classmethod
    @abstractmethod
    def build(cls, inputs: int, outputs: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`tensors` and :meth:`facts`. Raises IntarsiaError where they make no g of n inputs, m outputs."""

    @abstractmethod
    def times(self, factor: float) -> Self:
        """factor g."""

    @abstractmethod
    def through(self, W: Tensor) -> Self:
        """g and then a matrix: W g(v), W (k, m)."""

    @property
    @abstractmethod
    def multiplications(self) -> int:
        """Of numbers, for one token."""

    @property
    def count(self) -> int:
        """Positions that it takes before the tokens of a decoder."""
        return 0

    def watching(self, seen: Any) -> Self:
        """The same function, told of the tokens by an :class:`intarsia.edits.Seen`, where it asks for them."""
        return self

    def cast(self, dtype: torch.dtype) -> Self:
        """The same function with its numbers rounded to a narrower type; what must stay wide stays."""
        return replace(self, **{k: t.to(dtype) for k, t in self.tensors().items() if k not in self.wide})

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same function of changed tensors."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})


INSERTED: dict[str, type[Inserted]] = {}  # what can be inserted, by its name in a file


@dataclass(frozen=True, eq=False)
class Insert(Edit):
    """y' = y + scale g(v) beside a layer y = W x + b, by ``place``:

    after: v = y, g (O -> O), as adapters in series; parallel: v = x, g (I -> O); before: y' = y + scale W g(x), g (I -> I), which
    is W (x + scale g(x)) + b, the layer with an adapter in series before it. W is the base's own.

    Several inserts at one layer read the layer's own x and y each, so they add up in any order. ``ahead``, before the tokens of a
    decoder, nothing is added up: they stand behind one another, in their order, and scale is 1.
    """

    inserted: Inserted
    place: str
    scale: float = 1.0

    kind = "insert"

    def __post_init__(self) -> None:
        if self.place == AHEAD:
            self.inserted.times(self.scale)  # which says why not

    @property
    def sits_at(self) -> frozenset[str]:
        """The kinds of layers where it can act."""
        return frozenset({DECODER}) if self.place == AHEAD else SITS_AT

    def tensors(self) -> dict[str, Tensor]:
        return self.inserted.tensors()

    def facts(self) -> dict[str, Any]:
        return {"what": self.inserted.what, "place": self.place, "scale": self.scale} | self.inserted.facts()

    @classmethod
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        what, place = facts.get("what"), facts.get("place")
        if not isinstance(what, str) or what not in INSERTED:
            raise IntarsiaError(f"unknown insert {what!r}; {nearest(str(what), INSERTED)}")
        places = INSERTED[what].places
        if place not in places:
            raise IntarsiaError(f"place is {place!r}; expected one of {', '.join(places)}")
        return cls(shape, INSERTED[what].build(*sizes(place, shape), tensors, facts), place, want_scale(facts))

    @property
    def count(self) -> int:
        """How many positions it takes before the tokens of a decoder."""
        return self.inserted.count if self.place == AHEAD else 0

    @property
    def multiplications(self) -> int:
        """Of numbers, for one token; before the tokens of a decoder: for every key and value there, once for each head of theirs."""
        return self.inserted.multiplications + self.count * self.shape[1]

    def change(self, x: Tensor, y: Tensor, W: Tensor | None = None) -> Tensor:
        """What is added to y. x (..., I), y (..., O), the layer's own weight W (O, I) for one that stands before it. -> (..., O)."""
        added = self.inserted(y if self.place == "after" else x)
        if self.place == "before":
            assert W is not None
            added = F.linear(added, W.to(added))
        return added if self.scale == 1 else self.scale * added

    def ready(self, factor: float, base: Callable[[], Tensor], dtype: torch.dtype) -> Insert:
        """The same times ``factor`` for a layer that computes in ``dtype``: rounded once, the factors and W multiplied in.

        ``base()`` is the layer's own weight (O, I); it is asked where the insert stands before the layer, whose cost it
        has then no more: W g(x) is one function like any other in parallel.
        """
        wide = torch.promote_types(dtype, torch.float32)
        inserted, place = self.inserted.mapped(lambda tensor: tensor.to(wide)).times(factor * self.scale), self.place
        if place == "before":
            inserted, place = inserted.through(base().to(wide)), "parallel"
        return replace(self, inserted=inserted.cast(dtype), place=place, scale=1.0)

    def rounded(self, dtype: torch.dtype) -> Edit:
        return replace(self, inserted=self.inserted.cast(dtype))

    def in_weight(self) -> None:
        return None

    def inserts(self) -> list[tuple[float, Insert]]:
        return [(1.0, self)]

    def fold(self, W: Tensor) -> NoReturn:
        how = "stands before the tokens" if self.place == AHEAD else "is computed beside its layer for every token"
        raise IntarsiaError(f"an insert ({self.inserted.what}) {how} and folds into no weight")

    def delta(self, W: Tensor) -> NoReturn:
        self.fold(W)

    @property
    def touched(self) -> int:
        return 0


def where(inserts: Mapping[str, Sequence[Insert]]) -> str:
    """Where inserts act, by the weights that they belong to: ``beside 3 layers``, ``at 20 positions before the tokens``."""
    ahead = sum(one.count for many in inserts.values() for one in many)
    layers = sum(any(one.place != AHEAD for one in many) for many in inserts.values())
    both = [f"beside {layers} layers"] if layers or not ahead else []
    return " and ".join([*both, *([f"at {ahead} positions before the tokens"] if ahead else [])])


def sizes(place: str, shape: Shape) -> tuple[int, int]:
    """How many numbers a function at this place reads and makes, beside a weight of this (O, I)."""
    outputs, inputs = shape
    read = {"after": outputs, "parallel": inputs, "before": inputs, AHEAD: inputs}[place]
    return read, inputs if place == "before" else outputs


KINDS[Insert.kind] = Insert
