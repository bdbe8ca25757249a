"""One short training run on a demo skill, and a table of them that is filled row by row and can be resumed.

Shared by the benchmarks of quality. A plain loop, not the trainer: a run is one minute, and a table has dozens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import get_linear_schedule_with_warmup

import intarsia as ia
from intarsia.demo import skills
from intarsia.train import data as training_data


def encode(skill: skills.Skill, tokenizer: Any, folder: Path) -> tuple[list[Any], list[Any]]:
    """Training and held-out examples of a skill, through the same files and code as ``intarsia train``."""
    train, held_out = skill.write(folder)
    return tuple(training_data.load_examples(path, tokenizer)[0] for path in (train, held_out))  # type: ignore[return-value]


@torch.no_grad()
def held_out_loss(model: Any, examples: list[Any], collate: Any, batch: int = 32) -> float:
    """Mean cross-entropy per trained token."""
    total, count = 0.0, 0
    for start in range(0, len(examples), batch):
        rows = collate(examples[start : start + batch])
        tokens = int((rows["labels"][:, 1:] != -100).sum())
        total += float(model(**rows).loss) * tokens
        count += tokens
    return total / count


def run_once(
    model: Any,
    tokenizer: Any,
    examples: tuple[list[Any], list[Any]],
    method: dict[str, Any],
    lr: float,
    seed: int,
    steps: int,
    batch: int,
    look: Callable[[Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Attach, train ``steps`` x ``batch`` examples, measure the held-out loss, detach. The base is the same before and after.

    ``look`` is given the trained adapter and says what else goes into the row.
    """
    train, held_out = examples
    collate = training_data.collator(tokenizer)
    order = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(train), (steps, batch), generator=order).tolist()
    calibration = [collate([train[i] for i in torch.randperm(len(train), generator=order)[:32].tolist()])]
    start = time.perf_counter()
    ia.attach(model, ia.registry.build(method), data=calibration, seed=seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, round(0.05 * steps)), steps)
    model.train()
    for rows in picks:
        loss = model(**collate([train[i] for i in rows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    result = {
        "held_out_loss": held_out_loss(model, held_out, collate),
        "last_train_loss": loss.item(),
        "trained": sum(p.numel() for p in trained),
        "seconds": time.perf_counter() - start,
    }
    if look:
        result |= look(ia.model.export(model))
    ia.detach(model, "default")
    return result


def fill(
    table: Path, cases: Iterable[dict[str, Any]], measure: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure every case that the table (a JSON lines file) does not have yet, and append it. -> all rows."""
    cases = list(cases)
    done = [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []
    table.parent.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases, 1):
        if any(case.items() <= row.items() for row in done):
            continue
        row = case | measure(case)
        done.append(row)
        with open(table, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"[{number}/{len(cases)}] "
            + "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
            flush=True,
        )
    return done
