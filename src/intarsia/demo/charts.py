"""Charts as inline SVG, coloured by the page's own CSS variables, so that they follow a light or a dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 320, 210  # of a line chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 36, 10, 12, 30


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y), the CSS class that colours it, and whether its points are marked."""

    points: Sequence[tuple[float, float]]
    style: str
    label: str
    marked: bool = False


def line_chart(lines: Sequence[Line], label: str, x_label: str) -> str:
    """Curves over a common x from 0; y is linear, with round ticks."""
    points = [point for line in lines for point in line.points]
    right = max(x for x, _ in points) or 1
    ticks = round_ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = ticks[0], ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / right,
            TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low),
        )

    parts = []
    for tick in ticks:
        _, y = at(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{tick:g}</text>')
    for tick in round_ticks(0, right, 4):
        if tick <= right:
            parts.append(f'<text class="tick mid" x="{at(tick, low)[0]:.1f}" y="{HEIGHT - 14}">{tick:g}</text>')
    parts.append(f'<text class="tick mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 1}">{escape(x_label)}</text>')
    for line in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        thin = "" if line.marked else " thin"
        parts.append(f'<polyline class="line {line.style}{thin}" points="{path}"/>')
        if line.marked:
            for x, y in line.points:
                px, py = at(x, y)
                title = f"{line.label}, step {x:g}: {y:.3f}"
                parts.append(
                    f'<circle class="dot {line.style}" cx="{px:.1f}" cy="{py:.1f}" r="3.2">'
                    f"<title>{escape(title)}</title></circle>"
                )
    return _svg(WIDTH, HEIGHT, parts, label)


@dataclass(frozen=True)
class Bar:
    """One bar: what it stands for, its length, what is written at its end, and the CSS class that colours it."""

    label: str
    value: float
    text: str
    style: str


def log_bars(bars: Sequence[Bar], label: str, unit: str) -> str:
    """Horizontal bars over a logarithmic axis that begins a decade below the shortest."""
    width, row, label_width, room = 760, 34, 330, 80
    low = 10 ** math.floor(math.log10(min(bar.value for bar in bars)))
    low = low / 10 if min(bar.value for bar in bars) < 1.5 * low else low
    high = max(bar.value for bar in bars)
    span = width - label_width - room

    def at(value: float) -> float:
        return label_width + span * math.log10(value / low) / math.log10(high / low)

    height = row * len(bars) + 30
    parts = []
    decade = low
    while decade <= high:
        x = at(decade)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 26}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{height - 10}">{decade:g} {escape(unit)}</text>')
        decade *= 10
    for number, bar in enumerate(bars):
        y = row * number + 6
        parts.append(f'<text class="name end" x="{label_width - 10}" y="{y + 15}">{escape(bar.label)}</text>')
        length = max(2.0, at(bar.value) - label_width)
        parts.append(
            f'<rect class="bar {bar.style}" x="{label_width}" y="{y}" width="{length:.1f}" height="22" rx="3"/>'
        )
        parts.append(f'<text class="value" x="{label_width + length + 7:.1f}" y="{y + 15}">{escape(bar.text)}</text>')
    return _svg(width, height, parts, label)


def share_bars(groups: Sequence[tuple[str, Sequence[Bar]]], label: str) -> str:
    """Horizontal bars of shares (1 is a full bar), in titled groups; what is below 0 or above 1 ends at the edge."""
    width, row, label_width, room, title = 760, 26, 330, 80, 26
    span = (width - label_width - room) / 1.1
    height = sum(title + row * len(bars) + 6 for _, bars in groups) + 24
    full = label_width + span
    parts = [f'<line class="grid strong" x1="{full:.1f}" x2="{full:.1f}" y1="6" y2="{height - 22}"/>']
    parts.append(f'<text class="tick mid" x="{full:.1f}" y="{height - 8}">100 %: alone</text>')
    y = 0
    for name, bars in groups:
        parts.append(f'<text class="group end" x="{label_width - 10}" y="{y + 19}">{escape(name)}</text>')
        y += title
        for bar in bars:
            length = max(2.0, span * min(1.1, max(0.0, bar.value)))
            parts.append(f'<text class="name end" x="{label_width - 10}" y="{y + 14}">{escape(bar.label)}</text>')
            parts.append(
                f'<rect class="bar {bar.style}" x="{label_width}" y="{y}" width="{length:.1f}" height="19" rx="3"/>'
            )
            parts.append(
                f'<text class="value" x="{label_width + length + 7:.1f}" y="{y + 14}">{escape(bar.text)}</text>'
            )
            y += row
        y += 6
    return _svg(width, height, parts, label)


def round_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About ``wanted`` round numbers a constant step apart that enclose low and high."""
    span = (high - low) or abs(high) or 1.0
    rough = span / wanted
    scale = 10 ** math.floor(math.log10(rough))
    step = next(s for s in (1, 2, 2.5, 5, 10) if s * scale >= rough * 0.999) * scale
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">\n{inside}\n</svg>'
