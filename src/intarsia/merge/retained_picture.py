"""A picture of what a merge kept: the loss on each skill of the base, the adapter alone and the merged one."""

from __future__ import annotations

from pathlib import Path

from intarsia.analyze import check_picture, write_picture
from intarsia.merge.retained import FUSED, Retained

COLOURS = {"base": "#9db8d2", "alone": "#41719c", FUSED: "#c2410c"}


def retained_picture(found: Retained, path: str | Path, title: str = "") -> Path:
    """Draw three bars a skill, with the share of its gain that is left above them, and the same of other text. -> the file.

    Raises:
        IntarsiaError: when the ending is not one of a picture, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_picture(path)
    groups: list[tuple[str, str | None, str]] = [
        (task, adapter, _said(found.shares[adapter])) for adapter, task in found.skills.items()
    ]
    groups += [(task, None, f"forgotten {found.forgetting[FUSED][task]:+.3f}") for task in found.others]
    figure = Figure(figsize=(max(5.0, 1.8 * len(groups) + 1.5), 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.27
    for place, (task, adapter, text) in enumerate(groups):
        bars = {"base": found.matrix[found.base, task].loss, FUSED: found.matrix[FUSED, task].loss}
        if adapter is not None:
            bars["alone"] = found.matrix[adapter, task].loss
        for number, row in enumerate(name for name in COLOURS if name in bars):
            left = place + (number - (len(bars) - 1) / 2) * width
            axes.bar(left, bars[row], width * 0.92, color=COLOURS[row], label=row if place == 0 else None)
            axes.annotate(
                f"{bars[row]:.2f}",
                (left, bars[row]),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.annotate(
            text, (place, max(bars.values())), xytext=(0, 14), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(range(len(groups)), [task for task, _, _ in groups])
    axes.set_ylabel("loss (nats a token)")
    axes.margins(y=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.1))
    write_picture(figure, path)
    return path


def _said(share: float | None) -> str:
    return "no gain alone" if share is None else f"{round(share, 2) + 0.0:.0%} kept"  # never -0
