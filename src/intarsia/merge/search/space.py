"""The space of a search: which numbers are to be found, between which bounds, and where it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from intarsia.errors import IntarsiaError

DIGITS = 4  # of a number that is tried: what a table prints is what was measured

Point = Mapping[str, float]  # a number for every dimension, by its name


@dataclass(frozen=True)
class Dimension:
    """One number to be found: ``parameter`` of ``adapter``, for all layers or at one point of a gradient over them.

    Raises:
        IntarsiaError: for bounds that are not finite or leave no room, or a start outside them.
    """

    adapter: str
    parameter: str  # weight or density
    low: float
    high: float
    start: float
    point: int | None = None  # of a gradient, counted from 0

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
        return f"{self.parameter} of {self.adapter}" + ("" if self.point is None else f", point {self.point}")

    def value(self, u: float, middle: float) -> float:
        """The number at ``u`` in [-1, 1]: linear on either side of ``middle``, which stands at 0; rounded to 4 digits."""
        middle = self._inner(middle)
        value = middle + u * (self.high - middle if u > 0 else middle - self.low)
        return min(max(round(value, DIGITS), self.low), self.high)

    def place(self, value: float, middle: float) -> float:
        """The ``u`` of a number within the bounds; the inverse of :meth:`value`."""
        middle = self._inner(middle)
        return (value - middle) / (self.high - middle if value > middle else middle - self.low)

    def _inner(self, middle: float) -> float:
        # What stands at an edge cannot be the middle of the range.
        return middle if self.low < middle < self.high else (self.low + self.high) / 2


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
        return self.checked({dimension.name: dimension.start for dimension in self})

    def checked(self, point: Point) -> dict[str, float]:
        """The point, rounded to 4 digits. Raises IntarsiaError for one of another space, or outside of this one."""
        names = [dimension.name for dimension in self]
        if set(point) != set(names):
            raise IntarsiaError(f"a point has {', '.join(point)}; the space {', '.join(names)}")
        if outside := [d.name for d in self if not d.low <= point[d.name] <= d.high]:
            raise IntarsiaError(f"{', '.join(outside)}: outside of what is searched")
        return {d.name: min(max(round(point[d.name], DIGITS), d.low), d.high) for d in self}

    def values(self, places: Mapping[str, float], middle: Point) -> dict[str, float]:
        """The point at places in [-1, 1], of which 0 is the ``middle``."""
        return {d.name: d.value(places[d.name], middle[d.name]) for d in self}

    def places(self, point: Point, middle: Point) -> dict[str, float]:
        """The inverse of :meth:`values`."""
        return {d.name: d.place(point[d.name], middle[d.name]) for d in self}

    def to_dict(self) -> dict[str, Any]:
        """Name -> low, high and start, as plain JSON values."""
        return {d.name: [d.low, d.high, d.start] for d in self}


def space_of(
    start: Mapping[str, Mapping[str, float]], ranges: Mapping[str, tuple[float, float]], points: int = 1
) -> Space:
    """The space of a merge: each parameter of each adapter, as often as a gradient over the layers has points.

    Args:
        start: adapter -> parameter -> where it starts, the same at every point.
        ranges: parameter -> lowest and highest number.
        points: 1: one number for all layers; more: a gradient over the layers, found point by point.

    Raises:
        IntarsiaError: for fewer than one point, and what :class:`Dimension` refuses.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise IntarsiaError(
            f"points={points!r}; expected the number of points of a gradient over the layers, 1 or more"
        )
    return Space(
        tuple(
            Dimension(adapter, parameter, *ranges[parameter], value, point)
            for adapter, values in start.items()
            for parameter, value in values.items()
            for point in ([None] if points == 1 else range(points))
        )
    )


def parameters_at(space: Space, point: Point) -> dict[str, dict[str, float | list[float]]]:
    """Adapter -> parameter -> its number at a point, or the list of them where it is a gradient: as a recipe has it."""
    found: dict[str, dict[str, float | list[float]]] = {}
    for dimension in space:
        here, value = found.setdefault(dimension.adapter, {}), point[dimension.name]
        if dimension.point is None:
            here[dimension.parameter] = value
        else:
            values = here.setdefault(dimension.parameter, [])
            assert isinstance(values, list)
            values.append(value)
    return found
