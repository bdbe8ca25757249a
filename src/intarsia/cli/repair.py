"""``intarsia repair ADAPTER OUT``: scale an adapter's intruder dimensions down, and write the result as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import directions, given, terminal
from intarsia.cli.directions import Epsilon, Side, Top
from intarsia.errors import IntarsiaError


def repair(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Its folder, or NAME@VERSION in the registry.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The base; by default the one that the adapter was made on.")
    ] = None,
    factor: Annotated[
        float, typer.Option("--lambda", help="What an intruder is multiplied by: 1 keeps it, 0 removes it.")
    ] = 0.75,
    top: Top = 10,
    epsilon: Epsilon = 0.5,
    side: Side = "left",
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Cut what was repaired to low-rank edits of this rank, with a loss."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Scale intruder dimensions down: knowledge of the base comes back at a small cost on the task. Nothing else changes."""
    from intarsia import analyze, store
    from intarsia.interop.output import check_output

    analyze.check_settings(top, epsilon, side)
    analyze.check_factor(factor)
    source = given.adapter_folder(adapter)
    if output.resolve() == source.resolve():
        raise IntarsiaError(f"{output} is what is repaired; choose another folder for what comes of it")
    check_output(output, overwrite, "an adapter", marks=(store.HEAD,))
    found = store.read(source)
    with terminal.progress() as progress:
        base = given.base_of({found.name: found}, model)
        weights = directions.base_weights(found, base, progress, named=model is not None)
        looked = analyze.adapter_intruders(
            found, weights, top=top, epsilon=epsilon, side=side, progress=progress.work
        )  # fmt: skip
        made = analyze.repair(
            found, looked, weights, factor=factor, rank=rank, name=output.resolve().name, progress=progress.work
        )
        folder = store.write(made.adapter, output, overwrite)
    if json:
        return terminal.print_json(
            {"output": str(folder), "lambda": factor, "rank": rank} | made.to_dict()
            | {"found": directions.counts(looked, top, epsilon, side)}
        )  # fmt: skip
    directions.print_table(looked, top, epsilon, side)
    loss = f"{made.loss:.1%} of their change is lost by cutting it to rank {rank}" if made.loss else "exact"
    what = (
        f"{directions.named(made.intruders)} times {factor:g}, {loss}"
        if made.intruders
        else "nothing to repair: a copy"
    )
    terminal.output().print(f"\n{folder}  {what}", markup=False, soft_wrap=True)
    return None
