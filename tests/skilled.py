"""A tiny base, two adapters trained on two skills for a few steps, and rows of each: what the tests of the search work on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import intarsia as ia
from intarsia import pretrained
from intarsia.train.data import collator, load_examples
from toy import save_toy


@dataclass(frozen=True)
class Skilled:
    """Folders and files; nothing of it is written to by a test."""

    base: Path
    adapters: dict[str, Path]
    rows: dict[str, Path]
    recipe: Callable[..., Path]


def make_skilled(home: Path) -> Skilled:
    """Train them; a second or two."""
    base = save_toy(home / "base")
    loaded = pretrained.load(base)
    adapters, rows = {}, {}
    for seed, (name, letter) in enumerate({"ayes": "a", "bees": "b"}.items()):
        rows[name] = home / f"{name}.jsonl"
        lines = [{"prompt": f"{i} {letter} ->", "completion": f" {letter * (i % 3 + 2)}"} for i in range(16)]
        rows[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
        examples = load_examples(rows[name], loaded.tokenizer)[0]
        batch = collator(loaded.tokenizer)(examples)
        ia.attach(loaded.model, ia.Shira(density=0.2), name=name, seed=seed)
        optimizer = torch.optim.Adam([p for p in loaded.model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(12):
            loss = loaded.model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ia.sync(loaded.model)
        adapters[name] = ia.save(loaded.model, home / name, name)
        ia.detach(loaded.model, name)

    def recipe(folder: Path, method: str = "sum", more: str = "", weights: tuple[float, float] = (0.5, 0.5)) -> Path:
        parts = "".join(
            f"  - {{adapter: {adapters[name]}, parameters: {{weight: {weight}}}}}\n"
            for name, weight in zip(adapters, weights, strict=True)
        )
        file = folder / "merge.yaml"
        file.write_text(f"merge_method: {method}\nadapters:\n{parts}output: {folder / 'both'}\n{more}")
        return file

    return Skilled(base, adapters, rows, recipe)
