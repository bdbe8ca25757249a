"""Held-out loss over the learning rate, sparse and low rank at equal count: where the defaults come from.

    python bench/learning_rate.py                    the grid: SHiRA, PaCA and LoRA x learning rates x seeds
    python bench/learning_rate.py --plot docs/images/learning-rate.png      draw what has been measured so far

Results go row by row to bench/results/learning_rate.jsonl; a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from runs import encode, fill, machine, run_once

from intarsia import pretrained
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
    given = arguments.parse_args()
    if given.plot:
        plot(given.table, given.plot)
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


def plot(table: Path, picture: Path) -> None:
    """Mean and range over the seeds, one curve a method, named at its end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in table.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4.6))
    shown = {
        json.dumps(SHIRA): ("SHiRA, scale auto", "#0a6c74", "-"),
        json.dumps(LORA): ("LoRA r=3", "#b5532a", "-"),
        json.dumps(PACA): ("PaCA r=5, scale auto", "#6a8f2f", "-"),
        json.dumps(SHIRA | {"density": 0.003}): ("SHiRA 0.3 %", "#0a6c74", ":"),
        json.dumps(SHIRA | {"density": 0.03}): ("SHiRA 3 %", "#0a6c74", "--"),
        json.dumps(PAPER): ("SHiRA, scale 1 (paper)", "#888888", "-"),
    }
    for method, (label, color, style) in shown.items():
        by_rate: dict[float, list[float]] = {}
        for row in rows:
            if row["method"] == method:
                by_rate.setdefault(row["lr"], []).append(row["held_out_loss"])
        if not by_rate:
            continue
        rates = sorted(by_rate)
        means = [statistics.mean(by_rate[r]) for r in rates]
        axes.plot(rates, means, style, color=color, marker="o", markersize=4, label=label)
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
