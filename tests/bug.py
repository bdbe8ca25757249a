"""What a planted bug is. The list: tests/bugs; who plants them: tests/mutations.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One planted bug: ``old`` becomes ``new`` in a file of the package; ``near`` are the tests to run first."""

    what: str
    file: str
    old: str
    new: str
    near: str
