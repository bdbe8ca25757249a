"""The algebra of edits, over every kind: scale, sum, overlap, the dense change.

Setting in and taking out are :func:`intarsia.edits.place` and what it placed; ``bytes`` and ``touched`` are the edit's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from intarsia.edits.dense import Dense
from intarsia.edits.edit import Edit, LowRank, Sparse, elements
from intarsia.edits.structured import BlockAffine, Multiplied, Tiled
from intarsia.edits.sum import Sum
from intarsia.errors import IntarsiaError


# ------------------------------------------------------------------ scale
def scale(edit: Edit, factor: float) -> Edit:
    """The edit whose change is ``factor`` times this one's, on every weight: W' = W + factor (fold(W) - W); of an insert,

    y' = y + factor (y' - y).

    Raises:
        IntarsiaError: for a factor that is not a finite number.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        raise IntarsiaError(f"an edit cannot be scaled by {factor!r}; expected a finite number")
    return _scale(edit, float(factor))


@singledispatch
def _scale(edit: Edit, factor: float) -> Edit:
    if hasattr(edit, "scale"):  # a factor in front of its change
        return replace(edit, scale=factor * edit.scale)  # type: ignore[call-arg]
    # Its change is no linear function of its own numbers, as that of a length for every row.
    return Sum(edit.shape, (edit,), (factor,))


@_scale.register
def _(edit: Sparse, factor: float) -> Edit:
    return replace(edit, values=factor * edit.values)


@_scale.register
def _(edit: Dense, factor: float) -> Edit:
    return replace(edit, values=factor * edit.values)


@_scale.register
def _(edit: Tiled, factor: float) -> Edit:
    return replace(edit, D=factor * edit.D)


@_scale.register
def _(edit: BlockAffine, factor: float) -> Edit:
    return replace(edit, B=factor * edit.B)


@_scale.register
def _(edit: Multiplied, factor: float) -> Edit:
    if not edit.one:  # W * D - W is no multiple of D
        return Sum(edit.shape, (edit,), (factor,))
    return replace(edit, inner=scale(edit.inner, factor))


@_scale.register
def _(edit: Sum, factor: float) -> Edit:
    return replace(edit, factors=tuple(factor * one for one in edit.factors))


# ------------------------------------------------------------------ sum
def add(*edits: Edit) -> Edit:
    """One edit whose change is the sum of theirs: W' = W + sum_i (fold_i(W) - W).

    Sparse ones give a sparse one on the union of their supports, exactly: of their own granularity where it is the same,
    else of elements. Low ranks give a low rank, of the ranks together; dense ones a dense one; mixtures a :class:`Sum` of these.
    Of inserts, each adds to the layer's own output what it adds alone.

    Raises:
        IntarsiaError: for none at all, or different shapes.
    """
    if not edits:
        raise IntarsiaError("there is nothing to add up; give at least one edit")
    shapes = {tuple(edit.shape) for edit in edits}
    if len(shapes) > 1:
        raise IntarsiaError(f"edits of different shapes cannot be added: {', '.join(map(str, sorted(shapes)))}")
    if len(edits) == 1:
        return edits[0]
    parts = [part for edit in edits for part in _parts(edit)]
    sparse = [part.sparse_parts() for part in parts]
    low = [one for part in parts if (one := part.low_rank()) is not None]
    dense = [part for part in parts if isinstance(part, Dense)]
    rest = [
        part
        for part, its in zip(parts, sparse, strict=True)
        if its is None and part.low_rank() is None and not isinstance(part, Dense)
    ]
    thin = [part for its in sparse for part in its or ()]
    together = [_union(thin)] if thin else []
    total = [*together, *([_stacked(low)] if low else []), *([_total(dense)] if dense else []), *rest]
    if len(total) == 1:
        return total[0]
    split = [pair for one in total for pair in _pairs(one)]
    return Sum(edits[0].shape, tuple(part for part, _ in split), tuple(factor for _, factor in split))


def _pairs(edit: Edit) -> list[tuple[Edit, float]]:
    return list(zip(edit.parts, edit.factors, strict=True)) if isinstance(edit, Sum) else [(edit, 1.0)]


def _parts(edit: Edit) -> list[Edit]:
    """What a sum is made of, each with its factor in it: of what cannot be scaled a sum of one."""
    found: list[Edit] = []
    for part, factor in _pairs(edit):
        one = part if factor == 1 else scale(part, factor)
        unscaled = isinstance(one, Sum) and one.parts == (part,)
        found += _parts(one) if isinstance(one, Sum) and not unscaled else [one]
    return found


def _total(edits: Sequence[Dense]) -> Dense:
    dtype = _dtype([edit.values for edit in edits])
    total = edits[0].values.to(dtype)
    for edit in edits[1:]:
        total = total + edit.values
    return replace(edits[0], values=total)


def _union(parts: Sequence[Sparse]) -> Sparse:
    if len(parts) == 1:
        return parts[0]
    if len({part.granularity for part in parts}) > 1:
        parts = [_as_elements(part) for part in parts]
    unit, shape, dtype = parts[0].granularity, parts[0].shape, _dtype([part.values for part in parts])
    index = torch.cat([part.index for part in parts]).unique()
    total = torch.zeros(unit.values_shape(shape, len(index)), dtype=dtype, device=index.device)
    for part in parts:
        total.index_add_(unit.axis, unit.spread(torch.searchsorted(index, part.index)), part.values.to(dtype))
    return Sparse(shape, unit, index, total)


def _as_elements(edit: Sparse) -> Sparse:
    index, order = edit.granularity.flat(edit.shape, edit.index).reshape(-1).sort()
    return elements(edit.shape, index, edit.values.reshape(-1)[order])


def _stacked(edits: Sequence[LowRank]) -> LowRank:
    if len(edits) == 1:
        return edits[0]
    dtype = _dtype([t for edit in edits for t in (edit.A, edit.B)])
    B = torch.cat([edit.scale * edit.B.to(dtype) for edit in edits], dim=1)
    return LowRank(edits[0].shape, B, torch.cat([edit.A.to(dtype) for edit in edits]), 1.0)


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Of a sum: the widest of its parts', float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


# ------------------------------------------------------------------ looking
def positions(edit: Edit) -> Tensor | None:
    """Flat positions row * I + column that the edit can change, ascending; None for all of them."""
    within = edit.in_weight()
    if within is None:
        return torch.empty(0, dtype=torch.int64)
    parts = within.sparse_parts()
    if parts is None:
        return None
    entries = torch.cat([part.granularity.flat(part.shape, part.index).reshape(-1) for part in parts])
    found: Tensor = entries.unique()
    return found


def overlap(one: Edit, other: Edit) -> int:
    """How many entries both can change.

    Raises:
        IntarsiaError: for different shapes.
    """
    if tuple(one.shape) != tuple(other.shape):
        raise IntarsiaError(f"edits of {tuple(one.shape)} and {tuple(other.shape)} have no entries in common")
    first, second = positions(one), positions(other)
    if first is None or second is None:
        rest = second if first is None else first
        return len(rest) if rest is not None else one.shape[0] * one.shape[1]
    return int(torch.isin(first, second, assume_unique=True).sum())


def to_dense(edit: Edit, W: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole change, (O, I). ``W``: the weight, which edits with ``needs_weight`` depend on.

    Raises:
        IntarsiaError: where the weight is needed and not given, or has another shape, and for an insert, which has none.
    """
    if W is None and edit.needs_weight:
        raise IntarsiaError(f"what a {edit.kind} edit changes depends on the weight: to_dense(edit, W)")
    if W is not None and tuple(W.shape) != tuple(edit.shape):
        raise IntarsiaError(f"the weight is {tuple(W.shape)}; the edit is of {tuple(edit.shape)}")
    return edit.delta(torch.zeros(edit.shape, dtype=dtype) if W is None else W.detach().to(dtype))
