"""What a switch of adapters costs: the deck, LoRA fused in place, the way of HF PEFT, a dense copy, and the limit of memory.

On one weight: setting in, from the base. On a whole model: from one adapter to another. In every round each way is taken
once, in an order shuffled anew by a fixed seed; ratios are taken within a round, and their median is what is reported.

The limit is the time to read and write every line of 64 bytes that holds an entry to be written, once, at its place and in
the order of memory, by machine code on all threads (without numba: as many bytes that lie side by side, by torch).
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from intarsia import pretrained, store
from intarsia.bench import others
from intarsia.bench.contenders import Unavailable
from intarsia.bench.machine import machine
from intarsia.bench.train import DTYPES
from intarsia.deck import Deck, crew
from intarsia.deck.plan import Plan
from intarsia.deck.writer import SMALL
from intarsia.edits import Sparse
from intarsia.errors import IntarsiaError, nearest
from intarsia.site import adaptable_layers, weight_name
from intarsia.support import GRANULARITIES, named_granularity
from intarsia.train.progress import Progress

LORA, PEFT_WAY, PEFT, DENSE, LIMIT = "lora-fuse", "peft-way", "peft", "dense-copy", "limit"
AGAINST = {
    LORA: "LoRA fused in place: addmm_ (on a model: one out, one in)",
    PEFT_WAY: "LoRA as HF PEFT merges it: B A, then added (on a model: one out, one in)",
    PEFT: "HF PEFT itself: unmerge_adapter, set_adapter, merge_adapter, LoRA of rank 16",
    DENSE: "a copy of all weights",
    LIMIT: "every line of 64 bytes that is touched, read and written once",
}
SCRATCH = 2**27  # bytes, more than the caches of a processor hold
ONE, MODEL, COLD = "one weight", "whole model", "cold file to first token"


@dataclass(frozen=True)
class Setup:
    """What is timed.

    Attributes:
        shapes: of single weights, ``"4096x4096"``.
        densities: shares of the entries.
        granularities: names; ``auto``-matically of their usual width.
        model: a model by name for whole switches; ``"none"`` leaves them out.
        rank: of LoRA on one weight; on a model it is 16, as PEFT's.
        writer: of the deck.
        warm: each way is taken once more right before it is timed, where otherwise the processor's caches are emptied.
    """

    shapes: Sequence[str] = ("4096x4096",)
    densities: Sequence[float] = (0.01,)
    dtype: str = "both"
    granularities: Sequence[str] = ("element", "line", "tile", "row", "column")
    model: str = "smollm2-135m"
    rank: int = 32
    rounds: int = 25
    threads: int = 2
    writer: str = "auto"
    warm: bool = False
    seed: int = 0


@dataclass
class Timing:
    """One way in one place: seconds by round."""

    subject: str
    place: str  # ONE, MODEL or COLD
    where: str  # shape, or the model's name
    dtype: str
    density: float | None
    bytes: int  # that are written
    times: dict[int, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)  # seconds, medians

    @property
    def median(self) -> float:
        return statistics.median(self.times.values())

    def over(self, other: Timing) -> float:
        """How many times this one's time the other takes: the median over rounds."""
        return statistics.median(other.times[n] / self.times[n] for n in self.times.keys() & other.times.keys())


@dataclass
class Switches:
    """All that a run measured."""

    about: Mapping[str, Any]
    rows: list[Timing]
    skipped: list[dict[str, str]]
    interrupted: bool = False

    def groups(self) -> dict[tuple[str, str, str], list[Timing]]:
        """By place, weight or model, and dtype."""
        found: dict[tuple[str, str, str], list[Timing]] = {}
        for row in self.rows:
            if row.times:
                found.setdefault((row.place, row.where, row.dtype), []).append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: a row for each way and what it is compared with."""
        rows = []
        for (place, where, dtype), group in self.groups().items():
            for row in group:
                plain = {
                    "subject": row.subject,
                    "place": place,
                    "against": None,
                    "dtype": dtype,
                    ("shape" if place == ONE else "model"): where,
                    "density": row.density,
                    "median_s": row.median,
                    "ratio": None,
                    "bytes": row.bytes,
                    "rounds": len(row.times),
                } | ({"parts": row.parts} if row.parts else {})
                against = _compared(row, group)
                rows += [plain | {"against": name, "ratio": row.over(one)} for name, one in against.items()] or [plain]
        return {**self.about, "rows": rows, "skipped": self.skipped, "interrupted": self.interrupted}

    def tables(self) -> list[Table]:
        """For people: one for each place, weight or model and dtype."""
        return [self._table(*key, group) for key, group in self.groups().items()]

    def _table(self, place: str, where: str, dtype: str, group: Sequence[Timing]) -> Table:
        title = f"{place}, {where}, {dtype}"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("way", no_wrap=True)
        heads = [name for name in AGAINST if any(name in _compared(row, group) for row in group)]
        parts = list(dict.fromkeys(name for row in group for name in row.parts))
        for head in ("median", "written", *(f"{head} takes" for head in heads), *parts):
            table.add_column(head, justify="right", no_wrap=True)
        for row in group:
            against = _compared(row, group)
            ratios = [f"{row.over(against[name]):.2f}x" if name in against else "" for name in heads]
            shares = [f"{row.parts[name] / sum(row.parts.values()):.0%}" if name in row.parts else "" for name in parts]
            table.add_row(row.subject, f"{1e3 * row.median:,.3f} ms", f"{row.bytes / 1e6:,.2f} MB", *ratios, *shares)
        return table

    def picture(self, path: Path) -> Path:
        """Bars as a PNG: how many times as long LoRA takes, on a scale of tens."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        shown = {key: rows for key, rows in self.groups().items() if key[0] != COLD}
        figure = Figure(figsize=(11, 0.8 + sum(0.75 + 0.27 * len(rows) for rows in shown.values()) / 2 + 0.6), dpi=150)
        figure.set_layout_engine("constrained")
        FigureCanvasAgg(figure)
        down = max(1, -(-len(shown) // 2))
        for number, ((place, where, dtype), rows) in enumerate(shown.items()):
            axes = figure.add_subplot(down, 2, number + 1)
            ordered = sorted(rows, key=lambda row: row.median, reverse=True)
            names = [_labelled(row) for row in ordered]
            times = [1e3 * row.median for row in ordered]
            bars = axes.barh(names, times, color=[_colour(row) for row in ordered])
            axes.bar_label(bars, [f"{time:,.2f}" for time in times], padding=3, fontsize=7)
            axes.set_xscale("log")
            axes.set_xlim(min(times) / 2, max(times) * 4)
            what = "setting in" if place == ONE else "going from A to B"
            axes.set_title(f"{where}, {dtype}: milliseconds for {what}", loc="left", fontsize=9)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.stem}.part.png")
        figure.savefig(aside, metadata={"Software": None})
        aside.replace(path)
        return path


TEAL, GREY, RUST = "#0a6c74", "#8a8a8a", "#b5532a"


def _colour(row: Timing) -> str:
    return (
        RUST
        if row.subject in (LORA, PEFT_WAY, PEFT)
        else TEAL
        if row.density is not None and ":" not in row.subject
        else GREY
    )


def _labelled(row: Timing) -> str:
    return row.subject if row.density is None else f"{row.subject}, {row.density:.2g}"


def _compared(row: Timing, group: Sequence[Timing]) -> dict[str, Timing]:
    """What a way of ours stands against; the limit is that of the same lines."""
    if row.density is None or row.subject.startswith(LIMIT) or row.place == COLD:
        return {}
    found = {one.subject: one for one in group if one.subject in AGAINST}
    limit = [one for one in group if one.subject == f"{LIMIT}: {row.subject}" and one.density == row.density]
    return found | ({LIMIT: limit[0]} if limit else {})


def run(setup: Setup, progress: Progress | None = None) -> Switches:
    """Measure, and come back with what was measured, also when Ctrl-C ended it (``interrupted`` is set then).

    Raises:
        IntarsiaError: for an unknown name or a shape, density or writer that cannot be, before anything is timed.
    """
    progress = progress or Progress()
    dtypes = list(DTYPES) if setup.dtype == "both" else [setup.dtype]
    for name, known in [(d, DTYPES) for d in dtypes] + [(g, GRANULARITIES) for g in setup.granularities]:
        if name not in known:
            raise IntarsiaError(f"no such thing as {name!r} here; {nearest(name, known)}")
    shapes = {text: _shape(text) for text in setup.shapes}
    for density in setup.densities:
        if not 0 < density <= 0.5:
            raise IntarsiaError(f"density={density}; expected a share from 0 to 0.5")
    if setup.rounds < 1 or setup.rank < 1 or setup.threads < 1:
        raise IntarsiaError("rounds, rank and threads are 1 or more")
    about = machine()
    before = torch.get_num_threads()
    torch.set_num_threads(setup.threads)
    about["machine"]["threads"] = setup.threads
    about["settings"] = {"rounds": setup.rounds, "rank": setup.rank, "seed": setup.seed, "writer": setup.writer}
    found = Switches(about, [], [])
    try:
        with progress, torch.no_grad():
            for dtype in dtypes:
                for text, shape in shapes.items():
                    _Place(setup, found, progress, ONE, text, dtype).time(_one_weight(shape, DTYPES[dtype]), setup.rank)
                if setup.model != "none":
                    progress.say(f"loading {setup.model} in {dtype}")
                    model = pretrained.load(setup.model, dtype=DTYPES[dtype], progress=progress.say).model
                    _Place(setup, found, progress, MODEL, setup.model, dtype).time(model, 16)
                    _Place(setup, found, progress, COLD, setup.model, dtype).cold(model)
                    del model
                gc.collect()
    except KeyboardInterrupt:
        found.interrupted = True
    finally:
        torch.set_num_threads(before)
    return found


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) > 0 and int(columns) > 0):
        raise IntarsiaError(f"shape {text!r}; expected ROWSxCOLUMNS, such as 4096x4096")
    return int(rows), int(columns)


def _one_weight(shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).to(dtype).requires_grad_(False)


@dataclass
class _Way:
    """``ready`` is not timed, ``switch`` is."""

    switch: Callable[[], object]
    ready: Callable[[], object] = lambda: None


class _Place:
    """One model of one dtype, and all ways on it."""

    def __init__(self, setup: Setup, found: Switches, progress: Progress, place: str, where: str, dtype: str) -> None:
        self.setup, self.found, self.progress = setup, found, progress
        self.place, self.where, self.dtype = place, where, dtype
        self.ways: dict[int, tuple[Timing, _Way]] = {}
        self.dice = random.Random(setup.seed)

    def time(self, model: nn.Module, rank: int) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.targets = _targets(model)
        size = sum(W.numel() * W.element_size() for W in self.targets.values())
        self._deck(model)
        # In weights of their own: adding and subtracting would leave other bits, and a deck makes its plans anew after that.
        copies = [W.clone() for W in self.targets.values()]
        self._low_rank(copies, rank, size)
        self._add(
            DENSE, None, size, _Way(lambda: [c.copy_(W) for W, c in zip(self.targets.values(), copies, strict=True)])
        )
        if self.place == MODEL:
            try:
                switch = others.peft_switch(model, self.targets.keys(), rank)
            except Unavailable as error:
                self.found.skipped.append({"subject": PEFT, "dtype": self.dtype, "why": str(error)})
            else:
                turn = iter(_alternate())
                self._add(PEFT, None, size, _Way(lambda: switch(next(turn))))
        self._rounds()
        self.deck.off()

    def _add(self, subject: str, density: float | None, size: int, way: _Way) -> None:
        timing = Timing(subject, self.place, self.where, self.dtype, density, size)
        self.found.rows.append(timing)
        self.ways[len(self.ways)] = timing, way

    def _rounds(self) -> None:
        scratch = torch.ones(SCRATCH // 8, dtype=torch.int64)
        for number in range(-2, self.setup.rounds):  # the first two warm up
            self.progress.work(max(0, number), self.setup.rounds, f"{self.where}, {self.dtype}: switching; round")
            gc.collect()
            for key in self.dice.sample(list(self.ways), len(self.ways)):
                timing, way = self.ways[key]
                way.ready()
                if self.setup.warm:
                    way.switch()
                    way.ready()
                else:
                    scratch.bitwise_xor_(1)  # so that nobody finds what is wanted in the processor's caches
                start = time.perf_counter()
                way.switch()
                taken = time.perf_counter() - start
                if number >= 0:
                    timing.times[number] = taken

    # ------------------------------------------------------------------ ways
    def _deck(self, model: nn.Module) -> None:
        self.deck = deck = Deck(model, memory=2**40, writer=self.setup.writer)
        for density in self.setup.densities:
            for name in self.setup.granularities:
                unit = named_granularity(name)
                if any(int(unit.units(_of(W)) * density) < 1 for W in self.targets.values()):
                    why = f"a weight has fewer than {1 / density:.0f} {unit.plural}"
                    self.found.skipped.append({"subject": unit.plural, "dtype": self.dtype, "why": why})
                    continue
                one, other = (f"{name}-{density}-{letter}" for letter in "ab")
                deck.add(**{n: _adapter(deck, name, density, seed) for seed, n in enumerate((one, other))})  # type: ignore[arg-type]
                plans = []
                for adapter in (one, other):
                    deck.use(adapter)
                    plans.append(deck._inside.plan)
                deck.off()
                if self.place == ONE:
                    plans, way = plans[:1], _Way(partial(deck.use, one), deck.off)
                else:
                    way = _Way(partial(deck.use, other), partial(deck.use, one))
                size = sum(bits.numel() * bits.element_size() for plan in plans for bits in plan.bits)
                self._add(unit.plural, density, size, way)
                lines = _lines(plans, self.targets)
                self._add(f"{LIMIT}: {unit.plural}", density, 64 * sum(map(len, lines.values())), _Way(_limit(lines)))

    def _low_rank(self, weights: Sequence[Tensor], rank: int, size: int) -> None:
        dice = torch.Generator().manual_seed(self.setup.seed)
        signs = (1.0,) if self.place == ONE else (-1.0, 1.0)
        # So small that thousands of rounds move little; the arithmetic takes as long.
        pairs = [
            [
                (
                    W,
                    1e-6 * torch.randn(W.shape[0], rank, generator=dice),
                    1e-6 * torch.randn(rank, W.shape[1], generator=dice),
                )
                for W in weights
            ]
            for _ in signs
        ]
        factors = [[(W, B.to(W.dtype), A.to(W.dtype)) for W, B, A in group] for group in pairs]

        def fuse() -> None:
            for sign, group in zip(signs, factors, strict=True):
                for W, B, A in group:
                    W.addmm_(B, A, alpha=sign)

        def merge() -> None:
            for sign, group in zip(signs, factors, strict=True):
                for W, B, A in group:
                    W.add_(B @ A, alpha=sign)

        self._add(LORA, None, len(signs) * size, _Way(fuse))
        self._add(PEFT_WAY, None, len(signs) * size, _Way(merge))

    # ------------------------------------------------------------------ from a file
    def cold(self, model: Any) -> None:
        """Open the folder, read and plan, write, and one forward pass of one token: all that stands before the first token."""
        ids = torch.tensor([[1]])
        model.eval()
        with tempfile.TemporaryDirectory() as folder:
            for density in self.setup.densities:
                for name in (n for n in ("line", "element") if n in self.setup.granularities):
                    deck = Deck(model, writer=self.setup.writer)
                    path = store.write(_adapter(deck, name, density, 1), Path(folder) / f"{name}-{density}")
                    timing = Timing(
                        named_granularity(name).plural, COLD, self.where, self.dtype, density, _file_bytes(path)
                    )
                    self.found.rows.append(timing)
                    steps: dict[str, Callable[[], object]] = {
                        "open": partial(deck.add, a=path),
                        "read and plan": partial(_prefetched, deck),
                        "switch": partial(deck.use, "a"),
                        "first token": partial(model, ids),
                    }
                    taken: dict[str, list[float]] = {step: [] for step in steps}
                    for number in range(-1, max(3, self.setup.rounds // 3)):
                        _forget(path)
                        for step, act in steps.items():
                            start = time.perf_counter()
                            act()
                            if number >= 0:
                                taken[step].append(time.perf_counter() - start)
                        if number >= 0:
                            timing.times[number] = sum(seconds[-1] for seconds in taken.values())
                        deck.off()
                        deck.remove("a")
                    timing.parts = {step: statistics.median(seconds) for step, seconds in taken.items()}


def _prefetched(deck: Deck) -> None:
    deck.prefetch("a").result()


def _alternate() -> Iterator[int]:
    while True:
        yield 1
        yield 0


def _of(W: Tensor) -> tuple[int, int]:
    return W.shape[0], W.shape[1]


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the linear layers, as they are stored, but for the head."""
    return {
        weight_name(model, name): layer.weight.detach()
        for name, layer in adaptable_layers(model).items()
        if isinstance(layer, nn.Linear) and not name.endswith("lm_head")
    }


def _adapter(deck: Deck, name: str, density: float, seed: int) -> store.Adapter:
    """Random units and values on every linear layer."""
    unit, generator, edits = named_granularity(name), torch.Generator().manual_seed(seed), {}
    weights = _targets(deck.model)
    for target, W in weights.items():
        units = unit.units(_of(W))
        index = torch.randperm(units, generator=generator)[: int(units * density)].sort().values
        values = 0.01 * torch.randn(unit.values_shape(_of(W), len(index)), generator=generator)
        edits[target] = Sparse(_of(W), unit, index, values)
    dtype = store.dtype_name(next(iter(weights.values())).dtype)
    return store.Adapter(name, edits, store.Base(deck.base_digest, dtype), {"name": "shira"})


def _lines(plans: Sequence[Plan], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of the 64-byte lines that the plans touch in each weight, ascending."""
    found: dict[str, list[Tensor]] = {}
    for plan in plans:
        for where in plan.where:
            for number, name in enumerate(where.weights):
                size = weights[name].element_size()
                first = where.index[where.part(number)].long() * where.run * size
                each = torch.arange(0, where.run * size, min(64, where.run * size))
                found.setdefault(name, []).append(((first[:, None] + each).view(-1) // 64).unique())
    return {name: torch.cat(parts).unique().int() for name, parts in found.items()}


def _limit(lines: Mapping[str, Tensor]) -> Callable[[], None]:
    try:
        from intarsia.deck import native
    except ImportError:
        row = torch.ones(8 * sum(map(len, lines.values())), dtype=torch.int64)
        return partial(_flip, row)
    # In memory of its own, all weights behind one another: the lines of the model are not to be flipped, and a call for each
    # weight would be no part of a limit.
    parts, start = [], 0
    for numbers in lines.values():
        parts.append(numbers + start)
        start += int(numbers[-1]) + 1
    places, room = torch.cat(parts).numpy(), torch.ones(8 * start, dtype=torch.int64)
    count = crew.PARTS * crew.size() if crew.size() > 1 else 1
    cuts = [len(places) * n // count for n in range(count + 1)]
    calls = [partial(_touch, native.touch, room, places, first, last) for first, last in pairwise(cuts)]
    return partial(crew.together, calls, crew.size() if len(places) >= SMALL else 1)


def _flip(row: Tensor) -> None:
    row.bitwise_xor_(1)


def _touch(touch: Any, room: Tensor, numbers: Any, first: int, last: int) -> None:
    touch(room.data_ptr(), numbers, first, last)


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _forget(folder: Path) -> None:
    """Have the system drop what it holds of the files, where it can."""
    if hasattr(os, "posix_fadvise"):
        for file in folder.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
