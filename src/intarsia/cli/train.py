"""``intarsia train CONFIG.yaml [a.b=c ...]``: train an adapter, or look at what would be trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli import terminal
from intarsia.cli.given import adapter_folder
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from intarsia.train.config import Config


def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.yaml", help="The run: model, data, method, output.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Set on top of it: train.lr=1e-3", show_default=False),
    ] = None,
    show_batch: Annotated[
        bool, typer.Option("--show-batch", help="Print what is trained and what is masked in a few rows, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what the run will take, and stop.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config, and stop.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that stands in the output folder.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew instead of going on with a stopped run.")
    ] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave bad rows out and count them, instead of stopping.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines: the report on stdout.")] = False,
) -> None:
    """Train an adapter. The same command goes on with a run that was stopped."""
    from intarsia.train.config import load_config
    from intarsia.train.config import schema as config_schema

    if schema:
        return terminal.print_json(config_schema())
    if config is None:
        raise IntarsiaError("a config file is needed: intarsia train CONFIG.yaml (--schema prints what it may hold)")
    changes = list(overrides or [])
    changes += ["overwrite=true"] if overwrite else []
    changes += ["data.skip_bad_rows=true"] if skip_bad_rows else []
    wanted = load_config(config, changes)
    wanted = wanted.model_copy(update={"avoid": [str(adapter_folder(text)) for text in wanted.avoid]})
    if show_batch:
        return _show_batch(wanted, json)
    if dry_run:
        return _dry_run(wanted, restart, json)
    return _train(wanted, restart, json)


def _train(config: Config, restart: bool, json: bool) -> None:
    from intarsia import processes
    from intarsia.train.trainer import train as run

    outcome = run(config, progress=terminal.progress(), resume="never" if restart else "auto")
    processes.leave()
    if not terminal.is_first():
        return None
    if json:
        return terminal.print_json(asdict(outcome))
    terminal.output().print(f"{outcome.output}  sha256 {outcome.digest[:12]}", markup=False)
    return None


def _dry_run(config: Config, restart: bool, json: bool) -> None:
    from intarsia.train.plan import plan
    from intarsia.train.unfinished import Unfinished

    with terminal.progress() as progress:
        ready = plan(config, progress=progress)
        state = Unfinished(config.output)
        state.check(ready.settings, config.overwrite, restart, ready.estimate.checkpoint_bytes)
        for warning in ready.warnings():
            progress.warn(warning)
    if json:
        reports = [asdict(report) for report in ready.reports]
        plain = asdict(ready.estimate) | {"share": ready.estimate.share, "method": ready.method.config()}
        return terminal.print_json(plain | {"warnings": ready.warnings(), "data": reports})
    out = terminal.output()
    out.print(str(ready.estimate), markup=False)
    for report in ready.reports:
        out.print(str(report), markup=False)
    return None


def _show_batch(config: Config, json: bool) -> None:
    from intarsia.train.plan import show_batch

    view = show_batch(config)
    if json:
        return terminal.print_json([asdict(example) | {"trained": example.trained} for example in view.examples])
    terminal.output().print(view)
    return None
