"""Where intarsia keeps what it makes for itself: the cache, which may go at any time, and the user's data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$INTARSIA_CACHE``, else ``$XDG_CACHE_HOME/intarsia``, else ``~/.cache/intarsia``; it need not exist yet."""
    if own := os.environ.get("INTARSIA_CACHE"):
        return Path(own).expanduser()
    return _shared("XDG_CACHE_HOME", ".cache")


def data_folder() -> Path:
    """``$XDG_DATA_HOME/intarsia``, else ``~/.local/share/intarsia``; it need not exist yet."""
    return _shared("XDG_DATA_HOME", ".local/share")


def _shared(variable: str, default: str) -> Path:
    shared = os.environ.get(variable)
    return (Path(shared) if shared else Path.home() / default) / "intarsia"
