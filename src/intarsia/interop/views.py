"""An edit in another one's terms: what other formats can hold is low rank, or single elements.

Low rank and sparse is what says so of itself; rows and columns are low rank besides. A text says why there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.edits import Edit, LowRank, Sparse, Sum, add, elements, joined, scale
from intarsia.support import Column, Row

View = LowRank | Sparse


def as_low_rank(edit: Edit) -> LowRank | str:
    """The same change as B A, exactly; or why it is none."""
    if (found := edit.low_rank()) is not None:
        return found
    if isinstance(edit, Sum):
        return _beside(edit)
    return _slices(edit) if isinstance(edit, Sparse) else f"{edit.kind} edits are not of low rank"


def as_elements(edit: Edit) -> Sparse | str:
    """The same change as single entries, exactly; or why it has none."""
    parts = edit.sparse_parts()
    if parts is None:
        return f"{edit.kind} edits change every entry"
    total = add(*parts)
    assert isinstance(total, Sparse)  # as the sum of sparse edits is
    where = total.granularity.flat(total.shape, total.index).reshape(-1)
    order = where.argsort()
    return elements(total.shape, where[order], total.values.reshape(-1)[order])


# ------------------------------------------------------------------ as low rank
def _slices(edit: Sparse) -> LowRank | str:
    unit = edit.granularity
    if not isinstance(unit, Row | Column):
        return f"{edit.kind} are not of low rank"
    (rows, columns), index = edit.shape, unit.spread(edit.index)
    places = torch.arange(len(index), device=index.device)
    if isinstance(unit, Row):
        return LowRank(edit.shape, _one_hot(edit.values, (rows, len(index)), index, places), edit.values, 1.0)
    return LowRank(edit.shape, edit.values, _one_hot(edit.values, (len(index), columns), places, index), 1.0)


def _one_hot(like: Tensor, shape: tuple[int, int], rows: Tensor, columns: Tensor) -> Tensor:
    return like.new_zeros(shape).index_put((rows, columns), like.new_ones(()))


def _beside(edit: Sum) -> LowRank | str:
    parts = [as_low_rank(scale(part, factor)) for part, factor in zip(edit.parts, edit.factors, strict=True)]
    if faults := [part for part in parts if isinstance(part, str)]:
        return faults[0]
    return joined([part for part in parts if isinstance(part, LowRank)])
