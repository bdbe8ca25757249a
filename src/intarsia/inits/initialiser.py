"""Initialisers by name: how the factors of a low-rank update start.    W' = W + s (B A - B0 A0)

An initialiser is one function (method, site, start) -> {"A": (r, I), "B": (O, r)}, r and s being ``method.rank`` and
``method.scale``; :func:`initialiser` declares what it needs of data, of :data:`intarsia.method.NEEDS`, and whether B A is
other than 0 at the start. Then B0 A0, what it is at the start, is subtracted, so that the base stays as it is and the
adapted model still starts as the base. See docs/add-an-initialiser.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intarsia.edits import Edit
from intarsia.errors import IntarsiaError, nearest
from intarsia.method import NEEDS, Method, Start
from intarsia.registry import OUTSIDE, imported
from intarsia.site import Site

Make = Callable[[Any, Site, Start], Mapping[str, Tensor]]
Survey = Callable[[Any, Site, Start], Tensor]
Observe = Callable[[Any, Site], Any]
Confer = Callable[[Any, Mapping[str, Any]], None]
At = Callable[[Any, Edit, Site], Method]
Settle = Callable[[Any, Mapping[str, Site], Any, int], Mapping[str, tuple[Method, Mapping[str, Any]]]]


@dataclass(frozen=True)
class Initialiser:
    """How factors start.

    Attributes:
        make: (method, site, start) -> the factors by name, float32 or wider.
        needs: what ``start`` has to hold.
        subtracted: whether B A is other than 0 at the start, and therefore subtracted.
        observer, confer: where it needs what was ``observed``; survey, settle, at: where something is chosen for all sites
            together, such as their ranks. All as the functions of these names of a :class:`intarsia.Method`, with the method as
            their first argument.
    """

    name: str
    make: Make
    needs: frozenset[str] = frozenset()
    subtracted: bool = False
    survey: Survey | None = None
    settle: Settle | None = None
    at: At | None = None
    observer: Observe | None = None
    confer: Confer | None = None


INITIALISERS: dict[str, Initialiser] = {}


def initialiser(
    name: str, *needs: str, subtracted: bool = False, **together: Callable[..., Any]
) -> Callable[[Make], Make]:
    """Decorator: declare a function an initialiser. One of this package is known by its name from then on.

    ``together``: the further functions that :class:`Initialiser` has.
    """
    unknown = [need for need in needs if need not in NEEDS]
    if unknown:
        raise IntarsiaError(f"an initialiser cannot need {unknown[0]!r}; {nearest(unknown[0], NEEDS)}")

    def declare(function: Make) -> Make:
        made = Initialiser(name, function, frozenset(needs), subtracted, **together)
        function.initialiser = made  # type: ignore[attr-defined]
        if function.__module__.startswith("intarsia."):
            INITIALISERS[name] = made
        return function

    return declare


def is_initialiser(name: str) -> bool:
    """Whether the name can be an initialiser's: a known one, or one of the shape ``package.module:function``."""
    return name in INITIALISERS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is not None


def find(name: str) -> Initialiser:
    """The initialiser of that name; one of another package is imported.

    Raises:
        IntarsiaError: where there is none.
    """
    if name in INITIALISERS:
        return INITIALISERS[name]
    if ":" not in name:
        raise IntarsiaError(f"unknown initialiser {name!r}; {nearest(name, INITIALISERS)}, or {OUTSIDE!r}")
    found = imported("initialiser", name)
    made = getattr(found, "initialiser", None)
    if not isinstance(made, Initialiser):
        raise IntarsiaError(f"initialiser {name!r} is not declared as one; put @initialiser(...) above it")
    return made


def make(
    name: str, method: Method, site: Site, start: Start, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The factors of a site as the initialiser makes them.

    Raises:
        IntarsiaError: where they are not finite numbers of these shapes.
    """
    made = dict(find(name).make(method, site, start))
    for key, shape in shapes.items():
        found = tuple(made[key].shape) if key in made else "none"
        if found != shape or not made[key].isfinite().all():
            wrong = "numbers that are not finite" if found == shape else found
            raise IntarsiaError(
                f"{site.name}: the initialiser {name!r} gave {wrong} for {key}; expected finite {shape}"
            )
    return {key: made[key] for key in shapes}
