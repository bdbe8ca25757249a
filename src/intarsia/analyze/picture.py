"""Pictures of an adapter: where it changes the base, the spectra of some changes, and its leading directions."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.analyze.change import Spectrum, WeightChange, layer_of, module_of
from intarsia.analyze.intruders import Intruders
from intarsia.errors import IntarsiaError

FOUND, OTHER = "#c2570c", "#9db8d2"


@dataclass(frozen=True)
class Heat:
    """One number for every weight, by layer and module; None where there is no such weight.

    ``layers``: their numbers, ascending, None first for weights outside of layers. ``modules``: the last part of a layer's
    name, and more of it where a layer has several of that name.
    """

    layers: tuple[int | None, ...]
    modules: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]  # layers x modules
    title: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "title": self.title,
            "layers": list(self.layers),
            "modules": list(self.modules),
            "cells": [list(row) for row in self.cells],
        }


def heat(changes: Sequence[WeightChange]) -> Heat:
    """The norm of the change of every weight: relative to the weight's where the base was known. ||D|| / ||W|| or ||D||.

    Raises:
        IntarsiaError: when a norm is not known.
    """
    relative = all(change.relative is not None for change in changes)
    values = [c.relative if relative else c.norm for c in changes]
    if not changes or any(value is None for value in values):
        raise IntarsiaError(
            "the size of a rescaled change depends on the base's weights, so there is nothing to draw without them; "
            "name the base: --model"
        )
    title = "norm of the change" + (" / norm of the weight" if relative else "")
    return _heat({c.name: value or 0.0 for c, value in zip(changes, values, strict=True)}, title)


def intruder_heat(looked: Sequence[Intruders]) -> Heat:
    """How many intruder dimensions every weight has."""
    return _heat({one.name: float(len(one.found)) for one in looked}, "intruder dimensions")


def _heat(values: Mapping[str, float], title: str) -> Heat:
    places = {name: (module_of(name), layer_of(name)) for name in values}
    often = {module for (module, _), count in Counter(places.values()).items() if count > 1}
    cells = {
        (layer, _after_the_layer(name) if module in often else module): values[name]
        for name, (module, layer) in places.items()
    }
    modules = tuple(dict.fromkeys(module for _, module in cells))
    layers = tuple(sorted({layer for layer, _ in cells}, key=lambda layer: -1 if layer is None else layer))
    return Heat(layers, modules, tuple(tuple(cells.get((layer, m)) for m in modules) for layer in layers), title)


def _after_the_layer(name: str) -> str:
    """``attn.c_proj`` of ``h.0.attn.c_proj.weight``."""
    return re.split(r"(?:^|\.)\d+\.", name.removesuffix(".weight"), maxsplit=1)[-1]


def picture(
    changes: Sequence[WeightChange],
    spectra: Sequence[Spectrum],
    path: str | Path,
    title: str = "",
    looked: Sequence[Intruders] = (),
    epsilon: float | None = None,
) -> Path:
    """Draw a heat map, layer by module, of the norm of the change, and the singular values of ``spectra``. -> the file.

    Where the base's weights were known, the norm is that of the change relative to the weight. With ``looked``, the likeness of
    the leading directions to the base's, intruders marked, and the threshold ``epsilon`` as a line.

    Raises:
        IntarsiaError: when no norm is known, the ending is not one of a picture, or the file cannot be written.
    """
    path = Path(path)
    check_picture(path)
    shown = heat(changes)
    figure = _figure(16.5 if looked else 11, max(4.0, 1.6 + 0.16 * len(shown.layers)))
    axes = figure.subplots(1, 3 if looked else 2, width_ratios=[1.1, 1, 1] if looked else [1.1, 1])
    _draw_heat(figure, axes[0], shown)
    _draw_spectra(axes[1], spectra)
    if looked:
        _draw_directions(axes[2], looked, epsilon)
    figure.suptitle(title, fontsize=12)
    write_picture(figure, path)
    return path


def check_picture(path: Path) -> None:
    """Raise IntarsiaError for a file name that does not end as a picture's, before any work is done."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if path.suffix.lower().lstrip(".") not in FigureCanvasAgg.get_supported_filetypes():
        raise IntarsiaError(f"--plot {path}: the file name should end in .png, .svg or .pdf")


def heat_png(shown: Heat) -> bytes:
    """The heat map alone, as a PNG."""
    figure = _figure(6.2, max(3.2, 1.6 + 0.16 * len(shown.layers)))
    _draw_heat(figure, figure.subplots(), shown)
    return _png(figure)


def spectra_png(spectra: Sequence[Spectrum]) -> bytes:
    """The singular values alone, as a PNG."""
    return _one(lambda axes: _draw_spectra(axes, spectra))


def directions_png(looked: Sequence[Intruders], epsilon: float | None = None) -> bytes:
    """The likeness of the leading directions alone, as a PNG."""
    return _one(lambda axes: _draw_directions(axes, looked, epsilon))


def _one(draw: Callable[[Any], None]) -> bytes:
    figure = _figure(6.2, 4.2)
    draw(figure.subplots())
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    # Figures made without pyplot leave the user's backend and open figures alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _draw_heat(figure: Any, axes: Any, shown: Heat) -> None:
    import numpy as np

    grid = np.array([[np.nan if cell is None else cell for cell in row] for row in shown.cells], dtype=float)
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", origin="lower", vmin=0)
    names = ["-" if layer is None else str(layer) for layer in shown.layers]
    axes.set_xticks(range(len(shown.modules)), shown.modules, rotation=40, ha="right")
    step = 4 if len(names) > 12 else 1
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.set_ylabel("layer")
    axes.set_title(shown.title, fontsize=10)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    if all(float(cell).is_integer() for row in shown.cells for cell in row if cell is not None):
        bar.ax.yaxis.get_major_locator().set_params(integer=True)  # of counts


def _draw_spectra(axes: Any, spectra: Sequence[Spectrum]) -> None:
    for one in spectra:
        values = [v for v in one.values if v > one.values[0] * 1e-6] if one.values else []
        name = one.name.removesuffix(".weight").removeprefix("model.")
        label = f"{name}: effective rank {one.effective_rank:.0f} of {len(one.values)}"
        axes.plot(range(1, len(values) + 1), values, linewidth=1.4, label=label)
    axes.set_title("singular values of the change", fontsize=10)
    axes.set_xlabel("i")
    axes.set_yscale("log")
    if any(one.values and one.values[0] > 0 for one in spectra):
        axes.legend(fontsize=8, frameon=False, loc="lower left")
    _bare(axes)


def _draw_directions(axes: Any, looked: Sequence[Intruders], epsilon: float | None) -> None:
    # A little beside each other, so that 200 weights do not hide behind one dot.
    spread = [0.35 * (2 * i / max(1, len(looked) - 1) - 1) for i in range(len(looked))]
    for found, colour, label in ((False, OTHER, "like the base"), (True, FOUND, "intruder")):
        dots = [
            (d.j + 1 + beside, d.within)
            for one, beside in zip(looked, spread, strict=True)
            for d in one.directions
            if d.intruder is found
        ]
        if dots:
            x, y = zip(*dots, strict=True)
            axes.scatter(x, y, s=9, color=colour, linewidths=0, label=f"{label}: {len(dots)}")
    if epsilon is not None:
        axes.axhline(epsilon, color="#666666", linewidth=0.8, linestyle=(0, (4, 4)))
    axes.set_ylim(0, 1.02)
    axes.set_title("likeness of the leading directions to the base's", fontsize=10)
    axes.set_xlabel("j")
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=130, format="png", metadata={"Software": None})
    return stream.getvalue()


def write_picture(figure: Any, path: Path) -> None:
    """Aside first, so that a failure leaves no half a picture."""
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(aside, dpi=130)
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise IntarsiaError(f"could not write the picture {path}: {error.strerror or error}") from error
