"""``intarsia bench``: what a training step costs, how good each method gets, and what a switch costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli import terminal
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from intarsia.bench.grid import Grid


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
        for table in costs.tables(name, out.width):
            out.print(table)
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
    "step: forward, backward and the optimizer's part, median of the visits, ± half the distance of their quartiles. / NAME: the "
    "median of the ratios within rounds. Peak: base, adapter, optimizer and the most that a step adds."
)


def _writable(*files: Path | None) -> None:
    """Say at once what would otherwise be said after an hour."""
    for file in files:
        if file is not None and file.is_dir():
            raise IntarsiaError(f"{file} is a folder; name a file in it")
        if file is not None and file.suffix not in (".json", ".png"):
            raise IntarsiaError(f"{file}: expected a name that ends in .json (--json) or .png (--plot)")


def methods(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [KEY=VALUE]...", help="The comparison, and what to set on top.", show_default=False
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Rows to train on; a share of them is held out.")] = None,
    held_out: Annotated[Path | None, typer.Option("--eval", help="Rows held out, instead of a share.")] = None,
    skill: Annotated[str | None, typer.Option("--skill", help="One of the demo's skills instead of data.")] = None,
    other: Annotated[Path | None, typer.Option("--other", help="Other rows, on which forgetting is measured.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="'shira scorer=snip'. May be given several times.")
    ] = None,
    lr: Annotated[str | None, typer.Option("--lr", help="1e-3,4e-3; 0.5x,1x: multiples of each method's own.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many.")] = None,
    count: Annotated[
        str | None, typer.Option("--count", help="Everybody trains so many numbers, or as many as 'lora rank=3'.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps a run.")] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Let each run answer too, for the task's own measure. Slower.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the finished runs.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the finished runs of that folder.")] = False,
    behaviour: Annotated[
        str | None,
        typer.Option("--behaviour", help="Instead, what a system claims, on a small problem: its name, or 'all'."),
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Name the runs, and stop.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw loss over learning rate to this PNG.")] = None,
) -> None:
    """How good each method gets: methods x learning rates x seeds. The same command goes on with what was stopped."""
    if behaviour is not None:
        if words or plot:
            raise IntarsiaError("--behaviour looks at small problems of its own; leave out the config and --plot")
        return _behaviours(behaviour, list_them, json)
    from intarsia.bench.grid import Grid
    from intarsia.train.config import load_tree, validated

    _writable(json, plot)
    words = list(words or [])
    config = words.pop(0) if words and ("=" not in words[0] or Path(words[0]).is_file()) else None
    tree = load_tree(config, words)
    given = {
        "model": model,
        "skill": skill,
        "other": other,
        "methods": method,
        "lr": lr,
        "seeds": seeds,
        "output": output,
    }
    tree |= {key: str(value) if isinstance(value, Path) else value for key, value in given.items() if value is not None}
    if count is not None:
        tree["count"] = int(count) if count.isdigit() else count
    for section, values in (("data", {"train": data, "eval": held_out}), ("train", {"steps": steps})):
        if found := {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if v is not None}:
            before = tree.get(section) or {}
            tree[section] = ({"train": before} if isinstance(before, str) else dict(before)) | found
    tree |= {"answers": True} if answers else {}
    grid = validated(Grid, tree, config or "bench methods")
    if list_them:
        return _list(grid)
    return _compare(grid, restart, json, plot)


def _behaviours(name: str, list_them: bool, json: Path | None) -> None:
    from rich.table import Table

    from intarsia.bench.behaviours import behaviours
    from intarsia.bench.machine import machine, write_json

    _writable(json)
    found, out = behaviours(name), terminal.output()
    if list_them:
        for one in found:
            out.print(f"[bold cyan]{one.system:24}[/]{one.claim}")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("system", "measure", "", "found", "against", "", "shows"):
        table.add_column(column, justify="right" if not column or column == "found" else "left")
    rows = []
    with terminal.progress() as progress:
        for number, one in enumerate(found):
            progress.work(number, len(found), f"{one.system}: {one.claim}:")
            for seen in one.look():
                rows.append({"system": one.system, "claim": one.claim} | seen.to_dict())
                table.add_row(
                    one.system, seen.measure, seen.subject, f"{seen.value:.4g}", seen.against, f"{seen.other:.4g}",
                    "[green]yes[/]" if seen.shows else "[bold red]no[/]",
                )  # fmt: skip
    out.print(table)
    for one in found:
        out.print(f"{one.system}: {one.claim}", markup=False, style="dim")
    if json:
        write_json(json, machine() | {"rows": rows})


def _list(grid: Grid) -> None:
    from intarsia.bench.grid import cases, check_methods, entries

    check_methods(grid)
    found = cases(grid, entries(grid, None))
    for case in found:
        terminal.output().print(str(case), markup=False)
    terminal.output().print(f"{len(found)} runs")


def _compare(grid: Grid, restart: bool, json: Path | None, plot: Path | None) -> None:
    from intarsia.bench.machine import write_json
    from intarsia.bench.methods import run

    out = terminal.output()
    quality = run(grid, progress=terminal.progress(), restart=restart)
    folder = Path(grid.output)
    for file in (folder / "results.json", *([json] if json else [])):
        write_json(file, quality.to_dict())
    if quality.runs:
        out.print(quality.grid_table())
        out.print()
        out.print(quality.best_table())
        for file in (folder / "results.png", *([plot] if plot else [])):
            quality.picture(file)
    if quality.interrupted:
        terminal.messages().print(
            f"stopped after {len(quality.runs)} of {quality.wanted} runs; the same command goes on from there"
        )
        raise typer.Exit(terminal.INTERRUPTED)


def switch(
    shape: Annotated[
        list[str] | None, typer.Option("--shape", help="Of a single weight: 4096x4096. May be given several times.")
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option("--density", help="Share of the entries, 0.01. Several times too.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or both.")] = "both",
    granularity: Annotated[
        list[str] | None,
        typer.Option("--granularity", help="element, line, tile, row, column or diagonal. Several times too."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="For switches of a whole model, by name; none leaves them out.")
    ] = "smollm2-135m",
    rank: Annotated[
        int, typer.Option("--rank", min=1, help="Of the LoRA on a single weight; on a model it is 16.")
    ] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed switches of each way.")] = 25,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of the CPU.")] = 2,
    writer: Annotated[str, typer.Option("--writer", help="Of the deck: native, torch, or auto.")] = "auto",
    warm: Annotated[
        bool, typer.Option("--warm", help="Do each once more before it is timed, instead of emptying the caches.")
    ] = False,
    list_them: Annotated[bool, typer.Option("--list", help="Name what is compared with, and stop.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw them to this PNG.")] = None,
) -> None:
    """What a switch of adapters costs: the deck, LoRA in place, HF PEFT, a dense copy, and the limit of memory."""
    from intarsia.bench import switch as bench
    from intarsia.bench.machine import write_json

    out = terminal.output()
    if list_them:
        for name, title in bench.AGAINST.items():
            out.print(f"[bold cyan]{name:24}[/]{title}")
        return
    _writable(json, plot)
    usual = bench.Setup()
    setup = bench.Setup(
        shapes=tuple(shape or usual.shapes),
        densities=tuple(density or usual.densities),
        dtype=dtype,
        granularities=tuple(granularity or usual.granularities),
        model=model,
        rank=rank,
        rounds=rounds,
        threads=threads,
        writer=writer,
        warm=warm,
        seed=seed,
    )
    found = bench.run(setup, terminal.progress())
    for table in found.tables():
        out.print(table)
        out.print()
    for one in found.skipped:
        terminal.messages().print(f"{one['subject']}, {one['dtype']}, is left out: {one['why']}", markup=False)
    if json:
        write_json(json, found.to_dict())
    if plot and found.groups():
        found.picture(plot)
    if found.interrupted:
        terminal.messages().print("interrupted; this is what had been measured")
        raise typer.Exit(terminal.INTERRUPTED)
