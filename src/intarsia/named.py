"""What goes by a name and has fields: methods, optimizers, allocators. And the catalogues in which they are found.

Each is a frozen dataclass. Its fields are its hyperparameters, from which flags, config, tables and tests come.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, ClassVar, Generic, TypeVar

from intarsia.errors import IntarsiaError, nearest


def option(default: Any, help: str, *, tokens: bool = False) -> Any:
    """A hyperparameter: its default and one line for the command line, the docs and the config schema.

    ``tokens``: a list of token numbers. Methods know no tokenizer; who has one may be given the text (:func:`registry.with_tokens`).
    """
    return field(default=default, metadata={"help": help} | ({"tokens": True} if tokens else {}))


class Named:
    """The facts that all have, and how they are written down."""

    name: ClassVar[str]  # as in configs and on the command line
    title: ClassVar[str]  # as in the paper
    formula: ClassVar[str]  # one line
    paper: ClassVar[str]  # "arXiv:...."

    def config(self) -> dict[str, Any]:
        """Name and fields as plain JSON values; an equal one is built of it."""
        return {"name": self.name} | {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def require(self, holds: bool, field: str, expected: str) -> None:
        """For ``__post_init__``: one readable error for a field out of its range."""
        if not holds:
            raise IntarsiaError(f"{self.name}: {field}={getattr(self, field)!r} must be {expected}")


def _plain(value: Any) -> Any:
    """A field's value as JSON gives it back: a tuple is a list there."""
    if isinstance(value, Named):
        return value.config()
    return list(value) if isinstance(value, tuple) else value


N = TypeVar("N", bound=Named)
C = TypeVar("C", bound=type[Named])


class Catalogue(Generic[N]):
    """Those of one kind by name: ours, and those of other packages (an entry-point group).

    Args:
        what: the kind, as errors say it: ``method``.
        group: of entry points.
    """

    def __init__(self, what: str, group: str) -> None:
        self.what, self.group = what, group
        self.classes: dict[str, type[N]] = {}
        self.complete = False  # whether other packages have been asked

    def register(self, cls: C) -> C:
        """Class decorator: make one known under its ``name``. A name that is taken is an error."""
        taken = self.classes.get(cls.name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise IntarsiaError(f"the {self.what} name {cls.name!r} of {cls.__module__} is taken by {taken.__module__}")
        self.classes[cls.name] = cls  # type: ignore[assignment]
        return cls

    def known(self) -> dict[str, type[N]]:
        """All by name, in alphabetical order."""
        if not self.complete:
            for point in importlib.metadata.entry_points(group=self.group):
                try:
                    self.register(point.load())
                except Exception as error:
                    raise IntarsiaError(
                        f"the package {point.dist.name if point.dist else '?'} offers the {self.what} {point.name!r}, "
                        f"but loading {point.value} failed: {error}; repair or uninstall that package"
                    ) from error
            self.complete = True
        return dict(sorted(self.classes.items()))

    def find(self, name: str, also: Iterable[str] = ()) -> type[N]:
        """The one of that name. Raises IntarsiaError for an unknown one, with the nearest of these and ``also``."""
        known = self.known()
        if name not in known:
            raise IntarsiaError(f"unknown {self.what} {name!r}; {nearest(name, [*known, *also])}")
        return known[name]

    def told(self, config: str | Mapping[str, Any]) -> Mapping[str, Any]:
        """The config as a mapping with a name. Raises IntarsiaError for what is none."""
        config = {"name": config} if isinstance(config, str) else config
        if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
            article = "an" if self.what[0] in "aeiou" else "a"
            raise IntarsiaError(f"{article} {self.what} is given as {{name: ..., field: value}}; found {config!r}")
        return config
