"""An edit in another one's terms: what other formats can hold is low rank, or single elements.

One table a view, by the class of the edit; a class that is not in it has no such view. A text says why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.edits import Edit, Kernel, LowRank, Sparse, Sum, elements
from intarsia.support import Column, Row

View = LowRank | Sparse


def as_low_rank(edit: Edit) -> LowRank | str:
    """The same change as B A, exactly; or why it is none."""
    found = LOW_RANK.get(type(edit), lambda edit: f"{edit.kind} edits are not of low rank")(edit)
    return found


def as_elements(edit: Edit) -> Sparse | str:
    """The same change as single entries, exactly; or why it has none."""
    found = ELEMENTS.get(type(edit), lambda edit: f"{edit.kind} edits change every entry")(edit)
    return found


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
    parts = [as_low_rank(part) for part in edit.parts]
    if faults := [part for part in parts if isinstance(part, str)]:
        return faults[0]
    return joined([part for part in parts if isinstance(part, LowRank)])


def joined(parts: Sequence[LowRank]) -> LowRank:
    """The sum of low-rank edits as one, the ranks side by side. Scales that differ go into B."""
    scales = {part.scale for part in parts}
    parts = list(parts) if len(scales) == 1 else [without_scale(part) for part in parts]
    dtype = parts[0].B.dtype
    for part in parts:
        dtype = torch.promote_types(torch.promote_types(dtype, part.B.dtype), part.A.dtype)
    B = torch.cat([part.B.to(dtype) for part in parts], dim=1)
    return LowRank(parts[0].shape, B, torch.cat([part.A.to(dtype) for part in parts]), parts[0].scale)


def without_scale(edit: LowRank) -> LowRank:
    """The same with the scale multiplied into B, which is then rounded once to its dtype."""
    return LowRank(edit.shape, (edit.B.double() * edit.scale).to(edit.B.dtype), edit.A, 1.0)


LOW_RANK: dict[type[Edit], Callable[[Any], LowRank | str]] = {
    LowRank: lambda edit: edit,
    Sparse: _slices,
    Sum: _beside,
}


# ------------------------------------------------------------------ as elements
def _entries(edit: Sparse) -> Sparse:
    where = edit.granularity.flat(edit.shape, edit.index).reshape(-1)
    order = where.argsort()
    return elements(edit.shape, where[order], edit.values.reshape(-1)[order])


def _union(edit: Sum) -> Sparse | str:
    found = [as_elements(part) for part in edit.parts]
    if faults := [part for part in found if isinstance(part, str)]:
        return faults[0]
    parts = [part for part in found if isinstance(part, Sparse)]
    index = torch.cat([part.index for part in parts]).unique()
    dtype = parts[0].values.dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.values.dtype)
    total = torch.zeros(len(index), dtype=dtype, device=index.device)
    for part in parts:  # one after the other, as the sum itself adds
        total.index_add_(0, torch.searchsorted(index, part.index), part.values.to(dtype))
    return elements(edit.shape, index, total)


ELEMENTS: dict[type[Edit], Callable[[Any], Sparse | str]] = {
    Sparse: _entries,
    Sum: _union,
    Kernel: Kernel.sparse,
}
