"""``intarsia demo``: the whole story on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import terminal


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller one, in under two minutes.")] = False,
    output: Annotated[Path, typer.Option("--output", help="Folder for adapters, picture and report.")] = Path(
        "out/demo"
    ),
    model: Annotated[str, typer.Option("--model", help="Another base than the small default.")] = "smollm2-135m",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the data, the supports and the order.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="For machines: the figures on stdout.")] = False,
) -> None:
    """Train three skills on a small real model, switch, fuse, and show what came of it, in minutes on a CPU."""
    from intarsia.demo.run import run

    result = run(output, quick=quick, model=model, seed=seed, progress=terminal.progress())
    if json:
        terminal.print_json(result.to_dict())
    else:
        out = terminal.output()
        out.print(result)
        adapters = " ".join(adapter.folder for adapter in result.adapters if adapter.sparse)
        out.print(f"\ntalk to it: intarsia chat {result.model} {adapters} --plain", markup=False, soft_wrap=True)
    if not result.exactness.exact:
        raise typer.Exit(1)
