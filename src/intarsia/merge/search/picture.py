"""One picture of a search: the Pareto front of every pair of skills, and how the best value grew."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from intarsia.analyze.picture import check_picture, write_picture
from intarsia.merge.search.search import Search

GREY, FRONT, GIVEN, FOUND = "#a8b0b8", "#41719c", "#222222", "#c2410c"
COLUMNS, PAIRS = 3, 15  # panels beside each other where there are many; pairs that are drawn


def picture(search: Search, path: str | Path, title: str = "") -> Path:
    """Draw retained share against retained share for every pair of skills, and the objective over the trials. -> the file.

    Blue: the Pareto front over all skills; the line: the front of that pair alone. With more than six skills the pairs of
    the first six are drawn.

    Raises:
        IntarsiaError: when the ending is not one of a picture, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_picture(path)
    pairs = list(itertools.combinations(search.gains.base, 2))[:PAIRS]
    columns = 2 if len(pairs) < COLUMNS + 1 else COLUMNS
    rows = -(-(len(pairs) + 1) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.9 * rows + 0.3), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(len(pairs) + 1)]
    for panel, pair in zip(panels, pairs, strict=False):
        _pair(panel, search, *pair)
    panels[0].legend(fontsize=8, frameon=False, loc="best")
    _history(panels[-1], search)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    write_picture(figure, path)
    return path


def _pair(panel: Any, search: Search, a: str, b: str) -> None:
    shares = {t.number: search.retained(t) for t in search.trials if t.finite}
    points = {number: (100 * one[a], 100 * one[b]) for number, one in shares.items()}
    front = {trial.number for trial in search.front}
    rest = [point for number, point in points.items() if number not in front]
    panel.plot(*_axes(rest), "o", color=GREY, markersize=4, markeredgewidth=0, label="trial")
    panel.plot(*_axes([points[n] for n in front]), "o", color=FRONT, markersize=5.5, label="Pareto front")
    panel.plot(*_axes(_staircase(list(points.values()))), color=FRONT, linewidth=1, alpha=0.7)
    panel.plot(*points[search.start.number], "s", color=GIVEN, markersize=7, label="as given")
    panel.plot(*points[search.best.number], "*", color=FOUND, markersize=14, label="found")
    panel.set_xlabel(f"{a}: retained, %", fontsize=9)
    panel.set_ylabel(f"{b}: retained, %", fontsize=9)
    _frame(panel, [points[n] for n in {*front, search.start.number}], list(points.values()))


def _frame(panel: Any, wanted: list[tuple[float, float]], points: list[tuple[float, float]]) -> None:
    """Where the front and the start lie; trials far below may lie outside, and are counted."""
    low, high = [], []
    for values in zip(*wanted, strict=True):
        span = max(max(values) - min(values), 5.0)
        low.append(min(values) - 0.4 * span)
        high.append(max(values) + 0.15 * span)
    panel.set_xlim(low[0], high[0])
    panel.set_ylim(low[1], high[1])
    if outside := sum(x < low[0] or y < low[1] for x, y in points):
        panel.set_title(f"{outside} of {len(points)} trials lie outside", fontsize=8, color="#666666", loc="left")


def _staircase(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The front of one pair, as a line with steps: from the right end up to the left one."""
    line: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not line:
            line.append((x, y))
        elif y > line[-1][1]:
            line += [(x, line[-1][1]), (x, y)]
    return line


def _history(panel: Any, search: Search) -> None:
    numbers = [t.number for t in search.trials if t.finite]
    values = [100 * search.value(t) for t in search.trials if t.finite]
    panel.plot(numbers, values, "o", color=GREY, markersize=4, markeredgewidth=0)
    best = [100 * value for value in search.history]
    panel.step(range(len(best)), best, where="post", color=FOUND, linewidth=1.6)
    panel.axhline(100 * search.value(search.start), color=GIVEN, linewidth=0.8, linestyle=(0, (4, 4)))
    panel.set_xlabel("trial", fontsize=9)
    panel.set_ylabel(f"{search.objective.name} retained share, %", fontsize=9)
    low = min(100 * search.value(search.start), sorted(values)[len(values) // 4])
    span = max(max(values) - low, 1.0)
    panel.set_ylim(low - 0.15 * span, max(values) + 0.1 * span)


def _axes(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
