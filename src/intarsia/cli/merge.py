"""``intarsia merge CONFIG.yaml [a.b=c ...]``: one adapter of several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli import reporting, searching, terminal
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from torch import Tensor

    from intarsia.cli.reporting import Asked
    from intarsia.merge import Plan, Recipe
    from intarsia.pretrained import Pretrained
    from intarsia.store import Adapter
    from intarsia.train.progress import Progress


def merge(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.yaml", help="The merge: merge_method, adapters, output.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Set on top of it: parameters.lambda=0.5", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what is merged how, and stop.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config, and stop.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that stands in the output folder.")
    ] = False,
    report: Annotated[
        str, typer.Option("--report", help="What to say of the adapters before: none, overlap, products, spectral.")
    ] = "products",
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME=FILE", help="Measure what is kept of an adapter's skill, on these rows."),
    ] = None,
    other: Annotated[
        list[Path] | None, typer.Option("--other", help="Rows of other text, to measure what is forgotten.")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Measure on so many rows of each file.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the report: FILE.png; what is kept: FILE-retained.png.")
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            metavar="NAME=FILE",
            help="Find the weights, on rows of each adapter's skill: once for every adapter.",
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Points to measure in a search; 60.")] = None,
    objective: Annotated[
        str | None, typer.Option("--objective", help="Of the skills' retained shares in a search: worst, mean.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin a search anew that was interrupted.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Make one adapter of several: a folder as any other, with what it was made of in it."""
    from intarsia.merge import load_recipe, settle
    from intarsia.merge import schema as recipe_schema

    if schema:
        return terminal.print_json(recipe_schema())
    if config is None:
        raise IntarsiaError("a config file is needed: intarsia merge CONFIG.yaml (--schema prints what it may hold)")
    recipe = load_recipe(config, [*(overrides or []), *(["overwrite=true"] if overwrite else [])])
    output = None if dry_run and recipe.output is None else _output(recipe)
    ready = settle(recipe.open(), recipe.wanted())
    asked = reporting.asked(ready, report, data or [], other or [], rows, plot)
    sought = searching.wanted(recipe, search or [], trials, objective, restart, asked)
    if sought is not None:
        searching.check(ready, sought)
        if output is not None and not dry_run:
            return searching.run(ready, recipe, sought, asked, output, restart, json)
    more = {} if sought is None else {"search": searching.described(sought, ready)}
    return _merge(ready, recipe, output, asked, dry_run, json, more)


def _output(recipe: Recipe) -> Path:
    """Where the adapter goes. Raises IntarsiaError where nothing can be written there: before any work is done."""
    from intarsia.interop.output import check_output
    from intarsia.store import HEAD

    if recipe.output is None:
        raise IntarsiaError("key 'output' is missing: the folder to write the merged adapter to (or output=FOLDER)")
    output = Path(recipe.output)
    if any(Path(part.adapter).resolve() == output.resolve() for part in recipe.adapters):
        raise IntarsiaError(
            f"{output} is one of the adapters that are merged; choose another folder for what comes of them"
        )
    check_output(output, recipe.overwrite, "an adapter", marks=(HEAD,))
    return output


def _merge(
    ready: Plan, recipe: Recipe, output: Path | None, asked: Asked, dry_run: bool, json: bool, more: Mapping[str, Any]
) -> None:
    from intarsia import store
    from intarsia.merge import check_kinds, made

    with terminal.progress() as progress:
        check_kinds(ready, recipe.model is not None or asked.measures)
        loaded = reporting.model_of(ready, recipe, progress) if asked.measures and not dry_run else None
        tasks = None if loaded is None else reporting.tasks_of(asked, loaded, progress)
        base = _base_weights(ready, recipe, loaded, progress)
        found = reporting.before(ready, asked, base, progress)
    plain = _plain(ready, output) | ({} if found is None else {"interference": found.to_dict()}) | dict(more)
    if not json:
        _print_plan(ready)
        if found is not None:
            reporting.print_before(found)
    if dry_run:
        return terminal.print_json(plain) if json else None
    assert output is not None
    with terminal.progress() as progress:
        adapter = made(ready, name=output.name, base=base, progress=progress.work)
        store.write(adapter, output, recipe.overwrite, values=None if recipe.values == "exact" else recipe.values)
    files = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    if not json:
        _print_made(adapter, output, sum(files.values()))
    kept = None
    if loaded is not None and tasks is not None:
        with terminal.progress() as progress:  # of what was written, which may have been rounded
            kept = reporting.after(ready, asked, store.read(output), loaded, tasks, progress)
    if json:
        plain |= {"digest": adapter.digest, "bytes": sum(files.values()), "note": dict(adapter.note)}
        plain |= {"touched": adapter.touched, "edits": _kinds(adapter)}
        return terminal.print_json(plain | ({} if kept is None else {"measured": kept.to_dict()}))
    if kept is not None:
        reporting.print_after(kept)
    return None


def _base_weights(
    ready: Plan, recipe: Recipe, loaded: Pretrained | None, progress: Progress
) -> Mapping[str, Tensor] | None:
    """The base's weights, where the config names it or it is loaded, and a change depends on them."""
    from intarsia.site import matrix_at

    edits = [edit for adapter in ready.adapters.values() for edit in adapter.outlines.values()]
    if not any(edit.needs_weight for edit in edits) or (recipe.model is None and loaded is None):
        return None
    from intarsia.model import check_fits, digest

    model = (loaded or reporting.model_of(ready, recipe, progress)).model
    for name, adapter in ready.adapters.items():
        check_fits(model, adapter, name, digest(model))
    return {weight: matrix_at(model, weight) for weight in ready.rules}


def _plain(ready: Plan, output: Path | None) -> dict[str, Any]:
    return {
        "output": None if output is None else str(output),
        "method": ready.config(),
        "adapters": ready.lineage(),
        "base": next(iter(ready.adapters.values())).base.digest,
        "weights": len(ready.rules),
    }


def _kinds(adapter: Adapter) -> dict[str, int]:
    kinds = [edit.kind for edit in adapter.edits.values()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _print_plan(ready: Plan) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = terminal.output()
    method = {key: value for key, value in ready.config().items() if key != "name"}
    out.print(
        f"[bold]{escape(str(method.pop('rule')))}[/]  "
        + escape("  ".join(f"{k}={_said(v)}" for k, v in method.items()))
    )
    lineage = ready.lineage()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("adapter", no_wrap=True, style="cyan")
    own = [key for key in next(iter(lineage.values())) if key not in ("digest", "method")]
    for column in ("method", "weights", "entries", *own, "sha256"):
        table.add_column(column)
    for name, facts in lineage.items():
        adapter = ready.adapters[name]
        shown = [
            str(facts["method"]),
            str(len(adapter.outlines)),
            f"{adapter.touched:,}",
            *(_said(facts[key]) for key in own),
        ]
        table.add_row(escape(name), *map(escape, shown), str(facts["digest"])[:12])
    out.print(table)


def _print_made(adapter: Adapter, output: Path, stored: int) -> None:
    from intarsia.train.progress import size

    out = terminal.output()
    kinds = ", ".join(f"{count} {kind}" for kind, count in _kinds(adapter).items())
    out.print(f"{output}  {kinds}; {size(stored)}, sha256 {adapter.digest[:12]}", markup=False, soft_wrap=True)
    for key, value in adapter.note.items():
        out.print(f"  {key}: {value:.2%}", markup=False, soft_wrap=True)


def _said(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_said, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_said(v)}" for k, v in value.items()) + "}"
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))
    )
