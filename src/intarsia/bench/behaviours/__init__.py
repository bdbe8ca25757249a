"""Behaviours: what a system is for, shown on a small problem where its claim can be true or false. One file a system.

    intarsia bench methods --behaviour melora        one system's
    intarsia bench methods --behaviour all           all of them, some minutes

A behaviour is a function without arguments that returns what was :class:`Seen`; its seeds are its own, so that it says the same every
time on one machine. A claim that does not show is said as loudly as one that does.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from intarsia.errors import IntarsiaError, nearest


@dataclass(frozen=True)
class Seen:
    """One comparison.

    Attributes:
        measure: what was measured, with its unit.
        subject: who is to be better, and ``value``, what it came to.
        against: whom it is compared with, and ``other``, what that came to.
        better: ``lower`` or ``higher``: which way ``value`` is to differ from ``other``.
    """

    measure: str
    subject: str
    value: float
    against: str
    other: float
    better: str

    @property
    def shows(self) -> bool:
        """Whether the value is on the better side."""
        return self.value < self.other if self.better == "lower" else self.value > self.other

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shows": self.shows}


@dataclass(frozen=True)
class Behaviour:
    """A claim about one system, and how to look at it."""

    system: str
    claim: str
    look: Callable[[], list[Seen]]


_KNOWN: dict[str, list[Behaviour]] = {}


def behaviour(system: str, claim: str) -> Callable[[Callable[[], list[Seen]]], Callable[[], list[Seen]]]:
    """Decorator: make a function the look at a claim about a system, by its id in ``intarsia methods``."""

    def known(look: Callable[[], list[Seen]]) -> Callable[[], list[Seen]]:
        _KNOWN.setdefault(system, []).append(Behaviour(system, claim, look))
        return look

    return known


def behaviours(name: str = "all") -> list[Behaviour]:
    """Those of one system, or all.

    Raises:
        IntarsiaError: for a system that has none, with the nearest names.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if name != "all" and name not in _KNOWN:
        raise IntarsiaError(f"there is no behaviour of {name!r}; {nearest(name, [*sorted(_KNOWN), 'all'])}")
    return [one for system in sorted(_KNOWN) if name in ("all", system) for one in _KNOWN[system]]
