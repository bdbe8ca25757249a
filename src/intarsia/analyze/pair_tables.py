"""The report before a merge as tables for the terminal, narrow enough for 80 columns or nearly so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from intarsia.analyze.pair import Pair

if TYPE_CHECKING:
    from intarsia.analyze.interference import Summand


def summands(found: Sequence[Summand]) -> Table:
    """A row an adapter."""
    table = _table(("adapter",), "weights", "entries", "norm", "share of norm")
    for one in found:
        table.add_row(
            escape(one.name), str(one.weights), f"{one.touched:,}", f"{one.norm:.4g}", f"{one.norm_share:.1%}"
        )
    return table


def pairs(found: Sequence[Pair]) -> Table:
    """A row a pair, with everything that was measured."""
    products = any(pair.products is not None for pair in found)
    spectral = any(pair.leading is not None for pair in found)
    columns = ["weights", "overlap", "opposite", "cosine"]
    columns += ["AWOM", "AWOR", "->", "<-"] if products else []
    columns += ["spectral", "aligned"] if spectral else []
    table = _table(("pair",), *columns)
    for pair in found:
        cells = [
            _named(pair),
            str(pair.weights),
            f"{pair.overlap:.1%}",
            f"{pair.conflict_share:.1%}",
            _signed(pair.cosine),
        ]
        if products:
            cells += [_number(pair.awom), _percent(pair.awor), *_ways(pair)]
        if spectral:
            cells += [_number(None if pair.leading is None else pair.leading.awom), _signed(pair.alignment)]
        table.add_row(*cells)
    return table


def weights(found: Sequence[Pair]) -> Table:
    """A row a weight of a pair, with what tells most."""
    products = any(pair.products is not None for pair in found)
    table = _table(("the worst weights", "pair"), "overlap", "cosine", *(("->", "<-") if products else ("opposite",)))
    for pair in found:
        where = pair.where.removesuffix(".weight").removeprefix("model.")
        last = _ways(pair) if products else [f"{pair.conflict_share:.1%}"]
        table.add_row(escape(where), _named(pair), f"{pair.overlap:.1%}", _signed(pair.cosine), *last)
    return table


def legend(products: bool) -> str:
    """What the columns mean."""
    ways = "; ->: predicted interference, what the first does to the second one's outputs / its own effect; <-: the other way"
    return "overlap: of the smaller support; opposite: of the shared entries, with opposite signs" + (
        ways if products else ""
    )


def _table(words: Sequence[str], *numbers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for word in words:
        table.add_column(word, no_wrap=True, style="cyan")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _named(pair: Pair) -> str:
    return escape(f"{pair.first} -> {pair.second}")


def _ways(pair: Pair) -> list[str]:
    """Interference as it is written: of the first on the second, and the other way."""
    on_first, on_second = pair.interference
    return [_percent(on_second), _percent(on_first)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
