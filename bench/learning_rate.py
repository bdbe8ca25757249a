"""Held-out loss over the learning rate, sparse and low rank at equal count: where the defaults come from.

    python bench/learning_rate.py                    the grid: SHiRA, PaCA and LoRA x learning rates x seeds
    python bench/learning_rate.py --plot docs/images/learning-rate.png --page docs/learning-rate.md
                                                     draw what has been measured so far, and write the page's table

Results go row by row to bench/results/learning_rate.jsonl; a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from runs import encode, fill, run_once

from intarsia import pretrained
from intarsia.bench.machine import machine
from intarsia.demo import skills

LORA = {"name": "lora", "rank": 3}
EQUAL = 0.008626  # the density at which SHiRA trains as many numbers as LoRA of rank 3 in SmolLM2-135M
SHIRA = {"name": "shira", "density": EQUAL}
PAPER = SHIRA | {"scale": 1.0}
PACA = {"name": "paca", "rank": 5}  # as near to equal as whole columns come
RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]


def cases(seeds: int) -> list[dict[str, object]]:
    """Every run, the most telling ones first."""
    grid = [(method, lr, 0) for method in (SHIRA, LORA) for lr in RATES]
    grid += [(method, lr, seed) for seed in range(1, seeds) for method in (SHIRA, LORA) for lr in RATES[1:]]
    grid += [(PAPER, lr, 0) for lr in (5e-4, 4e-3)]
    grid += [(PACA, lr, 0) for lr in RATES[1:5]]
    grid += [(SHIRA | {"density": d}, lr, 0) for d in (0.003, 0.03) for lr in RATES[2:5]]
    return [{"method": json.dumps(method), "lr": lr, "seed": seed} for method, lr, seed in grid]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--skill", default="phonemes")
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / "learning_rate.jsonl")
    arguments.add_argument("--plot", type=Path, help="draw the table to this PNG instead of measuring")
    arguments.add_argument("--page", type=Path, help="with --plot: the page whose table is to be written anew")
    given = arguments.parse_args()
    if given.plot:
        plot(given.table, given.plot)
        if given.page:
            write_page(given.table, given.page)
        return
    loaded = pretrained.load(given.model, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        examples = encode(skills.load([given.skill])[0], loaded.tokenizer, Path(folder))
    given.table.parent.mkdir(parents=True, exist_ok=True)
    about = machine() | {k: str(v) for k, v in vars(given).items() if k in ("model", "skill", "steps", "batch")}
    given.table.with_suffix(".about.json").write_text(json.dumps(about, indent=2) + "\n")

    def measure(case: dict[str, object]) -> dict[str, object]:
        method, lr, seed = json.loads(str(case["method"])), float(str(case["lr"])), int(str(case["seed"]))
        return run_once(loaded.model, loaded.tokenizer, examples, method, lr, seed, given.steps, given.batch)

    fill(given.table, cases(given.seeds), measure)


NAMES = {
    json.dumps(SHIRA): "SHiRA random, 0.86 %",
    json.dumps(LORA): "LoRA r=3, the same count",
    json.dumps(PACA): "PaCA r=5, near the same count",
    json.dumps(SHIRA | {"density": 0.003}): "SHiRA random, 0.3 %",
    json.dumps(SHIRA | {"density": 0.03}): "SHiRA random, 3 %",
    json.dumps(PAPER): "SHiRA random, 0.86 %, scale=1.0 (as published)",
}


def losses(table: Path) -> dict[str, dict[float, list[float]]]:
    """Method -> learning rate -> the held-out losses of its seeds."""
    found: dict[str, dict[float, list[float]]] = {method: {} for method in NAMES}
    for line in table.read_text().splitlines():
        row = json.loads(line)
        found[row["method"]].setdefault(row["lr"], []).append(row["held_out_loss"])
    return {method: dict(sorted(by_rate.items())) for method, by_rate in found.items() if by_rate}


def write_page(table: Path, page: Path) -> None:
    """The table of the page: mean over the seeds, the range behind it where there are several, the best in bold."""
    begin, end = "<!-- made by bench/learning_rate.py -->", "<!-- end -->"
    rows = ["| | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|---" * (len(RATES) + 1) + "|"]
    for method, by_rate in losses(table).items():
        best = min(statistics.mean(v) for v in by_rate.values())
        best = best if len(by_rate) > 1 else float("nan")  # one point is no best
        cells = [_cell(by_rate.get(rate, []), best) for rate in RATES]
        rows.append(f"| {NAMES[method]} | " + " | ".join(cells) + " |")
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n" + "\n".join(rows) + f"\n{end}{rest.partition(end)[2]}")


def _cell(values: list[float], best: float) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    mean = f"**{mean}**" if statistics.mean(values) == best else mean
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f}, n={len(values)})"


def plot(table: Path, picture: Path) -> None:
    """Mean and range over the seeds, one curve a method, named at its end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6))
    teal, rust, green = "#0a6c74", "#b5532a", "#6a8f2f"
    styles = [(teal, "-"), (rust, "-"), (green, "-"), (teal, ":"), (teal, "--"), ("#888888", "-")]
    style_of = dict(zip(NAMES, styles, strict=True))
    for method, by_rate in losses(table).items():
        color, style = style_of[method]
        rates = sorted(by_rate)
        means = [statistics.mean(by_rate[r]) for r in rates]
        axes.plot(rates, means, style, color=color, marker="o", markersize=4, label=NAMES[method])
        axes.fill_between(
            rates, [min(by_rate[r]) for r in rates], [max(by_rate[r]) for r in rates], color=color, alpha=0.15
        )
    axes.set(xscale="log", xlabel="learning rate (Adam)", ylabel="held-out loss")
    axes.set_title("The same learning rates serve sparse and low-rank adapters", loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main()
