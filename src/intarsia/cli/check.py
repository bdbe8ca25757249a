"""``intarsia check module:Method``: the public contract, on a method of one's own."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli import terminal
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from intarsia.contract import Result
    from intarsia.method import Method

MARKS = {"holds": "[green]holds[/]", "broken": "[bold red]broken[/]", "expected": "[yellow]declared[/]"}


def check(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:METHOD", help="A class to import (the current folder counts), or a method's name."
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Run every law of the contract on a method. Exit code 1 if one is broken."""
    from intarsia import contract

    results: list[Result] = []
    with _current_folder_first(), terminal.progress() as progress:
        methods = _settings(subject)
        for method in methods:
            for law in contract.LAWS:
                progress.work(len(results) + 1, len(methods) * len(contract.LAWS), f"{method.name}: {law}:")
                results.append(contract.judge(law, method))
    passed = all(result.state != "broken" for result in results)
    if json:
        plain = [asdict(result) for result in results]
        terminal.print_json({"subject": subject, "passed": passed, "results": plain})
    else:
        _print(results, methods)
    if not passed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    """A console script does not look for modules in the current folder by itself."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _settings(subject: str) -> list[Method]:
    """The settings to run. What goes wrong in somebody's module is told as theirs, with its place."""
    from intarsia import contract

    try:
        return contract.settings(subject)
    except IntarsiaError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if "importlib" not in f.filename and "/intarsia/" not in f.filename]
        place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
        raise IntarsiaError(f"{subject}: {type(error).__name__}: {error}{place}") from error


def _print(results: list[Result], methods: list[Method]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("law", "", "found"):
        table.add_column(column, no_wrap=column == "law")
    for law in dict.fromkeys(result.law for result in results):
        of = [result for result in results if result.law == law]
        states = [result.state for result in of]
        worst = next(state for state in ("broken", "expected", "holds") if state in states)
        notes = [f"{_setting(result, methods)}{result.note}" for result in of if result.state == worst and result.note]
        table.add_row(law, MARKS[worst], escape("\n".join(dict.fromkeys(notes))))
    out = terminal.output()
    out.print(table)
    broken = sum(result.state == "broken" for result in results)
    said = f"[bold red]{broken} broken[/]" if broken else "[green]every law holds[/]"
    out.print(f"\n{said}: {len(results)} checks in {len(methods)} settings of {methods[0].name}")


def _setting(result: Result, methods: list[Method]) -> str:
    """``density=0.1, scorer=snip: ``, as far as it differs between the settings."""
    configs = [method.config() for method in methods]
    differing = {k: v for k, v in result.method.items() if any(config.get(k) != v for config in configs)}
    return ", ".join(f"{k}={v}" for k, v in differing.items()) + ": " if differing else ""
