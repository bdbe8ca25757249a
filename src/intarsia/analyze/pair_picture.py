"""A picture of the report before a merge: layers by pairs, one map a measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from intarsia.analyze.interference import Interference
from intarsia.analyze.pair import Pair
from intarsia.analyze.picture import check_picture, write_picture
from intarsia.errors import IntarsiaError

Measure = Callable[[Pair], float | None]
Column = tuple[tuple[str, str], Measure, str]  # a pair, what is shown of it, its label


def interference_picture(found: Interference, path: str | Path, title: str = "") -> Path:
    """Draw overlap, cosine and, where products were computed, predicted interference, layer by pair. -> the file.

    Raises:
        IntarsiaError: when no two adapters share a layer with a number, the ending is not one of a picture, or the file
            cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_picture(path)
    rows = [pair for pair in found.layers if pair.weights]
    if not rows:
        raise IntarsiaError("no two of these adapters change a weight of one layer, so there is nothing to draw")
    names = list(dict.fromkeys((pair.first, pair.second) for pair in rows))
    layers = sorted({int(pair.where) for pair in rows})
    by = {(pair.first, pair.second, int(pair.where)): pair for pair in rows}
    one_way: list[Column] = []
    for first, second in names:
        one_way.append(((first, second), lambda pair: pair.interference[0], f"{second} -> {first}"))
        one_way.append(((first, second), lambda pair: pair.interference[1], f"{first} -> {second}"))

    maps: list[tuple[str, dict[str, Any], list[Column]]] = [
        ("overlap of the supports", {"cmap": "viridis", "vmin": 0, "vmax": 1}, _each(names, lambda pair: pair.overlap)),
        ("cosine of the changes", {"cmap": "RdBu_r"}, _each(names, lambda pair: pair.cosine)),
    ]
    if any(pair.products is not None for pair in rows):
        maps.append(("predicted interference, on the right of the arrow", {"cmap": "magma_r", "vmin": 0}, one_way))
    widths = [max(2.6, 0.5 * len(columns) + 1.4) for _, _, columns in maps]
    figure = Figure(figsize=(sum(widths) + 1, max(4.5, 2.6 + 0.17 * len(layers))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(maps), width_ratios=widths, squeeze=False)[0]
    for axis, (label, look, columns) in zip(axes, maps, strict=True):
        grid = [[_value(by.get((*pair, layer)), measure) for pair, measure, _ in columns] for layer in layers]
        if label.startswith("cosine"):
            most = max(abs(v) for row in grid for v in row if v == v) or 1.0
            look |= {"vmin": -most, "vmax": most}
        image = axis.imshow(grid, aspect="auto", interpolation="nearest", origin="lower", **look)
        axis.set_xticks(range(len(columns)), [text for _, _, text in columns], rotation=40, ha="right", fontsize=8)
        step = 1 if len(layers) <= 12 else 4
        axis.set_yticks(range(0, len(layers), step), [str(layers[i]) for i in range(0, len(layers), step)])
        axis.set_title(label, fontsize=10)
        figure.colorbar(image, ax=axis, shrink=0.9)
    axes[0].set_ylabel("layer")
    figure.suptitle(title, fontsize=12)
    write_picture(figure, path)
    return path


def _each(names: Sequence[tuple[str, str]], measure: Measure) -> list[Column]:
    return [(pair, measure, " + ".join(pair)) for pair in names]


def _value(pair: Pair | None, measure: Measure) -> float:
    value = None if pair is None else measure(pair)
    return float("nan") if value is None else value
