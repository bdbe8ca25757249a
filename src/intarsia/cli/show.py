"""``intarsia show ADAPTER``: what an adapter is, what it changes, and what rounding leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli import directions, given, terminal
from intarsia.cli.directions import Epsilon, Side, Top
from intarsia.cli.sizes import print_sizes
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from rich.console import Console

    from intarsia.analyze import Group, Intruders, Spectrum, WeightChange
    from intarsia.compress import Size
    from intarsia.store import Adapter
    from intarsia.train.progress import Progress

BARS = "▁▂▃▄▅▆▇█"


def show(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Its folder, or NAME@VERSION in the registry.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The base, to measure the change beside the weights, and what rounding loses."),
    ] = None,
    spectrum: Annotated[
        int, typer.Option("--spectrum", min=0, help="Of how many weights, the most changed ones, to show the spectrum.")
    ] = 3,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw where it changes the base, and the spectra: FILE.png.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write all of it as one page, pictures within it: FILE.html.")
    ] = None,
    intruders: Annotated[
        bool,
        typer.Option("--intruders", help="Look for intruder dimensions, beside the base (--model); takes minutes."),
    ] = False,
    top: Top = 10,
    epsilon: Epsilon = 0.5,
    side: Side = "left",
    sizes: Annotated[
        bool, typer.Option("--sizes", help="What it would take in every coding and compression, written and measured.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What an adapter changes, by how much, and of which rank; its method, sizes, digest and base."""
    from intarsia import analyze, store
    from intarsia.page import write

    folder = given.adapter_folder(adapter)
    found = store.read(folder)
    _check(found, model, plot, html, intruders)
    analyze.check_settings(top, epsilon, side)
    with terminal.progress() as progress:
        weights = directions.base_weights(found, model, progress) if model is not None else None
        changes = analyze.weight_changes(found, weights, progress.work)
        chosen = _most_changed(found, changes, spectrum, weights is not None)
        spectra = analyze.spectra(found, chosen, weights, progress.work)
        looked: list[Intruders] = []
        if intruders and weights is not None:
            looked = analyze.adapter_intruders(
                found, weights, top=top, epsilon=epsilon, side=side, progress=progress.work
            )  # fmt: skip
        measured = _sizes(found, progress) if sizes else []
    changed = [change for change in changes if change.changes_weight]
    if plot is not None and not changed:
        raise IntarsiaError(
            "--plot draws what an adapter changes of weights, and this one changes none: it acts beside layers or before the tokens"
        )
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    if plot is not None:
        title = f"{found.name}: {found.method.get('name', '?')}"
        analyze.picture(changed, spectra, plot, title, looked, epsilon)
    if html is not None:
        write(analyze.report(found, changed, spectra, looked, epsilon=epsilon, file_bytes=sum(files.values())), html)
    if json:
        more: dict[str, Any] = {"intruders": directions.counts(looked, top, epsilon, side)} if intruders else {}
        more |= {"sizes": [size.to_dict() for size in measured]} if sizes else {}
        return terminal.print_json(_plain(found, folder, files, changes, spectra) | more)
    _print(found, folder, files, changes, spectra, model)
    if intruders:
        terminal.output().print()
        directions.print_table(looked, top, epsilon, side)
    if sizes:
        terminal.output().print()
        print_sizes(terminal.output(), measured)
    for what, file in (("picture", plot), ("page", html)):
        if file is not None:
            terminal.output().print(f"\n{what}  {file}", markup=False)
    return None


def _sizes(adapter: Adapter, progress: Progress) -> list[Size]:
    from intarsia.compress import sizes

    return sizes(adapter, progress.work)


def _check(adapter: Adapter, model: str | None, plot: Path | None, html: Path | None, intruders: bool) -> None:
    """What cannot be, before a model is loaded and anything is measured."""
    from intarsia.analyze import check_picture

    if intruders and model is None:
        raise IntarsiaError(
            "intruder dimensions are seen beside the base's weights; name the base: "
            f"--model {adapter.base.source or 'MODEL'}"
        )
    if plot is not None:
        check_picture(plot)
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise IntarsiaError(f"--html {html}: the file name should end in .html")


def _most_changed(adapter: Adapter, changes: Sequence[WeightChange], count: int, based: bool) -> list[str]:
    """The weights with the largest change, largest first; those whose change cannot be known left out."""
    from intarsia import analyze

    def needs_weight(name: str) -> bool:
        within = adapter.edits[name].in_weight()
        return within is not None and analyze.needs_weight(within)

    known = [c for c in changes if c.norm is not None and (based or not needs_weight(c.name))]
    return [c.name for c in sorted(known, key=lambda c: -(c.norm or 0.0))[:count]]


def _plain(
    adapter: Adapter,
    folder: Path,
    files: dict[str, int],
    changes: Sequence[WeightChange],
    spectra: Sequence[Spectrum],
) -> dict[str, Any]:
    from intarsia.analyze import group

    whole = group(changes, lambda c: "all")[0]
    return {
        "name": adapter.name,
        "folder": str(folder),
        "digest": adapter.digest,
        "method": dict(adapter.method),
        "base": {"digest": adapter.base.digest, "dtype": adapter.base.dtype, "source": adapter.base.source},
        "about": dict(adapter.about),
        "note": dict(adapter.note),
        "files": files,
        "bytes": adapter.bytes,
        "weights": len(adapter.edits),
        "touched": adapter.touched,
        "size": adapter.size,
        "share": adapter.touched / adapter.size,
        "norm": whole.norm,
        "relative": whole.relative,
        "multiplications": whole.multiplications,
        "ranks": _ranks(adapter),
        "invisible_share": whole.invisible_share,
        "rounding_error": whole.rounding_error,
        "modules": [g.to_dict() for g in group(changes, lambda c: c.module)],
        "layers": [g.to_dict() for g in group(changes, lambda c: c.layer)],
        "changes": [c.to_dict() for c in changes],
        "spectra": [s.to_dict() for s in spectra],
    }


def _print(
    adapter: Adapter,
    folder: Path,
    files: dict[str, int],
    changes: Sequence[WeightChange],
    spectra: Sequence[Spectrum],
    model: str | None,
) -> None:
    from intarsia.analyze import group

    out = terminal.output()
    whole = group(changes, lambda c: "all")[0]
    _print_facts(out, adapter, folder, files, whole, model)
    out.print()
    _print_modules(out, group(changes, lambda c: c.module), based=model is not None)
    layers = [g for g in group(changes, lambda c: c.layer) if g.name != "None"]
    if len(layers) > 1 and all(g.norm is not None for g in layers):
        _print_layers(out, layers)
    if spectra:
        out.print()
        _print_spectra(out, spectra)


def _print_facts(
    out: Console, adapter: Adapter, folder: Path, files: dict[str, int], whole: Group, model: str | None
) -> None:
    from rich.markup import escape
    from rich.table import Table

    from intarsia.edits import where
    from intarsia.train.progress import size

    method = dict(adapter.method)
    kind = str(method.pop("name", "?"))
    shown = {
        "folder": f"{folder}: " + ", ".join(f"{name} {size(count)}" for name, count in files.items()),
        "method": f"{kind}  " + " ".join(f"{k}={_short(v)}" for k, v in method.items()),
        "changes": f"{adapter.touched:,} of {adapter.size:,} entries ({adapter.share:.2%}) "
        f"of {len(adapter.edits)} weights",
        "numbers": size(adapter.bytes),
        "base": f"{adapter.base.source or 'not named'}, {adapter.base.dtype}, sha256 {adapter.base.digest[:16]}",
        "sha256": adapter.digest,
        "invisible": _invisible(adapter, whole, model),
    }
    if len(set((ranks := _ranks(adapter)).values())) > 1:
        shown["ranks"] = _said_ranks(ranks)
    if adapter.inserts:
        kinds = ", ".join(dict.fromkeys(one.inserted.what for many in adapter.inserts.values() for one in many))
        shown["inserts"] = (
            f"{kinds} {where(adapter.inserts)}, {adapter.multiplications:,} multiplications for every token"
        )
    if whole.touched == 0 and adapter.inserts:
        del shown["changes"], shown["invisible"]
    shown |= {f"made of {name}": _short(adapter.about["merged"][name]) for name in adapter.made_of}
    shown |= {str(k): _short(v) for k, v in adapter.about.items() if k != "merged"}
    shown |= {str(k): _short(v) for k, v in adapter.note.items()}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in shown.items():
        table.add_row(key, escape(value))
    out.print(f"[bold cyan]{escape(adapter.name)}[/]")
    out.print(table)


def _ranks(adapter: Adapter) -> dict[str, int]:
    """The rank of each weight's change, where that is a product of two thin factors."""
    return {
        weight: edit.tensors()["A"].shape[0] for weight, edit in adapter.outlines.items() if edit.kind == "low_rank"
    }


def _said_ranks(ranks: dict[str, int]) -> str:
    most = sorted(ranks, key=lambda weight: -ranks[weight])[:3]
    return (
        f"{min(ranks.values())} to {max(ranks.values())} a weight, {sum(ranks.values()):,} in all, most in "
        + ", ".join(weight.removesuffix(".weight") for weight in most)
    )


def _invisible(adapter: Adapter, whole: Group, model: str | None) -> str:
    if whole.invisible_share is None or whole.rounding_error is None:
        return f"needs the base's weights: --model {adapter.base.source or 'MODEL'}"
    return (
        f"{whole.invisible_share:.1%} of the changed entries vanish when set into the {adapter.base.dtype} base; "
        f"rounding is off by {whole.rounding_error:.1%} of the change"
    )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + " ".join(f"{k}={_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return ", ".join(map(_short, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else f"{value}"


def _print_modules(out: Console, groups: Sequence[Group], based: bool) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("module", no_wrap=True, style="cyan")
    for column in ("weights", "shape", "entries", "share", "norm of change"):
        table.add_column(column, justify="right")
    for column in ("of the weight", "invisible") if based else ():
        table.add_column(column, justify="right")
    table.add_column("edit")
    for g in groups:
        shapes = " or ".join(f"{rows} x {columns}" for rows, columns in g.shapes[:2])
        row = [g.name, str(g.weights), shapes + (" ..." if len(g.shapes) > 2 else ""), f"{g.touched:,}"]
        row += [f"{g.touched / max(g.size, 1):.2%}", _unknown(g) if g.norm is None else f"{g.norm:.4g}"]
        row += [_percent(g.relative), _percent(g.invisible_share)] if based else []
        table.add_row(*row, ", ".join(g.edits))
    out.print(table)


def _unknown(group: Group) -> str:
    if group.touched or not group.multiplications:
        return "needs --model"
    return "before the tokens" if group.positions else "beside the layer"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _print_layers(out: Console, layers: Sequence[Group]) -> None:
    layers = sorted(layers, key=lambda g: int(g.name))
    norms = [g.norm or 0.0 for g in layers]
    top = max(norms) or 1.0
    bars = "".join(BARS[round((len(BARS) - 1) * norm / top)] for norm in norms)
    least, most = (pick(layers, key=lambda g: g.norm or 0.0) for pick in (min, max))
    ends = " and ".join(f"{g.norm:.4g} in layer {g.name}" for g in (least, most))
    out.print(f"\n[bold]layers {layers[0].name} to {layers[-1].name}[/]  {bars}  norm of the change between {ends}")


def _print_spectra(out: Console, spectra: Sequence[Spectrum]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("the most changed weights", no_wrap=True, style="cyan")
    for column in ("rank", "effective rank", "stable rank", "largest singular values hold"):
        table.add_column(column, justify="right")
    for one in spectra:
        shares = ", ".join(f"{k}: {share:.0%}" for k, share in one.top_shares.items())
        table.add_row(
            one.name.removesuffix(".weight"),
            f"{one.numerical_rank} of {len(one.values)}",
            f"{one.effective_rank:.1f}",
            f"{one.stable_rank:.1f}",
            shares,
        )
    out.print(table)
