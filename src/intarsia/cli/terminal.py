"""What all commands share: where they print, how they show progress, and how they end."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from intarsia.train.progress import Progress

WIDE = 300  # columns where there is no terminal, so that a table in a file or a pipe is not folded
DEBUG = "INTARSIA_DEBUG"  # set to 1: tracebacks, and what other libraries have to say

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}

INTERRUPTED = 130  # as a shell counts a program that Ctrl-C ended


def output() -> Console:
    """Standard output, for what was asked for."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDE)


def messages() -> Console:
    """Standard error, for progress, notes and errors."""
    return Console(file=sys.stderr, highlight=False, width=None if sys.stderr.isatty() else WIDE)


def print_json(value: Any) -> None:
    """One JSON document on standard output. Infinity and NaN, which JSON has not, become null."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def progress() -> Progress:
    """Progress on standard error: a live line on a terminal, plain lines now and then elsewhere."""
    from intarsia.train.progress import progress_on

    return progress_on(messages())


def is_first() -> bool:
    """Whether this is the process that speaks, where a launcher has started several."""
    return os.environ.get("RANK", "0") == "0"


def debugging() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def show_error(message: str) -> None:
    """``error: message``, with the traceback of what is being handled where that is asked for."""
    if debugging() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    messages().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def hush() -> None:
    """Silence other libraries: their bars and warnings say nothing that a user here can act on."""
    if debugging():
        return
    import warnings

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
