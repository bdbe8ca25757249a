"""The space of a search: which numbers are to be found, between which bounds, and where it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.errors import IntarsiaError

DIGITS = 4  # of a number that is tried: what a table prints is what was measured

Point = Mapping[str, float]  # a number for every dimension, by its name


@dataclass(frozen=True)
class Dimension:
    """One number to be found: ``parameter`` of ``adapter``, in all layers or in those from ``layers[0]`` to ``layers[1]``.

    Raises:
        IntarsiaError: for bounds that are not finite or leave no room, or a start outside them.
    """

    adapter: str
    parameter: str  # weight or density
    low: float
    high: float
    start: float
    layers: tuple[int, int] | None = None  # first and last, both included

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.low, self.high, self.start))) or not self.low < self.high:
            raise IntarsiaError(
                f"{self.name}: searched from {self.low:g} to {self.high:g}; expected low < high, finite"
            )
        if not self.low <= self.start <= self.high:
            raise IntarsiaError(
                f"{self.name} starts at {self.start:g}, and is searched from {self.low:g} to {self.high:g}; "
                "let the range hold the start"
            )

    @property
    def name(self) -> str:
        where = "" if self.layers is None else f", layers {self.layers[0]}-{self.layers[1]}"
        return f"{self.parameter} of {self.adapter}{where}"

    def value(self, u: float) -> float:
        """The number at ``u`` in [-1, 1], rounded to 4 digits: linear on either side of ``start``, which stands at 0.

        A start at an edge cannot be the middle: then it is linear from ``low`` to ``high``.
        """
        middle = self._middle
        side = self.high - middle if u > 0 else middle - self.low
        return min(max(round(middle + u * side, DIGITS), self.low), self.high)

    def place(self, value: float) -> float:
        """The ``u`` of a number within the bounds; the inverse of :meth:`value`."""
        middle = self._middle
        return (value - middle) / (self.high - middle if value > middle else middle - self.low)

    @property
    def _middle(self) -> float:
        return self.start if self.low < self.start < self.high else (self.low + self.high) / 2


@dataclass(frozen=True)
class Space:
    """All the numbers to be found. Their order is part of the search: another order gives other trials."""

    dimensions: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        names = [dimension.name for dimension in self.dimensions]
        if not names:
            raise IntarsiaError("there is nothing to search: the space has no dimension")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise IntarsiaError(f"{', '.join(twice)} is in the space twice")

    def __iter__(self) -> Iterator[Dimension]:
        return iter(self.dimensions)

    def __len__(self) -> int:
        return len(self.dimensions)

    @property
    def start(self) -> dict[str, float]:
        """Where the search begins: trial 0."""
        return {dimension.name: dimension.start for dimension in self}

    def to_dict(self) -> dict[str, Any]:
        """Name -> low, high and start, as plain JSON values."""
        return {d.name: [d.low, d.high, d.start] for d in self}


def space_of(
    start: Mapping[str, Mapping[str, float]],
    ranges: Mapping[str, tuple[float, float]],
    layers: Sequence[tuple[int, int]] = (),
) -> Space:
    """The space of a merge: each parameter of each adapter, as often as there are groups of layers.

    Args:
        start: adapter -> parameter -> where it starts.
        ranges: parameter -> lowest and highest number.
        layers: first and last layer of each group (:func:`layer_groups`); none: one number for all layers.
    """
    groups = tuple(layers) or (None,)
    found = [
        Dimension(adapter, parameter, *ranges[parameter], value, group)
        for adapter, values in start.items()
        for parameter, value in values.items()
        for group in groups
    ]
    return Space(tuple(found))


def layer_groups(layers: Sequence[int], groups: int) -> list[tuple[int, int]]:
    """``groups`` stretches of the layers' numbers, of nearly the same length, in order: first and last of each.

    Raises:
        IntarsiaError: for more groups than layers, or none.
    """
    numbers = sorted(set(layers))
    if not 1 <= groups <= len(numbers):
        raise IntarsiaError(f"{groups} groups of layers; the adapters change {len(numbers)} numbered layers")
    ends = [round(len(numbers) * i / groups) for i in range(groups + 1)]
    return [(numbers[a], numbers[b - 1]) for a, b in zip(ends, ends[1:], strict=False)]
