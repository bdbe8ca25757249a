"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EACH, TRAIN, HELD_OUT, GREY = "#9db8d2", "#41719c", "#c2410c", "#666666"


def smooth(values: list[float], window: int) -> list[float]:
    """The mean of the last ``window`` values at every place."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def loss_curve(events: Iterable[Mapping[str, Any]], path: str | Path, title: str = "") -> Path:
    """Draw the events of a log: the training loss (and its running mean), the held-out loss, the base's as a line.

    Returns the path of the PNG, which is written aside and renamed.
    """
    # Figures made without pyplot leave the user's backend and open figures alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = list(events)
    train = [(e["step"], e["loss"]) for e in events if e["event"] == "step" and e.get("loss") is not None]
    held = [(e["step"], e["eval_loss"]) for e in events if e["event"] == "eval"]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title, loc="left", fontsize=10)
    labels: list[tuple[float, float, str, str]] = []
    if train:
        steps, losses = zip(*train, strict=True)
        window = max(1, len(train) // 20)
        running = smooth(list(losses), window)
        axes.plot(steps, losses, color=EACH, linewidth=0.8)
        axes.plot(steps, running, color=TRAIN, linewidth=1.6)
        labels.append((steps[-1], running[-1], f"train {running[-1]:.3f}", TRAIN))
    if held:
        steps, losses = zip(*held, strict=True)
        axes.plot(steps, losses, color=HELD_OUT, linewidth=1.6, marker="o", markersize=4)
        labels.append((steps[-1], losses[-1], f"held out {losses[-1]:.3f}", HELD_OUT))
        if steps[0] == 0:
            axes.axhline(losses[0], color=GREY, linewidth=0.8, linestyle=(0, (4, 4)))
            labels.append((steps[-1], losses[0], f"base {losses[0]:.3f}", GREY))
    axes.margins(x=0.02)
    low, high = axes.get_ylim()
    placed = low - (high - low)
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        placed = max(y, placed + 0.05 * (high - low))  # labels stand beside their lines, never on each other
        axes.annotate(
            text,
            (x, placed),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )
    path = Path(path)
    aside = path.with_suffix(".part.png")
    figure.savefig(aside, metadata={"Software": None})
    aside.replace(path)
    return path
