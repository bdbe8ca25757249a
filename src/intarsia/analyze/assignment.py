"""The linear assignment problem: which column goes to which row so that the sum of what is chosen is largest.

Shortest augmenting paths with potentials (Jonker & Volgenant 1987): O(n^3), each of the n^2 steps one pass over a row in numpy.
Written here because it is the only thing that would need scipy: 256 rows take a fraction of a second.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from intarsia.errors import IntarsiaError


def assignment(scores: Tensor) -> Tensor:
    """The permutation p that makes sum_i scores[i, p_i] largest. (n, n) -> (n,) int64.

    Raises:
        IntarsiaError: for what is not square, or has numbers that are not finite.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise IntarsiaError(f"scores are {tuple(scores.shape)}; an assignment needs as many rows as columns")
    if not bool(scores.isfinite().all()):
        raise IntarsiaError("scores have numbers that are not finite")
    cost = -scores.detach().double().cpu().numpy()
    n = len(cost)
    rows, columns = np.zeros(n), np.zeros(n)  # potentials; cost - rows - columns is never below zero on what was seen
    taken_by = np.full(n, -1)
    for row in range(n):
        distance, before = np.full(n, np.inf), np.full(n, -1)
        done = np.zeros(n, dtype=bool)
        scanned: list[int] = []
        at, reached, end = row, 0.0, -1
        while end < 0:
            shorter = reached + cost[at] - rows[at] - columns
            better = ~done & (shorter < distance)
            distance[better], before[better] = shorter[better], at
            column = int(np.where(done, np.inf, distance).argmin())
            reached = distance[column]
            done[column] = True
            scanned.append(column)
            if taken_by[column] < 0:
                end = column
            else:
                at = taken_by[column]
        # The potentials move so that the path just found costs nothing.
        rows[row] += reached
        for column in scanned[:-1]:
            rows[taken_by[column]] += reached - distance[column]
            columns[column] -= reached - distance[column]
        while True:
            previous = before[end]
            taken_by[end] = previous
            if previous == row:
                break
            end = _column_of(taken_by, previous, end)
    chosen = np.empty(n, dtype=np.int64)
    chosen[taken_by] = np.arange(n)
    return torch.from_numpy(chosen)


def _column_of(taken_by: np.ndarray, row: int, new: int) -> int:
    """The column that the row held before it was given ``new``."""
    held = np.flatnonzero(taken_by == row)
    return int(held[held != new][0])
