"""Parameters as mergekit's users write them: a number, a gradient over the layers, or either of them by the weight's name.

    weight: 0.5
    weight: [0.2, 0.8, 0.5]                                        # over the layers, interpolated
    weight: [{filter: self_attn, value: 0.5}, {filter: mlp, value: [0, 1]}, {value: 1}]      # the first that fits

A gradient of n values lies over the layers from the first to the last that any of the adapters edits: with t in 0..1, it is
the piecewise linear curve through its values at t = 0, 1 / (n - 1), ..., 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from intarsia.analyze import layer_of
from intarsia.errors import IntarsiaError, nearest

Scalar = bool | int | float | str | None
EVERYWHERE = "*"


@dataclass(frozen=True)
class Case:
    """A value, or a gradient of values, for the weights in whose name ``filter`` occurs; None or ``*``: for all."""

    value: Scalar | tuple[float, ...]
    filter: str | None = None

    def fits(self, weight: str) -> bool:
        """Whether it is for this weight."""
        return self.filter in (None, EVERYWHERE) or str(self.filter) in weight


@dataclass(frozen=True)
class Setting:
    """What was written for one parameter. ``where``: its full key, for messages."""

    where: str
    cases: tuple[Case, ...]

    @property
    def plain(self) -> Any:
        """As it was written, as plain JSON values."""
        found: list[Any] = [list(c.value) if isinstance(c.value, tuple) else c.value for c in self.cases]
        if len(found) == 1 and self.cases[0].filter is None:
            return found[0]
        named = ({} if c.filter is None else {"filter": c.filter} for c in self.cases)
        return [filters | {"value": value} for filters, value in zip(named, found, strict=True)]

    def at(self, weight: str, layers: range) -> Scalar:
        """The value at a weight; None where no case is for it.

        Raises:
            IntarsiaError: for a gradient at a weight whose name has no number of a layer.
        """
        case = next((case for case in self.cases if case.fits(weight)), None)
        if case is None:
            return None
        if not isinstance(case.value, tuple):
            return case.value
        layer = layer_of(weight)
        if layer is None:
            raise IntarsiaError(
                f"{self.where}: {weight} is in no numbered layer, so a gradient ({', '.join(map(str, case.value))}) has no value "
                "there; give it one of its own before the gradient: "
                f"[{{filter: {weight.removesuffix('.weight').rpartition('.')[2]}, value: ...}}, {{value: [...]}}]"
            )
        return between(case.value, (layer - layers.start) / max(1, layers[-1] - layers.start))


def between(values: tuple[float, ...], t: float) -> float:
    """The piecewise linear curve through the values at t = 0, 1 / (n - 1), ..., 1."""
    place = t * (len(values) - 1)
    first = min(int(place), len(values) - 1)
    second = min(first + 1, len(values) - 1)
    return (1 - (place - first)) * values[first] + (place - first) * values[second]


def layers_of(weights: Iterable[str]) -> range:
    """The numbers of the layers in which the weights lie, from the first to the last."""
    numbers = [layer for weight in weights if (layer := layer_of(weight)) is not None]
    return range(min(numbers), max(numbers) + 1) if numbers else range(1)


def setting(where: str, value: Any) -> Setting:
    """One parameter as it was written. Raises IntarsiaError where it is none of the three forms."""
    if isinstance(value, Mapping):
        return Setting(where, (_case(where, value),))
    if isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
        return Setting(where, tuple(_case(f"{where}.{place}", one) for place, one in enumerate(value)))
    return Setting(where, (Case(_value(where, value)),))


def _case(where: str, given: Mapping[str, Any]) -> Case:
    unknown = [key for key in given if key not in ("filter", "value")]
    if unknown or "value" not in given:
        what = (
            f"unknown key {unknown[0]!r}; {nearest(str(unknown[0]), ('filter', 'value'))}"
            if unknown
            else "it has no value"
        )
        raise IntarsiaError(f"{where}: {what} (such as {{filter: self_attn, value: 0.5}})")
    name = given.get("filter")
    if name is not None and (not isinstance(name, str) or not name):
        raise IntarsiaError(f"{where}: filter is {name!r}; expected a part of a weight's name, such as self_attn")
    return Case(_value(where, given["value"]), name)


def _value(where: str, value: Any) -> Scalar | tuple[float, ...]:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    numbers = isinstance(value, list | tuple) and all(
        isinstance(one, int | float) and not isinstance(one, bool) for one in value
    )
    if not numbers or not value:
        raise IntarsiaError(
            f"{where}: expected a value, a list of numbers over the layers, or a list of {{filter: ..., value: ...}}, found {value!r}"
        )
    return tuple(float(one) for one in value)
