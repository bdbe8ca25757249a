"""Sizes of adapter files and the time to load them, beside HF PEFT's SHiRA.

    python bench/files.py [--json bench/results/files.json]

Sizes: 55 weights of 4096 x 4096 at 1 % (9.2 M values), without the model; whole folders, head and card included. PEFT's file is
written for real at a smaller size, and its bytes a value are taken. Times: 8 linears of 2048 x 2048, equal counts of values, medians
of alternating rounds on one model: loading from a warm file until the adapter sits in the model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import intarsia as ia
from intarsia import store
from intarsia.bench.machine import machine, write_json
from intarsia.edits import Edit, Sparse
from intarsia.method import Start
from intarsia.support import Element, Granularity, Line, sample

WEIGHTS, SIDE, SHARE = 55, 4096, 0.01
LAYERS, WIDTH, RANK, ROUNDS = 8, 2048, 10, 9


def adapter(unit: Granularity, seeded: bool) -> store.Adapter:
    """Random values at 1 % of every weight; a support that is not ``seeded`` stands for one that was chosen by a score."""
    shape = (SIDE, SIDE)
    count = round(SHARE * SIDE * SIDE / unit.size(shape))
    edits: dict[str, Edit] = {}
    for number in range(WEIGHTS):
        name = f"layers.{number}.mlp.up_proj"
        index = sample(unit.units(shape), count, Start.at(name, 0 if seeded else 1).key)
        values = torch.randn(unit.values_shape(shape, count), generator=torch.Generator().manual_seed(number)) / 100
        edits[f"{name}.weight"] = Sparse(shape, unit, index, values)
    return store.Adapter("size", edits, store.Base("0" * 64, "bfloat16"), {"name": "shira"}, {"seed": 0})


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def peft_adapter(folder: Path) -> tuple[nn.Module, int]:
    """PEFT's SHiRA, saved after its values were moved. -> the base, how many values."""
    base = net()
    config = peft.ShiraConfig(r=RANK, target_modules=[str(i) for i in range(LAYERS)], random_seed=0)
    model = peft.get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.copy_(torch.randn_like(p) / 100)
    model.save_pretrained(str(folder))
    return model.unload(), sum(p.numel() for p in trained)


def sizes(place: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, unit, seeded, coding in (
        ("elements, seeded", Element(), True, "compact"),
        ("lines, seeded", Line(), True, "compact"),
        ("lines, chosen", Line(), False, "compact"),
        ("elements, chosen", Element(), False, "compact"),
        ("elements, plain", Element(), False, "plain"),
    ):
        made = adapter(unit, seeded)
        start = time.perf_counter()
        folder = store.write(made, place / name, coding=coding, values="bfloat16")
        wrote = time.perf_counter() - start
        start = time.perf_counter()
        back = store.read(folder)
        took = time.perf_counter() - start
        assert back.digest == made.rounded("bfloat16").digest
        rows.append(
            {
                "file": name,
                "values": back.touched,
                "bytes": folder_bytes(folder),
                "write_seconds": wrote,
                "read_seconds": took,
            }
        )
        rows[-1]["of_the_values"] = rows[-1]["bytes"] / (2 * back.touched)
    theirs = place / "peft"
    _, values = peft_adapter(theirs)
    each = folder_bytes(theirs) / values
    rows.append(
        {"file": "PEFT SHiRA (float32), scaled", "values": rows[0]["values"], "bytes": round(each * rows[0]["values"])}
    )
    rows[-1]["of_the_values"] = each / 2
    return rows


def times(place: Path) -> list[dict[str, Any]]:
    theirs = place / "peft-time"
    base, values = peft_adapter(theirs)
    # PEFT's count is r (O + I).
    density = RANK * 2 * WIDTH / WIDTH**2
    folders = {}
    for name, scorer in (("seeded", "random"), ("stored", "magnitude")):
        ia.attach(base, ia.Shira(density=density, scorer=scorer), targets="re:.*", name="a")
        with torch.no_grad():
            for p in (p for p in base.parameters() if p.requires_grad):
                p.copy_(torch.randn_like(p) / 100)
        ia.sync(base)
        folders[name] = ia.save(base, place / name, "a")
        assert store.open(folders[name]).touched == values
        ia.detach(base, "a")

    def peft_load() -> Callable[[], object]:
        loaded = peft.PeftModel.from_pretrained(base, str(theirs), is_trainable=True)
        return loaded.unload

    def ours(name: str, any_base: bool) -> Callable[[], object]:
        ia.load(base, folders[name], "a", any_base=any_base)
        return lambda: ia.detach(base, "a")

    def read(name: str, how: Callable[[Path], store.Adapter]) -> Callable[[], object]:
        how(folders[name])
        return lambda: None

    ways: dict[str, Callable[[], Callable[[], object]]] = {"PEFT SHiRA: from_pretrained": peft_load}
    for name in folders:
        ways[f"{name}: load onto the model"] = lambda name=name: ours(name, True)  # type: ignore[misc]
        ways[f"{name}: load, base checked too"] = lambda name=name: ours(name, False)  # type: ignore[misc]
        ways[f"{name}: read, checked whole"] = lambda name=name: read(name, store.read)  # type: ignore[misc]
        ways[f"{name}: open"] = lambda name=name: read(name, store.open)  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name in list(ways) if number % 2 else list(reversed(ways)):
            start = time.perf_counter()
            undo = ways[name]()
            taken[name].append(time.perf_counter() - start)
            undo()
    medians = {name: statistics.median(found[1:]) for name, found in taken.items()}
    against = medians["PEFT SHiRA: from_pretrained"]
    return [{"way": name, "values": values, "seconds": m, "ratio": m / against} for name, m in medians.items()]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="write the rows to this file as well")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = {"sizes": sizes(Path(place)), "times": times(Path(place))}
    for row in found["sizes"]:
        print(
            f"{row['file']:30} {row['values']:11,} values {row['bytes'] / 1e6:8.2f} MB {row['of_the_values']:7.3f} x 2 bytes"
        )
    for row in found["times"]:
        print(f"{row['way']:30} {row['values']:11,} values {row['seconds'] * 1e3:8.1f} ms {row['ratio']:7.3f}")
    if given.json:
        write_json(given.json, machine() | found)


if __name__ == "__main__":
    main()
