"""How good each method gets, as measured: the runs, each method at its best rate, the tables and the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from intarsia.bench.grid import Entry


@dataclass(frozen=True)
class Point:
    """One method at one learning rate, over its seeds."""

    lr: float
    runs: Sequence[Mapping[str, Any]]

    def values(self, what: str) -> list[float]:
        """One number a run; a run that diverged has an infinite loss and no other number."""
        if what == "held_out_loss":
            return [math.inf if run["diverged"] else run[what] for run in self.runs]
        return [run[what] for run in self.runs if run.get(what) is not None]

    def mean(self, what: str = "held_out_loss") -> float | None:
        values = self.values(what)
        return statistics.mean(values) if values else None

    @property
    def loss(self) -> float:
        """Mean held-out loss."""
        return statistics.mean(self.values("held_out_loss"))


@dataclass(frozen=True)
class Quality:
    """All that a grid measured. ``interrupted``: Ctrl-C ended it, and this is what there is."""

    about: Mapping[str, Any]
    entries: Sequence[Entry]
    base: Mapping[str, Any]  # what the base measures
    runs: Sequence[Mapping[str, Any]]
    wanted: int  # runs of the whole grid
    measure: tuple[str, bool]  # the task's own: its name, whether higher is better
    interrupted: bool = False

    def points(self, entry: Entry) -> list[Point]:
        """One method over the learning rates that have runs, lowest first."""
        found: dict[float, list[Mapping[str, Any]]] = {}
        for row in self.runs:
            if row["method"] == dict(entry.config):
                found.setdefault(row["lr"], []).append(row)
        return [Point(lr, runs) for lr, runs in sorted(found.items())]

    def best(self, entry: Entry) -> Point | None:
        """The learning rate of the lowest mean held-out loss."""
        return min(self.points(entry), key=lambda point: point.loss, default=None)

    def at_default(self, entry: Entry) -> float | None:
        """The loss at the method's own learning rate over the best of its grid, minus 1; None where it was not run."""
        point = next((p for p in self.points(entry) if math.isclose(p.lr, entry.default_lr, rel_tol=1e-5)), None)
        best = self.best(entry)
        return point.loss / best.loss - 1 if point and best and math.isfinite(best.loss) else None

    def forgotten(self, point: Point) -> float | None:
        """How much the loss on other text rose over the base's, mean over the seeds."""
        after, before = point.mean("other_loss"), self.base.get("other_loss")
        return after - before if after is not None and before is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: every run as a row, and each method at its best learning rate."""
        base = self.base.get("held_out_loss")
        rows = [
            {"subject": row["label"], "against": "base", **{k: v for k, v in row.items() if k != "label"}}
            | {"ratio": row["held_out_loss"] / base if base and not row["diverged"] else None}
            for row in self.runs
        ]
        return {
            **self.about,
            "base": {k: v for k, v in self.base.items() if k != "base"},
            "rows": rows,
            "best": [self._best(entry) for entry in self.entries if self.best(entry)],
            "runs_wanted": self.wanted,
            "interrupted": self.interrupted,
        }

    def _best(self, entry: Entry) -> dict[str, Any]:
        point = self.best(entry)
        assert point is not None
        finite = [loss for loss in point.values("held_out_loss") if math.isfinite(loss)]
        return {
            "subject": entry.label,
            "method": dict(entry.config),
            "trained": entry.trained,
            "lr": point.lr,
            "held_out_loss": point.loss if math.isfinite(point.loss) else None,
            "range": [min(finite), max(finite)] if finite else None,
            "seeds": len(point.runs),
            "score": point.mean("score"),
            "forgotten": self.forgotten(point),
            "effective_rank": point.mean("effective_rank"),
            "default_lr": entry.default_lr,
            "at_default_lr": self.at_default(entry),
        }

    # ------------------------------------------------------------------ for people
    def rates(self) -> list[float]:
        return sorted({row["lr"] for row in self.runs})

    def grid_table(self) -> Table:
        """Held-out loss over the learning rates: the mean of the seeds, their range where there are several."""
        base = self.base.get("held_out_loss")
        table = _table(f"held-out loss (base {base:.3f})" if base is not None else "held-out loss")
        table.add_column("method", no_wrap=True)
        for rate in self.rates():
            table.add_column(f"{rate:g}", justify="right")
        for entry in self.entries:
            points, best = {p.lr: p for p in self.points(entry)}, self.best(entry)
            cells = [_cell(points.get(rate), best) for rate in self.rates()]
            table.add_row(entry.label, *cells)
        return table

    def best_table(self) -> Table:
        """Each method at its own best learning rate."""
        table = _table("each at its best learning rate, best loss first")
        name, up = self.measure
        scored = any(row.get("score") is not None for row in self.runs)
        other = self.base.get("other_loss") is not None
        ranked = any(row.get("effective_rank") is not None for row in self.runs)
        heads = ["trained", "lr", "loss", "range", "seeds", *([f"{name} {'↑' if up else '↓'}"] if scored else [])]
        heads += [*(["forgotten"] if other else []), *(["eff. rank"] if ranked else []), "at default lr"]
        table.add_column("method", no_wrap=True)
        for head in heads:
            table.add_column(head, justify="right")
        found = [(entry, best) for entry in self.entries if (best := self.best(entry))]
        for entry, point in sorted(found, key=lambda pair: pair[1].loss):
            finite = [loss for loss in point.values("held_out_loss") if math.isfinite(loss)]
            cells = [f"{entry.trained:,}", f"{point.lr:g}", f"{point.loss:.3f}"]
            cells += [f"{min(finite):.3f}-{max(finite):.3f}" if len(finite) > 1 else "", str(len(point.runs))]
            cells += [_number(point.mean("score"), ".3f")] if scored else []
            cells += [_number(self.forgotten(point), "+.3f")] if other else []
            cells += [_number(point.mean("effective_rank"), ".1f")] if ranked else []
            table.add_row(entry.label, *cells, _number(self.at_default(entry), "+.1%"))
        return table

    def picture(self, path: Path) -> Path:
        """Held-out loss over the learning rate, a curve with its range for each method, as a PNG."""
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for number, entry in enumerate(self.entries):
            points = [p for p in self.points(entry) if math.isfinite(p.loss)]
            if not points:
                continue
            colour, rates = colormaps["tab10"](number % 10), [p.lr for p in points]
            style = ("-", "--", ":")[number // 10 % 3]
            axes.plot(rates, [p.loss for p in points], style, color=colour, marker="o", markersize=4, label=entry.label)
            low, high = ([f(p.values("held_out_loss")) for p in points] for f in (min, max))
            axes.fill_between(rates, low, high, color=colour, alpha=0.12)
        if (base := self.base.get("held_out_loss")) is not None:
            axes.set_title(f"base {base:.3f}", loc="right", fontsize=9)
        axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats a token)")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.stem}.part.png")
        figure.savefig(aside, metadata={"Software": None})
        aside.replace(path)
        return path


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")


def _cell(point: Point | None, best: Point | None) -> str:
    if point is None:
        return ""
    values = point.values("held_out_loss")
    text = f"{point.loss:.3f}" if math.isfinite(point.loss) else "diverged"
    if len(values) > 1 and math.isfinite(point.loss):
        text += f" ({min(values):.2f}-{max(values):.2f})"
    return f"[bold green]{text}[/]" if best is not None and point.lr == best.lr and math.isfinite(point.loss) else text


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
