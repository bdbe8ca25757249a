"""One picture of an adapter: where it changes the base, and the spectra of some changes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from intarsia.analyze.change import Spectrum, WeightChange
from intarsia.errors import IntarsiaError


def picture(changes: Sequence[WeightChange], spectra: Sequence[Spectrum], path: str | Path, title: str = "") -> Path:
    """Draw a heat map, layer by module, of the norm of the change, and the singular values of ``spectra``. -> the file.

    Where the base's weights were known, the norm is that of the change relative to the weight.

    Raises:
        IntarsiaError: when no norm is known, the ending is not one of a picture, or the file cannot be written.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_picture(path)
    relative = all(change.relative is not None for change in changes)
    cells = [(c, c.relative if relative else c.norm) for c in changes]
    if not changes or any(value is None for _, value in cells):
        raise IntarsiaError(
            "the size of a rescaled change depends on the base's weights, so there is nothing to draw without them; "
            "name the base: --model"
        )
    modules = list(dict.fromkeys(c.module for c in changes))
    layers = sorted({-1 if c.layer is None else c.layer for c in changes})
    grid = np.full((len(layers), len(modules)), np.nan)
    for change, value in cells:
        grid[layers.index(-1 if change.layer is None else change.layer), modules.index(change.module)] = value

    figure = Figure(figsize=(11, max(4.0, 1.6 + 0.16 * len(layers))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    image = left.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", origin="lower", vmin=0)
    left.set_xticks(range(len(modules)), modules, rotation=40, ha="right")
    left.set_yticks(range(len(layers)), ["-" if layer < 0 else str(layer) for layer in layers])
    if len(layers) > 12:
        left.set_yticks(range(0, len(layers), 4), [str(layers[i]) for i in range(0, len(layers), 4)])
    left.set_ylabel("layer")
    left.set_title("norm of the change" + (" / norm of the weight" if relative else ""), fontsize=10)
    figure.colorbar(image, ax=left, shrink=0.9)
    for one in spectra:
        values = [v for v in one.values if v > one.values[0] * 1e-6] if one.values else []
        name = one.name.removesuffix(".weight").removeprefix("model.")
        label = f"{name}: effective rank {one.effective_rank:.0f} of {len(one.values)}"
        right.plot(range(1, len(values) + 1), values, linewidth=1.4, label=label)
    right.set_title("singular values of the change", fontsize=10)
    right.set_xlabel("i")
    right.set_yscale("log")
    if any(one.values and one.values[0] > 0 for one in spectra):
        right.legend(fontsize=8, frameon=False, loc="lower left")
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=12)
    write_picture(figure, path)
    return path


def check_picture(path: Path) -> None:
    """Raise IntarsiaError for a file name that does not end as a picture's, before any work is done."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if path.suffix.lower().lstrip(".") not in FigureCanvasAgg.get_supported_filetypes():
        raise IntarsiaError(f"--plot {path}: the file name should end in .png, .svg or .pdf")


def write_picture(figure: object, path: Path) -> None:
    """Aside first, so that a failure leaves no half a picture."""
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(aside, dpi=130)  # type: ignore[attr-defined]
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise IntarsiaError(f"could not write the picture {path}: {error.strerror or error}") from error
