"""Who writes a passage into the weights: torch, weight by weight, or one call of machine code over all of them.

Both write the same bits; the tests hold them to it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from intarsia.deck import crew
from intarsia.deck.plan import Batch, Passage, size_of
from intarsia.deck.weights import Weights
from intarsia.edits import memory, put_row
from intarsia.errors import IntarsiaError, nearest

SMALL = 1 << 15  # lines of the cache; handing fewer to other threads takes longer than to write them


@dataclass(frozen=True, eq=False)
class Prepared:
    """A passage in the form that a writer wants. ``bytes``: what it takes beside the plans."""

    copies: tuple[str, ...]
    work: Any
    bytes: int
    load: int  # lines of the cache that are written, about


class Writer(ABC):
    """One way to write."""

    name: ClassVar[str]

    @abstractmethod
    def index_dtype(self, W: Tensor, run: int) -> torch.dtype:
        """Of the indices of runs of W."""

    def keep(self, tensor: Tensor) -> Tensor:
        """Where the numbers of a plan lie: beside the weights, unless a writer says otherwise."""
        return tensor

    @abstractmethod
    def prepare(self, passage: Passage, weights: Weights) -> Prepared:
        """All that can be done before the weights are touched. It holds for as long as they stay where they are."""

    @abstractmethod
    def write(self, prepared: Prepared, weights: Weights) -> None:
        """Write the batches, in place."""

    def fetch(self, prepared: Prepared) -> None:  # noqa: B027  # most have it at hand
        """Have what a passage needs on its way to where it will be written. For those that keep it elsewhere."""


def _load(passage: Passage) -> int:
    return sum(
        _length(p) * -(-bits.shape[1] * bits.element_size() // 64)
        for batch in passage.batches
        for _, a, b in batch.pieces
        for p, bits in ((a, batch.a[1]), (b, batch.b[1]))
    )


class Torch(Writer):
    """``index_copy_`` on each weight's memory; on any device. A pair's union is made once and kept."""

    name = "torch"

    def index_dtype(self, W: Tensor, run: int) -> torch.dtype:
        return torch.int64  # index_copy_ takes no other

    def prepare(self, passage: Passage, weights: Weights) -> Prepared:
        steps, made = [], 0
        for batch in passage.batches:
            for name, a, b in batch.pieces:
                index, bits, fresh = _union(batch, a, b)
                steps.append((name, batch.run, index, bits))
                made += fresh
        return Prepared(passage.copies, tuple(steps), made, _load(passage))

    def write(self, prepared: Prepared, weights: Weights) -> None:
        steps = prepared.work
        if not steps:  # whole weights alone
            return
        # A call for each weight takes as long as a few lines do, and only one thread at a time may make it.
        several = prepared.load >= SMALL and weights[steps[0][0]].device.type == "cpu"
        count = crew.size() if several and _mean_run(steps) < FEW else 1
        parts = _shared_out(steps, crew.PARTS * count if count > 1 else 1)
        crew.together([partial(put_all, part, weights) for part in parts], count)


FEW = 16  # entries in a run: from there on torch's threads gain nothing


def _mean_run(steps: Sequence[tuple[str, int, Tensor, Tensor]]) -> float:
    runs = sum(len(index) for _, _, index, _ in steps)
    return sum(len(index) * run for _, run, index, _ in steps) / max(1, runs)


def put_all(steps: Sequence[tuple[str, int, Tensor, Tensor]], weights: Weights) -> None:
    """Write steps of (weight, length of its runs, index, bits), one after another."""
    with torch.no_grad():
        for name, run, index, bits in steps:
            put_row(weights.memory(name), run, index, bits)


def _shared_out(steps: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Neighbours together, about as many entries to each; never one weight to two."""
    if count < 2 or len(steps) < 2:
        return [steps]
    total, done = sum(step[3].numel() for step in steps), 0
    parts: list[list[Any]] = [[] for _ in range(count)]
    for step in steps:
        parts[min(count - 1, done * count // max(1, total))].append(step)
        done += step[3].numel()
    return [part for part in parts if part]


def _union(batch: Batch, a: slice, b: slice) -> tuple[Tensor, Tensor, int]:
    """(index, bits, bytes that had to be made) of one piece."""
    if a.start == a.stop:
        return batch.b[0][b], batch.b[1][b], 0
    if b.start == b.stop:
        return batch.a[0][a], batch.a[1][a], 0
    (old, old_bits), (new, new_bits) = ((batch.a[0][a], batch.a[1][a]), (batch.b[0][b], batch.b[1][b]))
    alone = ~torch.isin(old, new, assume_unique=True)
    index, order = torch.cat([old[alone], new]).sort()
    bits = torch.cat([old_bits[alone], new_bits])[order]
    return index, bits, size_of(index) + size_of(bits)


class Native(Writer):
    """Machine code for weights on the CPU: see :mod:`intarsia.deck.native`. Two sorted lists are merged while written."""

    name = "native"

    def index_dtype(self, W: Tensor, run: int) -> torch.dtype:
        return torch.int32 if W.device.type == "cpu" and W.numel() // run < 2**31 else torch.int64

    def prepare(self, passage: Passage, weights: Weights) -> Prepared:
        import numpy as np

        load, made = _load(passage), 0
        calls: list[tuple[Any, ...]] = []
        written: list[str] = []
        parts = crew.PARTS * crew.size() if load >= SMALL and crew.size() > 1 else 1
        for batch in passage.batches:
            names = tuple(dict.fromkeys(name for name, _, _ in batch.pieces))
            number = {name: n for n, name in enumerate(names)}
            rows: list[tuple[int, int, int, int, int]] = []
            ends = (batch.a[0].numpy(), batch.b[0].numpy())
            each = max(1, sum(_length(a) + _length(b) for _, a, b in batch.pieces) // parts)
            for name, a, b in batch.pieces:
                rows += [(number[name], *row) for row in _split(*ends, a, b, each if parts > 1 else 0)]
            pieces = np.array(rows, dtype=np.int64).reshape(-1, 5)
            loads = np.cumsum((pieces[:, 2] - pieces[:, 1]) + (pieces[:, 4] - pieces[:, 3]))
            cuts = [0, *(int(np.searchsorted(loads, loads[-1] * n / parts)) for n in range(1, parts)), len(pieces)]
            addresses = np.array([weights[name].data_ptr() for name in names], dtype=np.int64)
            # Words as wide as a run and all addresses allow: a mapped file may begin anywhere.
            word = math.gcd(8, batch.run * batch.b[1].element_size(), int(np.bitwise_or.reduce(addresses)))
            lists = _lists(batch, word)
            calls += [(addresses, pieces, *lists, *cut) for cut in pairwise(cuts) if cut[0] < cut[1]]
            written += names
            made += pieces.nbytes
        return Prepared(passage.copies, (calls, tuple(written)), made, load)

    def write(self, prepared: Prepared, weights: Weights) -> None:
        calls, written = prepared.work
        torch.autograd.graph.increment_version([weights[name] for name in written])  # or autograd would not notice
        if len(calls) == 1:
            return native_merge(*calls[0])
        crew.together([partial(native_merge, *call) for call in calls], crew.size() if prepared.load >= SMALL else 1)


@functools.cache
def _machine_code() -> Any:
    from intarsia.deck import native

    return native.merge


def native_merge(*given: Any) -> None:
    """One call of the machine code."""
    _machine_code()(*given)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _split(a_index: Any, b_index: Any, a: slice, b: slice, most: int) -> list[tuple[int, int, int, int]]:
    """A piece in parts of about ``most`` runs, cut at the same place in memory; 0: as it is."""
    import numpy as np

    total = _length(a) + _length(b)
    parts = min(64, -(-total // most)) if most else 1
    if parts < 2:
        return [(a.start, a.stop, b.start, b.stop)]
    longer = a_index[a] if _length(a) > _length(b) else b_index[b]
    at = longer[[len(longer) * n // parts for n in range(1, parts)]]
    ends_a = [a.start, *(a.start + np.searchsorted(a_index[a], at)), a.stop]
    ends_b = [b.start, *(b.start + np.searchsorted(b_index[b], at)), b.stop]
    return list(zip(ends_a[:-1], ends_a[1:], ends_b[:-1], ends_b[1:], strict=True))


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _lists(batch: Batch, word: int) -> tuple[Any, Any, Any, Any, int]:
    """(index and bits of a, index and bits of b, words in a run), as numpy sees them."""
    words = batch.run * batch.b[1].element_size() // word
    return batch.a[0].numpy(), _words(batch.a[1], word), batch.b[0].numpy(), _words(batch.b[1], word), words


def _words(bits: Tensor, word: int) -> Any:
    """Bits as one row of unsigned words, a view."""
    import numpy as np

    plain = bits.reshape(-1).view(INTEGERS[bits.element_size()])
    return plain.numpy().view(np.dtype(f"u{word}"))


def chosen(name: str, weights: Sequence[Tensor]) -> Writer:
    """The writer of that name; ``auto``: machine code where numba is installed and all weights lie plainly on the CPU, and

    plans in the host's memory for weights on a GPU.

    Raises:
        IntarsiaError: for an unknown name, or ``native`` where it cannot be.
    """
    from intarsia.deck.staged import Staged  # itself a writer

    known: dict[str, type[Writer]] = {writer.name: writer for writer in (Torch, Native, Staged)}
    if name not in (*known, "auto"):
        raise IntarsiaError(f"no writer {name!r}; {nearest(name, [*known, 'auto'])}")
    installed = importlib.util.find_spec("numba") is not None
    plain = all(W.device.type == "cpu" and memory(W) is not None for W in weights)
    if name == "native" and not installed:
        raise IntarsiaError("the native writer needs numba, which is not installed: pip install 'intarsia[fast]'")
    if name == "native" and not plain:
        raise IntarsiaError("the native writer writes weights that lie plainly on the CPU; take writer='torch'")
    if name == "auto":
        on_gpu = any(W.device.type == "cuda" for W in weights)
        name = "staged" if on_gpu else "native" if installed and plain else "torch"
    return known[name]()
