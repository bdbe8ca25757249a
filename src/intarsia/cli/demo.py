"""``intarsia demo``: the whole story on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller one, in under two minutes.")] = False,
    output: Annotated[Path, typer.Option("--output", help="Folder for adapters, plots and the report.")] = Path(
        "out/demo"
    ),
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Train three skills on a small real model, switch, fuse, and show what came of it, in minutes on a CPU."""
    raise NotImplementedError
