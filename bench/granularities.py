"""Elements, lines, tiles and columns at equal count: quality with its spread, and rank of the deltas.

    python bench/granularities.py quality     each granularity on each demo skill, 3 seeds
    python bench/granularities.py page        docs/granularities.md anew from what was measured

Results go row by row to bench/results/granularities-quality.jsonl; a run that was cut off goes on where it stopped. Whether one
learning rate serves them all is measured by bench/rate.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from runs import encode, fill, held_out_loss, run_once

from intarsia import pretrained
from intarsia.bench.machine import machine
from intarsia.demo import skills
from intarsia.train import data as training_data

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "granularities.md"
KINDS = ("element", "line", "tile", "column")
STEPS, BATCH = 25, 8
LINES = ("model.layers.5.mlp.down_proj.weight", "model.layers.20.self_attn.q_proj.weight")  # whose rank is looked at


def method(kind: str, density: float = 0.01) -> dict[str, Any]:
    return {"name": "shira", "density": density, "granularity": kind}


def quality_cases(names: list[str]) -> list[dict[str, object]]:
    return [
        {"skill": name, "method": json.dumps(method(kind)), "lr": 4e-3, "seed": seed}
        for seed in range(3) for name in names for kind in KINDS
    ]  # fmt: skip


def ranks(adapter: Any) -> dict[str, Any]:
    """Rank, and effective rank (exponential of the entropy of the singular values), of two of the deltas."""
    found: dict[str, Any] = {}
    for name in LINES:
        edit = adapter.edits[name]
        values = torch.linalg.svdvals(edit.delta(torch.zeros(edit.shape)))
        share = values / values.sum()
        share = share[share > 0]
        kind = name.split(".")[-2]
        found[f"rank_{kind}"] = int((values > values[0] * 1e-5).sum())
        found[f"effective_rank_{kind}"] = float((-(share * share.log()).sum()).exp())
    return found


def measure() -> None:
    loaded = pretrained.load("smollm2-135m", dtype=torch.bfloat16)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    learnt = skills.load()
    with tempfile.TemporaryDirectory() as folder:
        examples = {skill.name: encode(skill, tokenizer, Path(folder)) for skill in learnt}
    table = RESULTS / "granularities-quality.jsonl"
    about = machine() | {"model": "smollm2-135m", "steps": STEPS, "batch": BATCH}
    collate = training_data.collator(tokenizer)
    about["base_loss"] = {name: held_out_loss(model, held_out, collate) for name, (_, held_out) in examples.items()}
    table.with_suffix(".about.json").write_text(json.dumps(about, indent=2) + "\n")

    def one(case: dict[str, object]) -> dict[str, object]:
        made, lr, seed = json.loads(str(case["method"])), float(str(case["lr"])), int(str(case["seed"]))
        return run_once(model, tokenizer, examples[str(case["skill"])], made, lr, seed, STEPS, BATCH, ranks)

    fill(table, quality_cases(list(examples)), one)


# ------------------------------------------------------------------ the page
def rows() -> list[dict[str, Any]]:
    table = RESULTS / "granularities-quality.jsonl"
    found = [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []
    return [row | {"made": json.loads(row["method"])} for row in found]


def quality_table() -> list[str]:
    every = rows()
    names = list(dict.fromkeys(row["skill"] for row in every))
    base = json.loads((RESULTS / "granularities-quality.about.json").read_text())["base_loss"]
    head = ["granularity", *names, "rank of a delta", "effective rank", "trained"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines.append("| base | " + " | ".join(f"{base[name]:.2f}" for name in names) + " | | | |")
    for kind in KINDS:
        mine = [row for row in every if row["made"]["granularity"] == kind]
        cells = []
        for name in names:
            losses = [row["held_out_loss"] for row in mine if row["skill"] == name]
            cells.append(f"{statistics.mean(losses):.2f} ({min(losses):.2f}-{max(losses):.2f})" if losses else "")
        if mine:
            rank = ", ".join(f"{statistics.mean(r[f'rank_{k}'] for r in mine):.0f}" for k in ("down_proj", "q_proj"))
            effective = ", ".join(
                f"{statistics.mean(r[f'effective_rank_{k}'] for r in mine):.0f}" for k in ("down_proj", "q_proj")
            )
            cells += [rank, effective, f"{mine[0]['trained']:,}"]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def write_page() -> None:
    begin, end = "<!-- quality: made by bench/granularities.py -->", "<!-- end -->"
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(f"{before}{begin}\n" + "\n".join(quality_table()) + f"\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=["quality", "page"])
    given = arguments.parse_args()
    write_page() if given.what == "page" else measure()
