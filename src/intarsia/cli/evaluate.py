"""``intarsia eval ADAPTER... --data F``: base and adapters side by side, on one data file or several."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli import given, terminal
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from intarsia.evaluate import Matrix, Task
    from intarsia.pretrained import Pretrained
    from intarsia.train.data import DataReport


def evaluate(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders, NAME=FOLDER, or NAME@VERSION in the registry.")
    ],
    data: Annotated[list[Path], typer.Option("--data", help="Rows to measure on; may be given several times.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The base; by default the one that the adapters were made on.")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="Shape of the rows: alpaca, chat, prompt, text.")] = "auto",
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="At most so many rows of each file.")] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens a row; the rest is cut off.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows a forward pass.")] = 16,
    answers: Annotated[
        bool, typer.Option("--answers", help="Let each answer too, and count what is right to the letter. Slower.")
    ] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave bad rows out and count them, instead of stopping.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Loss on the answers of held-out rows: the base and every adapter, on every file."""
    from intarsia.deck import Deck
    from intarsia.evaluate import matrix

    names = _task_names(data)
    found = given.read_adapters(adapters)
    if "base" in found:
        raise IntarsiaError("an adapter named 'base' would be taken for the base; give it another name: other=FOLDER")
    with terminal.progress() as progress:
        pretrained = given.load_base(found, model, progress)
        tasks, reports = _tasks(names, pretrained, format, rows, max_length, skip_bad_rows, answers)
        for report in reports.values():
            progress.say(str(report))
        deck = Deck(pretrained.model)
        deck.add(*found.values())
        measured = matrix(
            pretrained.model,
            pretrained.tokenizer,
            tasks,
            list(found),
            lambda name: deck.off() if name is None else deck.use(name),
            batch_size=batch_size,
            progress=progress.work,
        )
    if json:
        plain = measured.to_dict()
        digests = {name: adapter.digest for name, adapter in found.items()}
        return terminal.print_json(
            {"model": pretrained.name, "loss": plain["loss"], "right": plain["score"], "adapters": digests}
            | {"data": {name: asdict(report) for name, report in reports.items()}}
        )
    return _print(measured, tasks)


def _task_names(data: list[Path]) -> dict[str, Path]:
    """A name for every file: its stem, or the whole path where stems are alike. All must be there, before a model is loaded."""
    if missing := [str(path) for path in data if not path.is_file()]:
        raise IntarsiaError(f"no data file {', '.join(missing)}")
    stems = [path.stem for path in data]
    named = {path.stem if stems.count(path.stem) == 1 else str(path): path for path in data}
    if len(named) < len(data):
        raise IntarsiaError("a data file is given twice")
    return named


def _tasks(
    names: dict[str, Path],
    pretrained: Pretrained,
    format: str,
    rows: int | None,
    max_length: int,
    skip_bad_rows: bool,
    answers: bool,
) -> tuple[list[Task], dict[str, DataReport]]:
    from intarsia.evaluate import Task, answerable
    from intarsia.train.data import load_examples

    tasks, reports = [], {}
    for name, path in names.items():
        examples, reports[name] = load_examples(
            path, pretrained.tokenizer, format=format, max_length=max_length, skip_bad_rows=skip_bad_rows
        )
        tasks.append(Task(name, examples[:rows]))
        if answers:
            tasks[-1] = answerable(tasks[-1], path, reports[name].format, pretrained.tokenizer)
    return tasks, reports


def _print(measured: Matrix, tasks: list[Task]) -> None:
    from rich.table import Table

    from intarsia.evaluate import BASE

    out = terminal.output()
    if len(tasks) > 1:
        table = measured.table()
        table.title = "loss (nats a token of the answers), the best of each file in bold"
        out.print(table)
        return
    name = tasks[0].name
    base = measured[BASE, name].loss
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("adapter", no_wrap=True)
    asked = tasks[0].measure is not None
    for column in ("loss", "less than base", "perplexity", *(("right",) if asked else ())):
        table.add_column(column, justify="right")
    for adapter in measured.adapters:
        loss = measured[adapter, name].loss
        best = adapter == measured.best(name)
        less = "" if adapter == BASE else f"{base - loss:+.4f}"
        shown = f"{loss:.4f}"
        row = [adapter, f"[bold green]{shown}[/]" if best else shown, less, f"{_exp(loss):.4g}"]
        table.add_row(*row, *([f"{measured[adapter, name].score:.1%}"] if asked else []))
    tokens = sum(example.trained for example in tasks[0].examples)
    out.print(table)
    out.print(f"[dim]{name}: {len(tasks[0].examples)} rows, {tokens:,} tokens of answers[/]")


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
