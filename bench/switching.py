"""What a switch should cost, and what it costs: the tables of docs/deck.md, from a run of `intarsia bench switch`.

    intarsia bench switch --json bench/results/switch.json --plot docs/images/switching.png
    python bench/switching.py [--json bench/results/switch.json] [--page docs/deck.md]
    intarsia bench switch --warm --model none --json bench/results/switch-warm.json
    python bench/switching.py --json bench/results/switch-warm.json --page docs/deck.md --part warm

Prints them; with --page, writes them between the page's marks. A goal that is missed says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- made by bench/switching.py -->", "<!-- end -->"
DTYPES = ("float32", "bfloat16")
# (place, way, against, at least or at most, in float32, in bfloat16)
GOALS = [
    ("one weight", "elements", "lora-fuse", "at least", 12.0, 6.0),
    ("one weight", "lines", "lora-fuse", "at least", 60.0, 50.0),
    ("one weight", "lines", "limit", "at most", 1.5, 1.5),
    ("whole model", "lines", "peft", "at least", 50.0, 50.0),
    ("whole model", "elements", "peft", "at least", 12.0, 12.0),
]


def tables(result: dict[str, Any]) -> str:
    """Markdown: the goals, then the times of every way."""
    rows = result["rows"]
    found = {(r["place"], r["subject"], r["against"], r["dtype"]): r for r in rows}
    lines = ["| | against | float32 | bfloat16 |", "|---|---|---|---|"]
    for place, way, against, sense, *wanted in GOALS:
        of = [found.get((place, way, against, dtype)) for dtype in DTYPES]
        if not any(of):
            continue
        cells = [_goal(row, sense, goal) for row, goal in zip(of, wanted, strict=True)]
        lines.append(f"| {place}: {way} | {against} | {' | '.join(cells)} |")
    lines += [
        "",
        "| milliseconds | " + " | ".join(f"{_short(place)}, {dtype}" for place, dtype in _places(rows)) + " |",
    ]
    lines.append("|---" * (1 + len(_places(rows))) + "|")
    times = {(r["place"], r["subject"], r["dtype"]): 1e3 * r["median_s"] for r in rows}
    for way in dict.fromkeys(r["subject"] for r in rows if r["place"] != COLD):
        cells = [f"{times[p, way, d]:,.2f}" if (p, way, d) in times else "" for p, d in _places(rows)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    cold = [r for r in rows if r["place"] == COLD]
    if cold:
        steps = list(cold[0]["parts"])
        lines += ["", f"| cold file to first token | in all | {' | '.join(steps)} |", "|---" * (2 + len(steps)) + "|"]
        for r in cold:
            shares = [f"{1e3 * r['parts'][s]:.1f} ms" for s in steps]
            lines.append(
                f"| {r['subject']}, {r['dtype']}, {r['bytes'] / 1e6:.1f} MB | {1e3 * r['median_s']:.0f} ms | {' | '.join(shares)} |"
            )
    m, versions = result["machine"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines += ["", f"{m['processor']}, {m['threads']} threads; {result['settings']['rounds']} rounds; {versions}."]
    return "\n".join(lines)


COLD = "cold file to first token"


def _places(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["place"], r["dtype"]) for r in rows if r["place"] != COLD))


def _short(place: str) -> str:
    return {"one weight": "4096 x 4096, set in", "whole model": "SmolLM2-135M, A to B"}[place]


def _goal(row: dict[str, Any] | None, sense: str, goal: float) -> str:
    if row is None:
        return "not measured"
    ratio = row["ratio"] if sense == "at least" else 1 / row["ratio"]
    met = ratio >= goal if sense == "at least" else ratio <= goal
    figure = f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"
    what = "quicker" if sense == "at least" else "its time"
    return f"{figure} {what} ({sense} {goal:g})" if met else f"**{figure}** {what} (missed: {sense} {goal:g})"


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "switch.json")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--part", help="a second pair of marks on the page: <!-- PART: made by ... -->")
    given = parser.parse_args()
    text = tables(json.loads(given.json.read_text(encoding="utf-8")))
    if given.page is None:
        print(text)
        return
    page = given.page.read_text(encoding="utf-8")
    begin = BEGIN if given.part is None else BEGIN.replace("made", f"{given.part}: made")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    given.page.write_text(f"{before}{begin}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
