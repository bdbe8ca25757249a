"""Rules that look at every entry by itself: each edit is thinned out, signs may be elected, and the rest is added up.

    thin_i = thin(D_i),   s = sign(sum_i w_i thin_i),   D = lambda sum_i [sign = s] w_i thin_i  (/ the weights that take part)

D_i are the entries that edit i can change, on the union of the supports of all: a sparse edit stays sparse, and its density
is a share of its own support. Other edits are multiplied out, and what comes of them is dense, or of ``rank``.
Shapes: n entries of the union (O I of a dense edit), m adapters.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.edits import Dense, Edit, LowRank, Sparse, elements
from intarsia.errors import IntarsiaError
from intarsia.interop.approximation import best
from intarsia.interop.views import as_elements
from intarsia.merge.rule import Merged, Rule, Term, Where, each, wide
from intarsia.method import option
from intarsia.support import Granularity, Shape

ELECTIONS = ("none", "total", "frequency")


@dataclass(frozen=True)
class Entries:
    """The entries of one weight that some edit can change, and what each adds there.

    Attributes:
        index: (n,) flat positions row * I + column, ascending; None for all of the weight.
        changes: (m, n); 0 where an edit cannot change an entry.
        able: (m, n), whether it can.
        granularity: what all the edits are made of, where that is the same; None otherwise.
    """

    shape: Shape
    index: Tensor | None
    changes: Tensor
    able: Tensor
    granularity: Granularity | None = None

    @property
    def rows(self) -> Tensor:
        """The row of each entry. -> (n,) int64."""
        index = torch.arange(self.shape[0] * self.shape[1]) if self.index is None else self.index
        return index // self.shape[1]

    @property
    def positions(self) -> Tensor:
        """The flat position of each entry. -> (n,) int64."""
        return torch.arange(self.shape[0] * self.shape[1]) if self.index is None else self.index


@dataclass(frozen=True)
class Elementwise(Rule):
    """Thin out, elect signs, add up. A subclass says how an edit is thinned out."""

    density: float = each(0.5, "share of an edit's entries that is kept")
    elect: str = option(
        "none", "signs by which entries take part: none: all do, total: that of the sum, frequency: of the most"
    )
    normalize: bool = option(False, "divide by the sum of the weights (under an election: of those that take part)")
    rank: int | None = option(None, "where the result is dense: write its best approximation of this rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.density <= 1, "density", "from 0 to 1")
        self.require(self.elect in ELECTIONS, "elect", f"one of {', '.join(ELECTIONS)}")
        self.require(self.rank is None or self.rank >= 1, "rank", "1 or more")

    @abstractmethod
    def thin(self, own: Tensor, rows: Tensor, positions: Tensor, key: int) -> Tensor:
        """What is kept of one edit: the entries that it can change, of which some become 0. (n,) -> (n,).

        ``rows`` and ``positions`` (n,) say where they stand; ``key`` is this weight's and this adapter's.
        """

    def merge(self, terms: Sequence[Term], where: Where) -> Merged:
        entries = aligned([term.edit for term in terms])
        kept = torch.zeros_like(entries.changes)
        for row, (term, change, able) in enumerate(zip(terms, entries.changes, entries.able, strict=True)):
            at = able.nonzero().squeeze(1)
            kept[row, at] = term.rule.thin(change[at], entries.rows[at], entries.positions[at], where.key(term.adapter))
        weights = torch.tensor([term.weight for term in terms], dtype=kept.dtype)[:, None]
        return self._edit(entries, self._added(weights * kept, weights, where))

    def _added(self, parts: Tensor, weights: Tensor, where: Where) -> Tensor:
        """(m, n) weighted changes, (m, 1) weights -> (n,)."""
        if self.elect == "none":
            total = parts.sum(0)
            return total / total_weight(where) if self.normalize else total
        elected = parts.sum(0) if self.elect == "total" else parts.sign().sum(0)
        agree = parts.sign() == torch.where(elected >= 0, 1, -1)  # a tie is positive, as in the authors' code
        total = (parts * agree).sum(0)
        if not self.normalize:
            return total
        share = (weights * agree).sum(0)
        return total / torch.where(share == 0, 1, share)

    def _edit(self, entries: Entries, total: Tensor) -> Merged:
        if entries.index is not None:
            return Merged(_sparse(entries, total))
        D = total.view(entries.shape)
        if self.rank is None:
            return Merged(Dense(entries.shape, D))
        B, A, error = best(D, self.rank)
        return Merged(LowRank(entries.shape, B, A, 1.0), error**2, float(D.double().square().sum()))


def total_weight(where: Where) -> float:
    """The sum of the weights, to divide by. Raises IntarsiaError where it is 0, or no number."""
    if not 1e-8 <= abs(where.total) < math.inf:
        raise IntarsiaError(
            f"{where.name}: the weights sum to {where.total:g}, and normalize divides by that; change them, or set "
            "normalize: false"
        )
    return where.total


def aligned(edits: Sequence[Edit]) -> Entries:
    """Several edits of one weight entry by entry, in the widest of their types and float32 at least."""
    shape = edits[0].shape
    dtype = wide(*edits)
    sparse = [as_elements(edit) for edit in edits]
    if any(isinstance(one, str) for one in sparse):
        zeros = torch.zeros(shape, dtype=dtype)
        changes = torch.stack([edit.delta(zeros).reshape(-1) for edit in edits])
        return Entries(shape, None, changes, torch.ones_like(changes, dtype=torch.bool))
    own = [one for one in sparse if isinstance(one, Sparse)]
    index = torch.cat([one.index for one in own]).unique()
    changes = torch.zeros(len(own), len(index), dtype=dtype)
    able = torch.zeros_like(changes, dtype=torch.bool)
    for row, one in enumerate(own):
        at = torch.searchsorted(index, one.index)
        changes[row, at] = one.values.to(dtype)
        able[row, at] = True
    units = {edit.granularity if isinstance(edit, Sparse) else None for edit in edits}
    return Entries(shape, index, changes, able, units.pop() if len(units) == 1 else None)


def _sparse(entries: Entries, total: Tensor) -> Sparse:
    """The entries that are not 0, as elements, or in the units that all edits have where that takes no more bytes."""
    assert entries.index is not None
    left = total.nonzero().squeeze(1)
    single = elements(entries.shape, entries.index[left], total[left])
    unit = entries.granularity
    if unit is None or unit.size(entries.shape) == 1:
        return single
    units = _units(unit, entries.shape, single.index)
    whole = Sparse(entries.shape, unit, units, total.new_zeros(unit.values_shape(entries.shape, len(units))))
    positions = unit.flat(entries.shape, units)
    at = torch.searchsorted(entries.index, positions.reshape(-1))
    filled = Sparse(entries.shape, unit, units, total[at].view(whole.values.shape))
    return filled if filled.bytes <= single.bytes else single


def _units(unit: Granularity, shape: Shape, positions: Tensor) -> Tensor:
    """The units in which these entries stand, ascending. -> (k,)."""
    at = torch.zeros(shape[0] * shape[1]).index_fill(0, positions, 1.0).view(shape)
    found: Tensor = unit.reduce(at).nonzero().squeeze(1)
    return found
