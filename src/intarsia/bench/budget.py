"""Equal counts: the setting at which a method trains as many numbers as another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from intarsia import registry
from intarsia.errors import IntarsiaError
from intarsia.forms import Coupled
from intarsia.method import Method
from intarsia.model import plan
from intarsia.site import ALL_LINEAR, find_sites

KNOBS = ("density", "rank")  # the fields that say how much is trained, in the order in which they are looked for


@dataclasses.dataclass(frozen=True)
class Scale:
    """What methods are counted on: the weights of a model that the targets name."""

    model: nn.Module
    targets: str | Iterable[str] = ALL_LINEAR
    exclude: str | Iterable[str] = ()

    def trained(self, method: Method) -> int:
        """Numbers that the method would train. Raises IntarsiaError where it does not fit."""
        return sum(plan(self.model, method, self.targets, self.exclude).values())

    def highest_rank(self) -> int:
        """The rank that every weight has at least room for."""
        return min(min(site.shape) for site in find_sites(self.model, self.targets, self.exclude).values())


def fitted(config: Mapping[str, Any], scale: Scale, count: int) -> dict[str, Any]:
    """The method's config, set so that it trains ``count`` numbers, or as near as it comes.

    What is set is its density or rank, or all its shares of heads and channels by one factor; a method around another
    one (DoRA) is fitted by the inner one's. What the config sets already stays as it is.

    Raises:
        IntarsiaError: when nothing about the method says how much is trained.
    """
    method = registry.build(config)
    path = _knob(method)
    if path is None and not (shares := _shares(method)):
        raise IntarsiaError(
            f"{config['name']} has no field among {', '.join(KNOBS)}, so its count cannot be fitted; leave the count out"
        )
    if path is not None:
        if _given(config, path):
            return dict(config)
        name = path[-1]

        def make(value: float) -> dict[str, Any]:
            return _set(config, path, value)
    else:
        if shares.keys() & config.keys():
            return dict(config)
        name, largest = "share", max(shares.values())

        def make(value: float) -> dict[str, Any]:
            return dict(config) | {part: round(value * share / largest, 6) for part, share in shares.items()}

    def counted(value: float) -> int:
        try:
            return scale.trained(registry.build(make(value)))
        except IntarsiaError:
            return 0  # so little that some weight would get nothing

    return make(_rank(counted, scale.highest_rank(), count) if name == "rank" else _density(counted, count))


def _shares(method: Method) -> dict[str, float]:
    """The shares of heads and channels that a coupled method trains, those above 0."""
    portions = method.portions() if isinstance(method, Coupled) else {}
    fields = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    return {part: share for part, share in portions.items() if share > 0 and part in fields}


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


def _density(counted: Callable[[float], int], count: int) -> float:
    low, high = 0.0, 1.0  # counts rise with the density; 20 halvings are one part in a million
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if counted(middle) < count else (low, middle)
    return min((round(low, 6) or high, round(high, 6)), key=lambda density: abs(counted(density) - count))


def _rank(counted: Callable[[float], int], most: int, count: int) -> int:
    low, high = 1, most
    while low < high:  # the first rank that reaches the count
        middle = (low + high) // 2
        low, high = (middle + 1, high) if counted(middle) < count else (low, middle)
    return min((max(1, low - 1), low), key=lambda rank: abs(counted(rank) - count))
