"""What a training step should cost, and what it costs: the table of docs/benchmarks.md, from a run of `intarsia bench train`.

    intarsia bench train --json bench/results/train.json --plot docs/images/training-cost.png
    python bench/goals.py [--json bench/results/train.json] [--page docs/benchmarks.md]

Prints the table; with --page, writes it between the page's marks. A goal that is missed says so.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- made by bench/goals.py -->", "<!-- end -->"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Goal:
    """``subject`` costs at most so many times what ``against`` does, in float32 and in bfloat16; None: just to know."""

    subject: str
    what: str
    measure: str
    against: str
    most: tuple[float | None, float | None]


STRUCTURED = ("column@equal", "paca@equal", "s2ft@equal")
GOALS = [
    Goal("floor", "step", "step", "peft-lora@r16", (None, None)),
    *(Goal(s, "step", "step", "floor", (1.03, 1.05)) for s in STRUCTURED),
    *(Goal(s, "step", "step", "peft-lora@r16", (0.90, 0.77)) for s in STRUCTURED),
    *(Goal(s, "kept for backward", "kept", "floor", (1.03, 1.03)) for s in STRUCTURED),
    Goal("tile@1%", "step", "step", "floor", (1.08, 1.10)),
    Goal("line@1%", "step", "step", "floor", (1.20, 1.25)),
    *(Goal(s, "step", "step", "full", (0.88, 0.95)) for s in ("element@1%", "element@equal")),
    *(Goal(s, "step", "step", "peft-shira@r16", (0.90, 0.95)) for s in ("element@1%", "element@equal")),
    *(Goal(s, "kept for backward", "kept", "peft-lora@r16", (1.05, 0.70)) for s in ("element@1%", "line@1%", "tile@1%")),
    Goal("element@equal", "attaching, random", "attach", "peft-shira@r16", (0.20, 0.20)),
]  # fmt: skip


def cell(found: dict[tuple[str, str], Any], goal: Goal, dtype: str, most: float | None) -> str:
    ratios = found.get((goal.subject, dtype), {}).get("ratios", {}).get(goal.against, {})
    ratio = ratios.get(goal.measure)
    if ratio is None:
        return "not measured"
    alone = f", {ratios['forward_backward']:.3f} without the optimizer" if goal.measure == "step" else ""
    if most is None:
        return f"{ratio:.3f}{alone}"
    return (
        f"{ratio:.3f}{alone} (at most {most:.2f})"
        if ratio <= most
        else f"**{ratio:.3f}**{alone} (missed: at most {most:.2f})"
    )


def table(result: dict[str, Any]) -> str:
    found = {(row["subject"], row["dtype"]): row for row in result["rows"]}
    lines = ["| | against | float32 | bfloat16 |", "|---|---|---|---|"]
    for goal in GOALS:
        cells = [cell(found, goal, dtype, most) for dtype, most in zip(DTYPES, goal.most, strict=True)]
        lines.append(f"| {goal.subject}: {goal.what} | {goal.against} | {' | '.join(cells)} |")
    states = [
        row["optimizer_bytes"] / row["trained"]
        for row in result["rows"] if row["trained"] and "peft" not in row["setting"] and row["subject"] != "full"
    ]  # fmt: skip
    if states:
        lines.append(f"| ours: optimizer state | bytes a trained number | {min(states):g} to {max(states):g} | |")
    about = f"{result['machine']['processor']}, {result['machine']['threads']} threads, {result['machine']['device']}; "
    about += ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = result["settings"]
    lines += ["", f"{settings['model']} ({settings['shape']}), {settings['rounds']} rounds. {about}."]
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "train.json")
    arguments.add_argument("--page", type=Path, help="write the table into this page")
    given = arguments.parse_args()
    text = table(json.loads(given.json.read_text(encoding="utf-8")))
    print(text)
    if given.page:
        before, _, rest = given.page.read_text(encoding="utf-8").partition(BEGIN)
        given.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
