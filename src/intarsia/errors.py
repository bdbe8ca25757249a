"""The one exception for a user's mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IntarsiaError(ValueError):
    """A mistake in what was asked for, or in a file that was given.

    The message names what is wrong, where, what was found, what was expected and what to do about it. It is raised
    before anything is changed. The command line prints it alone, without a traceback, and exits with code 2.
    """


class ElsewhereError(IntarsiaError):
    """The mistake that another process has found and told of; this one ends with it, and need not tell it again."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """The known words most like ``word``, or simply the known ones: the tail of an "unknown name" message."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=n, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known) or 'none'}"
