"""What a training step costs, as measured: rows, ratios, the table and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from intarsia.train.progress import size

MEASURES = {
    "forward_backward": "forward and backward",
    "step": "with the optimizer's step",
    "kept": "kept for backward",
    "peak": "peak memory",
    "attach": "attaching",
}


@dataclass
class Cost:
    """What one contender costs in one dtype."""

    subject: str
    title: str
    dtype: str
    trained: int
    density: float  # trained numbers over those of the adapted weights
    setting: Mapping[str, Any]
    attach_s: list[float] = field(default_factory=list)
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    optimizer_bytes: int | None = None
    longest: int | None = None  # tokens
    times: dict[int, tuple[float, float]] = field(default_factory=dict)  # round -> forward and backward, optimizer

    @property
    def stem(self) -> str:
        return self.subject.partition("@")[0]

    def seconds(self, what: Callable[[tuple[float, float]], float]) -> float | None:
        """The median over the rounds."""
        return statistics.median(map(what, self.times.values())) if self.times else None

    @property
    def forward_backward_s(self) -> float | None:
        return self.seconds(lambda t: t[0])

    @property
    def optimizer_s(self) -> float | None:
        return self.seconds(lambda t: t[1])

    @property
    def step_s(self) -> float | None:
        return self.seconds(sum)

    @property
    def spread(self) -> float | None:
        """Half the distance of the quartiles of whole steps, as a share of the median."""
        if len(self.times) < 2 or not self.step_s:
            return None
        low, _, high = statistics.quantiles(map(sum, self.times.values()), n=4, method="inclusive")
        return (high - low) / 2 / self.step_s

    def ratio(self, other: Cost, measure: str) -> float | None:
        """This one over the other, one of :data:`MEASURES`. Times: the median of the ratios within rounds."""
        if measure in ("forward_backward", "step"):
            what: Callable[[tuple[float, float]], float] = sum if measure == "step" else (lambda t: t[0])
            shared = self.times.keys() & other.times.keys()
            found = [what(self.times[n]) / what(other.times[n]) for n in sorted(shared)]
            return statistics.median(found) if found else None
        if measure == "attach":
            mine, theirs = (statistics.median(c.attach_s) if c.attach_s else None for c in (self, other))
        else:
            mine, theirs = (getattr(c, f"{measure}_bytes") for c in (self, other))
        return mine / theirs if mine is not None and theirs else None


@dataclass
class Costs:
    """All that a run measured. ``interrupted``: Ctrl-C ended it, and this is what there is."""

    about: Mapping[str, Any]
    rows: list[Cost]
    skipped: list[dict[str, str]]
    against: Sequence[str]  # stems of those that everybody is compared with
    interrupted: bool = False

    def of(self, dtype: str) -> list[Cost]:
        return [row for row in self.rows if row.dtype == dtype]

    def dtypes(self) -> list[str]:
        return list(dict.fromkeys(row.dtype for row in self.rows))

    def find(self, stem: str, dtype: str) -> Cost | None:
        """The first contender of that stem."""
        return next((row for row in self.of(dtype) if row.stem == stem), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: machine, versions, settings, a row for each contender and dtype."""
        return {
            **self.about,
            "rows": [self._plain(row) for row in self.rows],
            "skipped": self.skipped,
            "interrupted": self.interrupted,
        }

    def _plain(self, row: Cost) -> dict[str, Any]:
        others = [o for o in self.of(row.dtype) if o.stem in self.against or o.stem == "peft-shira"]
        first = next((o for stem in ("peft-lora", *self.against) for o in others if o.stem == stem), None)
        ratios = {o.subject: {m: r for m in MEASURES if (r := row.ratio(o, m)) is not None} for o in others}
        return {
            "subject": row.subject,
            "title": row.title,
            "against": first.subject if first else None,
            "dtype": row.dtype,
            "model": self.about["settings"]["model"],
            "trained": row.trained,
            "density": row.density,
            "setting": dict(row.setting),
            "median_s": row.step_s,
            "ratio": row.ratio(first, "step") if first else None,
            "forward_backward_s": row.forward_backward_s,
            "optimizer_s": row.optimizer_s,
            "spread": row.spread,
            "rounds": len(row.times),
            "bytes": row.kept_bytes,
            "peak_bytes": row.peak_bytes,
            "optimizer_bytes": row.optimizer_bytes,
            "attach_s": statistics.median(row.attach_s) if row.attach_s else None,
            "longest": row.longest,
            "ratios": ratios,
        }

    # ------------------------------------------------------------------ for people
    def tables(self, dtype: str, width: int = 160) -> list[Table]:
        """One dtype: times, ratios of whole steps, memory. On a narrow terminal time and memory are two tables."""
        rows, against = self.of(dtype), [found for stem in self.against if (found := self.find(stem, dtype))]
        lora = self.find("peft-lora", dtype)
        trained: dict[str, Callable[[Cost], str]] = {"trained": lambda row: f"{row.trained:,}" if row.trained else "-"}
        time: dict[str, Callable[[Cost], str]] = {"step": lambda row: _ms(row.step_s)}
        spread: dict[str, Callable[[Cost], str]] = {
            "±": lambda row: f"{row.spread:.0%}" if row.spread is not None else "",
            "optimizer": lambda row: _ms(row.optimizer_s) if row.trained else "-",
        }
        ratios = {f"/ {o.stem}": lambda row, o=o: _times(row.ratio(o, "step")) for o in against}
        memory: dict[str, Callable[[Cost], str]] = {"kept": lambda row: _size(row.kept_bytes)}
        if lora:
            memory["of peft-lora"] = lambda row: _times(row.ratio(lora, "kept"))
        memory |= {
            "peak": lambda row: _size(row.peak_bytes),
            "optim.": lambda row: _size(row.optimizer_bytes) if row.trained else "-",
            "attach": lambda row: _ms(statistics.median(row.attach_s)) if row.attach_s else "-",
        }
        if any(row.longest is not None for row in rows):
            memory["longest"] = lambda row: f"{row.longest:,}" if row.longest is not None else "-"
        title = f"{dtype}, {self.about['settings']['model']}"
        if width >= WIDE:
            return [_table(title, rows, trained | time | spread | ratios | memory)]
        return [_table(f"{title}: time", rows, trained | time | ratios), _table(f"{title}: memory", rows, memory)]

    def picture(self, path: Path) -> Path:
        """Bars as a PNG: the time of a step and what it keeps for backward, a row of two charts for each dtype."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        dtypes = self.dtypes()
        most = max((len(self.of(dtype)) for dtype in dtypes), default=1)
        figure = Figure(figsize=(11, len(dtypes) * (0.9 + 0.28 * most)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        for number, dtype in enumerate(dtypes):
            left, right = (figure.add_subplot(max(1, len(dtypes)), 2, 2 * number + side) for side in (1, 2))
            rows = sorted(self.of(dtype), key=lambda row: row.step_s or 0, reverse=True)
            names = [row.subject for row in rows]
            colours = [_colour(row.stem) for row in rows]
            first = [1e3 * (row.forward_backward_s or 0) for row in rows]
            left.barh(names, first, color=colours)
            left.barh(names, [1e3 * (row.optimizer_s or 0) for row in rows], left=first, color=colours, alpha=0.45)
            left.set_title(f"{dtype}: milliseconds a step (paler: the optimizer's part)", loc="left", fontsize=10)
            right.barh(names, [(row.kept_bytes or 0) / 2**20 for row in rows], color=colours)
            right.set_title(f"{dtype}: MiB kept for backward", loc="left", fontsize=10)
            for axes, values in ((left, first), (right, [(row.kept_bytes or 0) / 2**20 for row in rows])):
                axes.spines[["top", "right"]].set_visible(False)
                axes.tick_params(labelsize=8)
                floor = next((v for row, v in zip(rows, values, strict=True) if row.stem == "floor"), None)
                if floor:
                    axes.axvline(floor, color="#666666", linewidth=0.8, linestyle=(0, (4, 4)))
            right.set_yticks([])
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.stem}.part.png")
        figure.savefig(aside, metadata={"Software": None})
        aside.replace(path)
        return path


def _table(title: str, rows: Sequence[Cost], columns: Mapping[str, Callable[[Cost], str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("contender", no_wrap=True)
    for head in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.subject, *(cell(row) for cell in columns.values()))
    return table


WIDE = 150  # columns of a terminal below which one table would be folded
TEAL, GREY, RUST = "#0a6c74", "#8a8a8a", "#b5532a"


def _colour(stem: str) -> str:
    return RUST if stem.startswith("peft-") else GREY if stem in ("floor", "full") else TEAL


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _size(count: int | None) -> str:
    return "not measured" if count is None else size(count)
