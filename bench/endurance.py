"""A deck under random switches, threads and failures: the base's bits survive, and adding stays cheap.

python bench/endurance.py                                      10,000 switches over 20 adapters of mixed kinds, 4 threads
python bench/endurance.py --switches 500 --adapters 8 --adds 0
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import intarsia as ia
from intarsia import store
from intarsia.deck import deck as deck_module
from intarsia.deck import plan as plan_module
from intarsia.deck import writer as writer_module
from intarsia.edits import Dense, Edit, Kronecker, LowRank, Rescaled, Sparse, Sum
from intarsia.support import named_granularity

SHAPES = ((48, 32), (64, 48), (32, 64))
KINDS = ("element", "line", "tile", "row", "column", "diagonal", "low rank", "kronecker", "dense", "lengths", "sum")
STEPS = (
    (writer_module, "put_row"),
    (writer_module, "native_merge"),
    (plan_module, "put"),
    (plan_module, "summed"),
    (deck_module, "place"),
)


class Planted(Exception):
    """What the faults raise."""


@dataclass
class Report:
    """What happened."""

    switches: int = 0
    failures: int = 0
    checks: int = 0
    wrong: list[str] = field(default_factory=list)


def net(dtype: torch.dtype) -> nn.Sequential:
    """Three layers of fixed random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(i, o) for o, i in SHAPES)).to(dtype)


def some_edit(kind: str, shape: tuple[int, int], dice: torch.Generator) -> Edit:
    """An edit of this kind with random numbers."""

    def some(*size: int) -> torch.Tensor:
        return 0.05 * torch.randn(size, generator=dice)

    O, I = shape
    if kind == "low rank":
        return LowRank(shape, some(O, 2), some(2, I), 2.0)
    if kind == "kronecker":
        return Kronecker(shape, some(O // 4, 2), some(4, I // 2), 1.0)
    if kind == "dense":
        return Dense(shape, some(O, I))
    if kind == "lengths":
        return Rescaled(shape, some_edit("low rank", shape, dice), 1 + some(O).abs())
    if kind == "sum":
        return Sum(shape, (some_edit("line", shape, dice), some_edit("element", shape, dice)), (1.0, -0.5))
    unit = named_granularity(kind, 8 if kind in ("line", "tile") else None)
    index = torch.randperm(unit.units(shape), generator=dice)[: max(1, unit.units(shape) // 20)].sort().values
    return Sparse(shape, unit, index, some(*unit.values_shape(shape, len(index))))


def some_adapter(model: nn.Module, digest: str, number: int) -> ia.Adapter:
    """The number-th adapter; all kinds take turns."""
    dice = torch.Generator().manual_seed(number)
    kind = KINDS[number % len(KINDS)]
    edits = {f"{n}.weight": some_edit(kind, shape, dice) for n, shape in enumerate(SHAPES)}
    dtype = store.dtype_name(next(model.parameters()).dtype)
    return ia.Adapter(f"{kind.replace(' ', '-')}-{number}", edits, store.Base(digest, dtype), {"name": "shira"})


@contextmanager
def faults(share: float, seed: int) -> Iterator[None]:
    """Within the block, steps of a switch raise at random calls, before or after they were done."""
    dice, real = random.Random(seed), [(owner, name, getattr(owner, name)) for owner, name in STEPS]

    def wrapped(step: Any) -> Any:
        def fail(*given: Any) -> Any:
            chance = dice.random()
            if chance < share / 2:
                raise Planted
            done = step(*given)
            if chance < share:
                raise Planted
            return done

        return fail

    try:
        for owner, name, step in real:
            setattr(owner, name, wrapped(step))
        yield
    finally:
        for owner, name, step in real:
            setattr(owner, name, step)


def endure(
    switches: int, adapters: int, threads: int, share: float, dtype: torch.dtype, writer: str = "auto", seed: int = 0
) -> Report:
    """Random use, fuse, strength, prefetch and off from several threads, with failures. The base is compared now and then."""
    deck = ia.Deck(net(dtype), memory=200_000, writer=writer)  # too little for all plans: some go and come again
    deck.add(*(some_adapter(deck.model, deck.base_digest, number) for number in range(adapters)))
    report, start, lock = Report(), deck.base_digest, threading.Lock()

    def work(number: int, count: int) -> None:
        dice = random.Random(1000 * seed + number)
        for turn in range(count):
            failed = False
            try:
                some_switch(deck, dice)
            except Planted:
                failed = True
            except ia.IntarsiaError as error:
                if "nothing is set in" not in str(error):  # another thread has just called off()
                    report.wrong.append(str(error))
            with lock:
                report.switches += 1
                report.failures += failed
            if turn % 50 == 49:
                check()

    def check() -> None:
        # verify() takes everything out and in again; its own steps may be made to fail too.
        with lock:
            report.checks += 1
        try:
            found = deck.verify()
        except Planted:
            return
        except ia.IntarsiaError as error:
            found = str(error)
        if found != start:
            report.wrong.append(found)

    with faults(share, seed):
        crew = [
            threading.Thread(target=work, args=(n, switches // threads + (n < switches % threads)))
            for n in range(threads)
        ]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
    deck.off()
    if ia.digest(deck.model) != start:
        report.wrong.append("the base has other bits at the end")
    return report


def some_switch(deck: ia.Deck, dice: random.Random) -> None:
    names = dice.sample(deck.names, dice.randint(1, min(4, len(deck.names))))
    kind = dice.choice(["use", "use", "use", "fuse", "fuse", "strength", "prefetch", "off"])
    if kind == "use":
        deck.use(names[0], dice.choice([1.0, 1.0, 1.0, 0.5, -1.0]))
    elif kind == "fuse":
        deck.fuse({name: dice.choice([0.25, 0.5, 1.0, -0.5]) for name in names})
    elif kind == "strength":
        deck.strength(dice.choice([0.0, 0.5, 1.0, 1.5]))
    elif kind == "prefetch":
        deck.prefetch(names[0])
    else:
        deck.off()


@dataclass(frozen=True)
class Adding:
    """Medians over the first and the last adapters that were added."""

    count: int
    first_s: float
    last_s: float
    first_bytes: float
    last_bytes: float
    resident_bytes: int  # by which the process grew


def adding(count: int, some: int = 40) -> Adding:
    """Seconds, and bytes allocated by Python, for adding an adapter from its folder as the first, and as the count-th.

    In turn to an empty deck and to one that has all the others, so that a busy machine hits both alike.
    """
    model = net(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = store.write(some_adapter(model, ia.digest(model), 1), Path(folder) / "a")
        full = ia.Deck(model)
        full.add(warm=path)
        resident = psutil.Process().memory_info().rss
        for number in range(count - some):
            full.add(**{f"a{number}": path})  # type: ignore[arg-type]
        grown = psutil.Process().memory_info().rss - resident
        found: dict[str, list[tuple[float, int]]] = {"first": [], "last": []}
        for traced in (False, True):  # tracing takes its own time
            for number in range(some // 2):
                for which, deck in (("first", ia.Deck(model)), ("last", full)):
                    name = f"{which}{number}{traced}"
                    if traced:
                        tracemalloc.start()
                    start = time.perf_counter()
                    deck.add(**{name: path})  # type: ignore[arg-type]
                    taken = time.perf_counter() - start
                    found[which].append((taken, 0) if not traced else (0.0, tracemalloc.get_traced_memory()[0]))
                    tracemalloc.stop()
    seconds = {which: statistics.median(t for t, size in all_ if not size) for which, all_ in found.items()}
    sizes = {which: statistics.median(size for _, size in all_ if size) for which, all_ in found.items()}
    return Adding(count, seconds["first"], seconds["last"], sizes["first"], sizes["last"], grown)


def main() -> int:
    """Run it, say what happened. -> 1 where a bit was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--faults", type=float, default=0.02, help="share of the steps that raise")
    parser.add_argument("--adds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given, wrong = parser.parse_args(), 0
    for dtype in (torch.float32, torch.bfloat16):
        for writer in ("torch", "auto", "staged"):
            start = time.perf_counter()
            found = endure(given.switches, given.adapters, given.threads, given.faults, dtype, writer, given.seed)
            print(
                f"{store.dtype_name(dtype)}, writer {writer}: {found.switches:,} calls from {given.threads} threads over "
                f"{given.adapters} adapters, {found.failures:,} failed in the middle, the base compared {found.checks:,} times: "
                f"{len(found.wrong)} times wrong ({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
            wrong += len(found.wrong)
            for line in found.wrong[:5]:
                print(f"  {line}")
    if given.adds:
        cost = adding(given.adds)
        print(
            f"adding: the first {1e3 * cost.first_s:.2f} ms and {cost.first_bytes:,.0f} bytes, the {cost.count:,}th "
            f"{1e3 * cost.last_s:.2f} ms ({cost.last_s / cost.first_s:.2f}x) and {cost.last_bytes:,.0f} bytes "
            f"({cost.last_bytes / cost.first_bytes:.2f}x); the process grew by {cost.resident_bytes / 1e6:.1f} MB in all"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
