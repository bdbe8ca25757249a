"""``intarsia show --sizes``: what an adapter would take in every coding and compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from intarsia.compress import Size


def print_sizes(out: Console, sizes: Sequence[Size]) -> None:
    """The table of ``intarsia show --sizes``."""
    from rich.table import Table

    from intarsia.train.progress import size

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("stored as", no_wrap=True, style="cyan")
    for column in ("folder", "numbers alone", "smaller than 32 bits", "than 16 bits", "of the change lost"):
        table.add_column(column, justify="right")
    for one in sizes:
        if one.refused:
            table.add_row(one.name, "not possible", "", "", "", one.refused)
            continue
        lost = "exact" if one.error == 0 else "needs the base" if one.error is None else f"{one.error:.1%}"
        table.add_row(
            one.name, size(one.bytes), size(one.numbers), f"{1 / one.share_32:.1f}x", f"{1 / one.share_16:.1f}x", lost
        )  # fmt: skip
    out.print(table)
    out.print(
        "[dim]ternary: the largest numbers as +- their mean, no data asked. What is lost of the skill: intarsia compress --data[/]"
    )
