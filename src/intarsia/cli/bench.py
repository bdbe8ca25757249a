"""``intarsia bench train`` and ``intarsia bench methods``: what a step costs, and how good each method gets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import terminal
from intarsia.errors import IntarsiaError


def train(
    size: Annotated[str, typer.Option("--size", help="A Llama of random weights: tiny, 47m, 135m, 1b, 8b...")] = "47m",
    model: Annotated[
        str | None, typer.Option("--model", help="A model by name instead: a folder, a .gguf file, a hub id.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or both.")] = "both",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; by default CUDA where there is one.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows a step.")] = 2,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a row.")] = 256,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed visits of each contender.")] = 9,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps a visit, after one that is not.")] = 2,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of the CPU.")] = 2,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Contenders, by name or glob: 'tile,peft-*'. May be given several times."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="A further one: 'shira granularity=tile density=0.02'. Several times too."),
    ] = None,
    longest: Annotated[
        bool, typer.Option("--longest", help="Find the longest sequence that fits as well. On a GPU.")
    ] = False,
    list_them: Annotated[bool, typer.Option("--list", help="Name the contenders, and stop.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the weights, the batch and the order.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw them to this PNG.")] = None,
) -> None:
    """What a training step costs in time and memory: ours, PEFT's, full fine-tuning and the floor, side by side."""
    from intarsia.bench import train as bench
    from intarsia.bench.machine import write_json

    out = terminal.output()
    if list_them:
        for contender in bench.known():
            out.print(f"[bold cyan]{contender.name:24}[/]{contender.title}")
        return
    _writable(json, plot)
    setup = bench.Setup(
        size=size,
        model=model,
        dtype=dtype,
        device=device,
        batch=batch,
        length=length,
        rounds=rounds,
        steps=steps,
        threads=threads,
        only=tuple(only or ()),
        methods=tuple(method or ()),
        longest=longest,
        seed=seed,
    )
    costs = bench.run(setup, terminal.progress())
    for name in costs.dtypes():
        out.print(costs.table(name))
        out.print()
    if costs.rows:
        out.print(_LEGEND, style="dim")
    if json:
        write_json(json, costs.to_dict())
    if plot and costs.rows:
        costs.picture(plot)
    if costs.interrupted:
        terminal.messages().print("interrupted; this is what had been measured")
        raise typer.Exit(terminal.INTERRUPTED)


_LEGEND = (
    "fwd+bwd: median of the visits, ± half the distance of their quartiles. / NAME: the median of the ratios within rounds, of "
    "forward and backward. Peak: base, adapter, optimizer and the most that a step adds."
)


def _writable(*files: Path | None) -> None:
    """Say at once what would otherwise be said after an hour."""
    for file in files:
        if file is not None and file.is_dir():
            raise IntarsiaError(f"{file} is a folder; name a file in it")
        if file is not None and file.suffix not in (".json", ".png"):
            raise IntarsiaError(f"{file}: expected a name that ends in .json (--json) or .png (--plot)")
