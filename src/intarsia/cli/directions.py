"""What ``intarsia show --intruders`` and ``intarsia repair`` share: the settings, the look, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli import given, terminal

if TYPE_CHECKING:
    from intarsia.analyze import Intruders
    from intarsia.store import Adapter
    from intarsia.train.progress import Progress

MOST = 20  # rows of the table; the rest is counted

Top = Annotated[int, typer.Option("--top", min=1, help="Leading directions of each weight to look at.")]
Epsilon = Annotated[
    float, typer.Option("--epsilon", min=0.0, max=1.0, help="Likeness to the base below which one is an intruder.")
]
Side = Annotated[str, typer.Option("--side", help="Directions of outputs (left), of inputs (right), or both.")]


def base_weights(adapter: Adapter, model: str, progress: Progress, *, named: bool = True) -> dict[str, Any]:
    """The weights of the base, which has to be the adapter's own, as the (O, I) that edits know: a Conv1D stores (I, O)."""
    from intarsia.model import check_fits, digest
    from intarsia.site import matrix_at

    loaded = given.load_model(model, progress, named=named, adapters=[adapter.name], dtype=adapter.base.dtype).model
    check_fits(loaded, adapter, adapter.name, digest(loaded))
    # On the CPU, where an adapter's numbers are.
    return {name: matrix_at(loaded, name).cpu() for name in adapter.edits}


def named(count: int) -> str:
    """``1 intruder dimension``, ``2 intruder dimensions``."""
    return f"{count} intruder dimension{'' if count == 1 else 's'}"


def counts(looked: Sequence[Intruders], top: int, epsilon: float, side: str) -> dict[str, Any]:
    """For machines: settings, counts, and every weight's directions."""
    return {
        "top": top,
        "epsilon": epsilon,
        "side": side,
        "count": sum(len(one.found) for one in looked),
        "weights_with_any": sum(bool(one.found) for one in looked),
        "weights": [one.to_dict() for one in looked],
    }


def print_table(looked: Sequence[Intruders], top: int, epsilon: float, side: str) -> None:
    """What was found, the least like the base first."""
    from rich.table import Table

    out = terminal.output()
    found = sorted(((d, one) for one in looked for d in one.found), key=lambda pair: pair[0].within)
    settings = f"likeness below {epsilon:g} among the {top} leading {side} directions of each weight"
    if not found:
        least = min(((d.within, one.name) for one in looked for d in one.directions), default=(1.0, "none"))
        where = least[1].removesuffix(".weight")
        out.print(
            f"no intruder dimensions ({settings}); the least likeness is {least[0]:.2f}, in {where}", markup=False
        )
        return
    weights = sum(bool(one.found) for one in looked)
    out.print(f"{named(len(found))} in {weights} of {len(looked)} weights ({settings})", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("weight", no_wrap=True, style="cyan")
    for column in ("j", "singular value", "likeness", "share of the weight's energy"):
        table.add_column(column, justify="right")
    for direction, one in found[:MOST]:
        row = [
            one.name.removesuffix(".weight"),
            str(direction.j + 1),
            f"{direction.value:.4g}",
            f"{direction.within:.3f}",
        ]
        table.add_row(*row, f"{one.energy_share:.1%}")
    out.print(table)
    if len(found) > MOST:
        out.print(f"and {len(found) - MOST} more; --json lists them all", markup=False)
