"""Setting edits into a weight: which bits, and where. Sums of sparse edits touch only the union of their supports.

Where, is said in the weight's memory and not in its rows and columns: a support becomes runs of entries that lie side by
side, each beginning at a multiple of the run's length. One row of indices then serves elements (runs of 1), lines and
tiles (their width) and rows (whole rows), and also a weight that is stored transposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.edits.edit import Edit, Sparse
from intarsia.errors import IntarsiaError

Terms = Sequence[tuple[float, Edit]]


@dataclass(frozen=True, eq=False)
class Runs:
    """Numbers for runs of a weight's memory: ``values`` (n, run) for the entries index * run ... of each."""

    run: int
    index: Tensor  # (n,) int64, ascending
    values: Tensor  # (n, run)

    def cut(self, run: int) -> Runs:
        """The same entries in runs of a length that divides this one's."""
        if run == self.run:
            return self
        pieces = self.run // run
        index = (self.index[:, None] * pieces + torch.arange(pieces, device=self.index.device)).view(-1)
        return Runs(run, index, self.values.reshape(-1, run))


@dataclass(frozen=True, eq=False)
class Placement:
    """Bits for a part of a weight: runs of its memory, or the whole weight (O, I) where ``index`` is None."""

    run: int
    index: Tensor | None
    bits: Tensor

    def read(self, W: Tensor) -> Placement:
        """The bits that stand in W now at the same place: a copy."""
        if self.index is None:
            return Placement(self.run, None, W.detach().clone())
        return Placement(self.run, self.index, gathered(W, self.run, self.index))

    def write(self, W: Tensor) -> None:
        """Set the bits into W, in place."""
        with torch.no_grad():
            if self.index is None:
                W.copy_(self.bits)
            else:
                put(W, self.run, self.index, self.bits)


def memory(W: Tensor) -> Tensor | None:
    """A weight's memory as one row, a view; None where it is neither stored as (O, I) nor as (I, O)."""
    W = W.detach()
    return W.view(-1) if W.is_contiguous() else W.mT.view(-1) if W.mT.is_contiguous() else None


def gathered(W: Tensor, run: int, index: Tensor) -> Tensor:
    """The entries of some runs, a copy. -> (n, run)."""
    row = memory(W)
    assert row is not None  # place() puts nothing but whole weights elsewhere
    return row.index_select(0, index)[:, None] if run == 1 else row.view(-1, run).index_select(0, index)


def put(W: Tensor, run: int, index: Tensor, bits: Tensor) -> None:
    """Write (n, run) bits into some runs of W, in place."""
    row = memory(W)
    assert row is not None
    put_row(row, run, index, bits)


def put_row(row: Tensor, run: int, index: Tensor, bits: Tensor) -> None:
    """Write (n, run) bits into some runs of a weight's memory, one row, in place."""
    if run == 1:
        row.index_copy_(0, index, bits.view(-1))  # scatter_ on a bf16 CPU tensor is 20-40 times slower
    else:
        row.view(-1, run).index_copy_(0, index, bits)


def place(name: str, W: Tensor, terms: Terms) -> Placement:
    """W + sum_i w_i (fold_i(W) - W), computed in float32 or wider, rounded to W's dtype once.

    Sparse edits, whatever they are made of, are summed on the union of their supports, and only that is placed.

    Raises:
        IntarsiaError: where a result is not finite in W's dtype.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    change = summed(W, terms, wide)
    if change is not None:
        base = gathered(W, change.run, change.index).to(wide)
        placement = Placement(change.run, change.index, (base + change.values).to(W.dtype))
    else:
        base = W.detach().to(wide)
        total = torch.zeros_like(base)
        for weight, edit in terms:
            total += weight * edit.delta(base)
        placement = Placement(1, None, (base + total).to(W.dtype))
    check_finite(name, placement.bits)
    return placement


def check_finite(name: str, bits: Tensor) -> None:
    """Raise IntarsiaError where the bits that are to be set in are no numbers."""
    if not bool(bits.isfinite().all()):
        raise IntarsiaError(
            f"{name}: setting in would write numbers that are not finite in {bits.dtype}; "
            "the strength is too large or the adapter is broken. Nothing was changed"
        )


def summed(W: Tensor, terms: Terms, wide: torch.dtype) -> Runs | None:
    """sum_i w_i (fold_i(W) - W) on the union of the supports, in runs of W's memory; None where a part is not sparse.

    Parts of different granularities meet in the longest runs that all of them fall into.
    """
    if memory(W) is None:
        return None
    parts: list[tuple[float, Runs]] = []
    for weight, edit in terms:
        sparse = edit.sparse_parts()
        if sparse is None:
            return None
        parts += [(weight, _in_memory(W, part, wide)) for part in sparse]
    if len(parts) == 1:
        weight, runs = parts[0]
        return Runs(runs.run, runs.index, weight * runs.values)
    run = math.gcd(*(runs.run for _, runs in parts))
    cut = [(weight, runs.cut(run)) for weight, runs in parts]
    index = torch.cat([runs.index for _, runs in cut]).unique()
    total = torch.full((len(index), run), -0.0, dtype=wide, device=index.device)  # -0.0 + v is v, also where v is -0.0
    for weight, runs in cut:
        total.index_add_(0, torch.searchsorted(index, runs.index), weight * runs.values)
    return Runs(run, index, total)


def _in_memory(W: Tensor, edit: Sparse, wide: torch.dtype) -> Runs:
    """A sparse edit's values where they lie in W's memory."""
    rows, columns = W.shape
    positions = edit.granularity.flat((rows, columns), edit.index)
    if W.is_contiguous():
        run = edit.granularity.run((rows, columns))
        first = positions.reshape(-1, run)[:, 0] // run
    else:
        run, positions = 1, positions.reshape(-1)
        first = (positions % columns) * rows + positions // columns
    values = edit.values.to(wide).reshape(-1, run)
    if bool((first.diff() > 0).all()):
        return Runs(run, first, values)
    index, order = first.sort()
    return Runs(run, index, values[order])
