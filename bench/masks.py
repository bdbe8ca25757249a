"""Every SHiRA mask and PaCA on every demo skill: held-out loss before and after a short training.

    python bench/masks.py

Results go row by row to bench/results/masks.jsonl; a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from runs import encode, fill, held_out_loss, run_once

from intarsia import pretrained
from intarsia.bench.machine import machine
from intarsia.demo import skills
from intarsia.train import data as training_data

METHODS = [{"name": "shira", "scorer": scorer} for scorer in ("struct", "random", "magnitude", "gradient", "snip")]
METHODS += [{"name": "paca", "rank": 6}]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--steps", type=int, default=25)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--lr", type=float, default=4e-3)
    arguments.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / "masks.jsonl")
    given = arguments.parse_args()
    loaded = pretrained.load(given.model, dtype=torch.bfloat16)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        examples = {skill.name: encode(skill, tokenizer, Path(folder)) for skill in skills.load()}
    given.table.parent.mkdir(parents=True, exist_ok=True)
    about = machine() | {k: str(v) for k, v in vars(given).items() if k != "table"}
    given.table.with_suffix(".about.json").write_text(json.dumps(about, indent=2) + "\n")
    collate = training_data.collator(tokenizer)
    base = {name: held_out_loss(model, held_out, collate) for name, (_, held_out) in examples.items()}

    def measure(case: dict[str, object]) -> dict[str, object]:
        name = str(case["skill"])
        method = json.loads(str(case["method"]))
        found = run_once(model, tokenizer, examples[name], method, given.lr, 0, given.steps, given.batch)
        return {"base_loss": base[name]} | found

    cases = [{"skill": name, "method": json.dumps(method)} for method in METHODS for name in examples]
    rows = fill(given.table, cases, measure)
    print(f"\n{'':34}" + "".join(f"{name:>22}" for name in examples))
    print(f"{'base':34}" + "".join(f"{base[name]:22.3f}" for name in examples))
    for method in METHODS:
        losses = [
            r["held_out_loss"] for n in examples for r in rows if (r["skill"], r["method"]) == (n, json.dumps(method))
        ]
        print(f"{json.dumps(method):34}" + "".join(f"{loss:22.3f}" for loss in losses))
    worse = [r for r in rows if r["held_out_loss"] >= r["base_loss"]]
    print(f"\n{len(rows) - len(worse)} of {len(rows)} runs lower the held-out loss")


if __name__ == "__main__":
    main()
