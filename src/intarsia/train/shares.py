"""One batch for several processes: each takes its share of the rows, so that a run is the same run with any number of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from torch.utils.data import BatchSampler, Sampler

from intarsia.train.data import IGNORED, Example

T = TypeVar("T")


def blank(example: Example) -> Example:
    """A row that weighs nothing, for a process that no row is left for: it must take part in every step."""
    return replace(example, labels=[IGNORED] * len(example.labels))


def share(rows: Sequence[T], rank: int, count: int, filler: T) -> list[T]:
    """This process's part of the rows; the filler where there is none."""
    return list(rows[rank::count]) or [filler]


class Shares(BatchSampler):
    """The batches of one process, made into this process's share of each. Index -1 is the row that weighs nothing."""

    def __init__(self, sampler: Sampler[int], batch_size: int, rank: int, count: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.rank, self.count = rank, count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield share(batch, self.rank, self.count, -1)
