"""Equal counts: the setting at which a method trains as many numbers as another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from intarsia import registry
from intarsia.errors import IntarsiaError
from intarsia.method import Method

Shape = tuple[int, int]
KNOBS = ("density", "rank")  # the fields that say how much is trained, in the order in which they are looked for


def trained_by(method: Method, shapes: Iterable[Shape]) -> int:
    """Numbers that a method trains at weights of these (O, I)."""
    return sum(method.trained_count(shape) for shape in shapes)


def fitted(config: Mapping[str, Any], shapes: Sequence[Shape], count: int) -> dict[str, Any]:
    """The method's config, its density or rank set so that it trains ``count`` numbers, or as near as it comes.

    A knob that the config sets already stays as it is. A method around another one (DoRA) is fitted by the inner one's.

    Raises:
        IntarsiaError: when the method has no field that says how much is trained.
    """
    path = _knob(registry.build(config))
    if path is None:
        raise IntarsiaError(
            f"{config['name']} has no field among {', '.join(KNOBS)}, so its count cannot be fitted; leave the count out"
        )
    if _given(config, path):
        return dict(config)

    def count_at(value: float) -> int:
        return trained_by(registry.build(_set(config, path, value)), shapes)

    value = _density(count_at, count) if path[-1] == "density" else _rank(count_at, shapes, count)
    return _set(config, path, value)


def _knob(method: Method) -> tuple[str, ...] | None:
    """Where the knob stands: ("density",) or ("inner", "rank")."""
    names = [field.name for field in dataclasses.fields(method)]  # type: ignore[arg-type]
    for name in KNOBS:
        if name in names:
            return (name,)
    for name in names:
        inner = getattr(method, name)
        if isinstance(inner, Method) and (found := _knob(inner)):
            return (name, *found)
    return None


def _given(config: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(config, Mapping) or name not in config:
            return False
        config = config[name]
    return True


def _set(config: Any, path: tuple[str, ...], value: float) -> dict[str, Any]:
    tree = {"name": config} if isinstance(config, str) else dict(config)
    if len(path) == 1:
        return tree | {path[0]: value}
    inner = tree.get(path[0]) or getattr(registry.build(tree), path[0]).config()
    return tree | {path[0]: _set(inner, path[1:], value)}


def _density(count_at: Any, count: int) -> float:
    low, high = 0.0, 1.0  # counts rise with the density; 20 halvings are one part in a million
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if count_at(middle) < count else (low, middle)
    return min((round(low, 6) or high, round(high, 6)), key=lambda density: abs(count_at(density) - count))


def _rank(count_at: Any, shapes: Sequence[Shape], count: int) -> int:
    most = min(min(shape) for shape in shapes)
    low, high = 1, most
    while low < high:  # the first rank that reaches the count
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count_at(middle) < count else (low, middle)
    return min((max(1, low - 1), low), key=lambda rank: abs(count_at(rank) - count))
