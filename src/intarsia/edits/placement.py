"""Placements: the new bits that one or several edits give a weight, and where. The step between edits and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.edits.edit import Edit, Sparse
from intarsia.errors import IntarsiaError
from intarsia.support import Granularity


@dataclass(frozen=True)
class Placement:
    """Bits for a part of a weight: units ``index`` of a granularity, or the whole weight where granularity is None."""

    granularity: Granularity | None
    index: Tensor | None
    bits: Tensor

    def read(self, W: Tensor) -> Placement:
        """The bits that stand in W now at the same place: a copy."""
        if self.granularity is None or self.index is None:
            return Placement(None, None, W.detach().clone())
        return Placement(self.granularity, self.index, self.granularity.gather(W.detach(), self.index))

    def write(self, W: Tensor) -> None:
        """Set the bits into W, in place."""
        with torch.no_grad():
            if self.granularity is None or self.index is None:
                W.copy_(self.bits)
            else:
                self.granularity.put(W, self.index, self.bits)


def place(name: str, W: Tensor, terms: Sequence[tuple[float, Edit]]) -> Placement:
    """W + sum_i w_i (fold_i(W) - W), computed in float32 or wider, rounded to W's dtype once.

    Sparse edits of one granularity are summed on the union of their supports, and only that is placed.

    Raises:
        IntarsiaError: where a result is not finite in W's dtype.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    sparse = [(weight, edit) for weight, edit in terms if isinstance(edit, Sparse)]
    if len(sparse) == len(terms) and len({edit.granularity for _, edit in sparse}) == 1:
        granularity = sparse[0][1].granularity
        index, total = _union(sparse, wide)
        bits = (granularity.gather(W.detach(), index).to(wide) + total).to(W.dtype)
        placement = Placement(granularity, index, bits)
    else:
        base = W.detach().to(wide)
        total = torch.zeros_like(base)
        for weight, edit in terms:
            total += weight * edit.delta(base)
        placement = Placement(None, None, (base + total).to(W.dtype))
    if not bool(placement.bits.isfinite().all()):
        raise IntarsiaError(
            f"{name}: setting in would write numbers that are not finite in {W.dtype}; "
            "the strength is too large or the adapter is broken. Nothing was changed"
        )
    return placement


def _union(terms: Sequence[tuple[float, Sparse]], wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Union of the supports, and the weighted sum of the values on it."""
    if len(terms) == 1:
        weight, edit = terms[0]
        return edit.index, weight * edit.values.to(wide)
    index = torch.cat([edit.index for _, edit in terms]).unique()
    unit, shape = terms[0][1].granularity, terms[0][1].shape
    total = torch.zeros(unit.values_shape(shape, len(index)), dtype=wide, device=index.device)
    for weight, edit in terms:
        places = unit.spread(torch.searchsorted(index, edit.index))
        total.index_add_(unit.axis, places, weight * edit.values.to(wide))
    return index, total
