"""Sizes and held-out losses of compressed adapters: ComPEFT, STC, pruning and values in few bits, on trained ones.

    python bench/compress.py ADAPTER... --data ROWS [--json bench/results/compress.json] [--page docs/compress.md]

ComPEFT's alpha is chosen on the first quarter of the rows, for each density on the authors' grid: from 1 up while the loss falls, and 0.5 where 2 is
worse than 1. Every loss that is shown is of the second half. A LoRA is measured as it is and with balanced factors (``compress.balanced``). Sizes are those of
the folders on the disk, beside those of the same adapter with float32 and with bfloat16 values. Rows of a file that is there already are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intarsia import compress, pretrained, store
from intarsia.bench.machine import machine, write_json
from intarsia.deck import Deck
from intarsia.edits import LowRank
from intarsia.evaluate import held_out_loss
from intarsia.train.data import load_examples

DENSITIES = (0.05, 0.2, 0.5)
BEGIN, END = "<!-- table: made by bench/compress.py -->", "<!-- table end -->"


class Bench:
    """A model, the rows to choose on, and those to judge on."""

    def __init__(self, base: store.Base, data: Path, rows: int):
        loaded = pretrained.load(base.source, dtype=base.dtype)
        self.deck, self.tokenizer = Deck(loaded.model), loaded.tokenizer
        examples, _ = load_examples(data, loaded.tokenizer)
        self.choosing, self.judging = examples[: rows // 4], examples[rows // 2 : rows]

    def loss(self, adapter: store.Adapter | None, choosing: bool = False) -> float:
        if adapter is None:
            return held_out_loss(self.deck.model, self.tokenizer, self.judging)
        self.deck.add(measured=adapter)
        try:
            self.deck.use("measured")
            return held_out_loss(self.deck.model, self.tokenizer, self.choosing if choosing else self.judging)
        finally:
            self.deck.off()
            self.deck.remove("measured")


def chosen(bench: Bench, adapter: store.Adapter, density: float) -> store.Adapter:
    """ComPEFT at this density, with the best alpha of the grid on the rows to choose on."""

    def at(alpha: float) -> tuple[float, store.Adapter]:
        made = compress.ternary(adapter, density, alpha)
        return bench.loss(made, choosing=True), made

    upwards = iter(alpha for alpha in compress.ALPHAS if alpha >= 1)
    best = at(next(upwards))
    start = best
    for alpha in upwards:
        if (found := at(alpha))[0] >= best[0]:
            break
        best = found
    return (min(best, at(0.5), key=lambda one: one[0]) if best is start else best)[1]


def measure(bench: Bench, adapter: store.Adapter, base_loss: float) -> list[dict[str, Any]]:
    wide, narrow = compress.folder_bytes(adapter), compress.folder_bytes(adapter.rounded("bfloat16"))
    found: list[dict[str, Any]] = []

    def add(rule: str, made: store.Adapter, **facts: Any) -> None:
        size, start = compress.folder_bytes(made), time.perf_counter()
        row = {"adapter": adapter.name, "rule": rule, **facts, "bytes": size, "bytes_32": wide, "bytes_16": narrow}
        row |= {"ratio_32": wide / size, "ratio_16": narrow / size, "error": compress.change_error(adapter, made)}
        row |= {"loss": bench.loss(made), "loss_base": base_loss, "loss_before": found[0]["loss"] if found else None}
        found.append(row)
        print(
            f"{adapter.name} {rule} {facts}: {size:,} B, 1/{row['ratio_16']:.1f} of 16 bits, loss {row['loss']:.4f} ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )

    add("none", adapter)
    forms: dict[str, store.Adapter] = {"": adapter}
    if any(isinstance(edit, LowRank) for edit in adapter.edits.values()):
        forms[", balanced"] = compress.balanced(adapter)
    rules: dict[str, Callable[[store.Adapter, float], store.Adapter]] = {
        "ComPEFT": lambda form, density: chosen(bench, form, density), "STC": compress.stc, "prune": compress.prune,
    }  # fmt: skip
    for more, form in forms.items():
        for density in DENSITIES:
            for rule, make in rules.items():
                made = make(form, density)
                step = made.about["compressed"][-1]
                add(rule + more, made, density=density, **({"alpha": step["alpha"]} if "alpha" in step else {}))
        for bits in (4, 2, 1):
            add("bits" + more, compress.in_bits(form, bits), bits=bits)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for docs/compress.md."""
    lines = ["| adapter | rule | kB | of 32 bits | of 16 bits | loss | kept |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        setting = f" {row['density']:.0%}" if "density" in row else f" {row['bits']}" if "bits" in row else ""
        setting += f", alpha {row['alpha']:g}" if "alpha" in row else ""
        rule, _, balanced = row["rule"].partition(", ")
        before = row["loss_before"] if row["loss_before"] is not None else row["loss"]
        kept = (row["loss_base"] - row["loss"]) / (row["loss_base"] - before)
        lines.append(
            f"| {row['adapter']}{f', {balanced}' if balanced else ''} | {'as it is' if rule == 'none' else rule}{setting} | {row['bytes'] / 1000:.0f} "
            f"| 1/{row['ratio_32']:.1f} | 1/{row['ratio_16']:.1f} | {row['loss']:.3f} | {kept:.0%} |"
        )
    return "\n".join(lines)


def write_table(page: Path, rows: list[dict[str, Any]]) -> None:
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("adapters", type=Path, nargs="*", metavar="ADAPTER", help="none: the table of what is there")
    arguments.add_argument("--data", type=Path, help="rows of prompt and completion")
    arguments.add_argument("--rows", type=int, default=96)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--page", type=Path, help="docs/compress.md, to write its table into")
    given = arguments.parse_args()
    rows = json.loads(given.json.read_text())["rows"] if given.json and given.json.exists() else []
    read = {folder: store.read(folder) for folder in given.adapters}
    bench = Bench(next(iter(read.values())).base, given.data, given.rows) if read else None
    base_loss = bench.loss(None) if bench else 0.0
    for adapter in read.values() if bench else ():
        rows = [row for row in rows if row["adapter"] != adapter.name] + measure(bench, adapter, base_loss)
        if given.json:
            write_json(
                given.json,
                {**machine(), "data": given.data.name, "rows_judged": len(bench.judging), "rows": rows},
            )
    if given.page:
        write_table(given.page, rows)


if __name__ == "__main__":
    main()
