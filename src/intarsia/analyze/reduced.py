"""A change as one of three: elements, low rank or dense. What follows is then written for three kinds, not for all.

O out_features, I in_features, r rank, k entries.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from intarsia.analyze.spectrum import change_of
from intarsia.edits import Dense, Edit, LowRank, Sparse, add, elements, scale, to_dense
from intarsia.errors import IntarsiaError
from intarsia.support import Element

Reduced = Sparse | LowRank | Dense


def reduced(edit: Edit, weight: Tensor | None = None, factor: float = 1.0) -> Reduced:
    """``factor`` times the change, as elements, low rank or dense, in float32 or wider; the edit itself is left alone.

    Sparse edits of every granularity become elements, and sums of them too. ``weight`` (O, I): what edits with
    ``needs_weight`` depend on.

    Raises:
        IntarsiaError: where the weight is needed and not given, and for numbers that are not finite.
    """
    found = _reduced(edit, weight)
    if factor != 1:
        scaled = scale(found, factor)
        assert isinstance(scaled, Sparse | LowRank | Dense)
        found = scaled
    for name, tensor in found.tensors().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise IntarsiaError(f"{name} has {bad} numbers that are not finite (NaN or infinity)")
    return found


def _reduced(edit: Edit, weight: Tensor | None) -> Reduced:
    parts = edit.sparse_parts()
    if parts is not None:
        flat = [_elements(part) for part in parts]
        whole = flat[0] if len(flat) == 1 else add(*flat)
        assert isinstance(whole, Sparse)
        return whole
    low = edit.low_rank()
    # Beyond half the width two factors are no less work than the matrix.
    if low is not None and 2 * low.A.shape[0] <= min(edit.shape):
        return LowRank(edit.shape, _wide(low.B), _wide(low.A), low.scale)
    if edit.needs_weight:
        return Dense(edit.shape, change_of(edit, weight))
    widest = functools.reduce(torch.promote_types, (t.dtype for t in edit.tensors().values()), torch.float32)
    return Dense(edit.shape, to_dense(edit, dtype=widest))


def _elements(edit: Sparse) -> Sparse:
    if isinstance(edit.granularity, Element):
        return elements(edit.shape, edit.index, _wide(edit.values))
    index, order = edit.granularity.flat(edit.shape, edit.index).reshape(-1).sort()
    return elements(edit.shape, index, _wide(edit.values).reshape(-1)[order])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def transposed(change: Reduced) -> Reduced:
    """The change of the transposed weight. (O, I) -> (I, O)."""
    rows, columns = change.shape
    shape = (columns, rows)
    if isinstance(change, LowRank):
        return LowRank(shape, change.A.mT, change.B.mT, change.scale)
    if isinstance(change, Dense):
        return Dense(shape, change.values.mT)
    index, order = ((change.index % columns) * rows + change.index // columns).sort()
    return elements(shape, index, change.values[order])


def square(change: Reduced) -> float:
    """||D||_F^2, summed in float64."""
    if isinstance(change, LowRank):
        return inner(change, change)
    return float(change.values.double().square().sum())


def weighted_square(change: Reduced, inputs: Tensor) -> float:
    """||D diag(inputs)||_F^2: how much the outputs move, where inputs (I,) are the root mean squares of what comes in."""
    squares = inputs.double().square()
    if isinstance(change, Sparse):
        return float((change.values.double().square() * squares[change.index % change.shape[1]]).sum())
    if isinstance(change, Dense):
        return float((change.values.double().square() * squares).sum())
    A, B = change.A.double(), change.B.double()
    return change.scale**2 * float(((B.mT @ B) * ((A * squares) @ A.mT)).sum())


def inner(one: Reduced, other: Reduced) -> float:
    """<D1, D2>, the sum of the products of their entries, in float64. Factors are not multiplied out."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        left, right = one.B.mT.double() @ other.B.double(), one.A.double() @ other.A.mT.double()  # (r1, r2) both
        return one.scale * other.scale * float((left * right).sum())
    if isinstance(one, Sparse) and isinstance(other, Sparse):
        mine, its = common(one, other)
        return float(one.values[mine].double() @ other.values[its].double())
    if isinstance(one, Sparse):
        assert not isinstance(other, Sparse)
        return float(one.values.double() @ values_at(other, one.index).double())
    if isinstance(other, Sparse):
        return inner(other, one)
    return float((_dense(one).double() * _dense(other).double()).sum())


def common(one: Sparse, other: Sparse) -> tuple[Tensor, Tensor]:
    """Where the entries stand that both can change: (places in ``one``, places in ``other``), alike in order."""
    if len(one.index) > len(other.index):
        its, mine = common(other, one)
        return mine, its
    if not len(one.index):
        return one.index, other.index
    places = torch.searchsorted(other.index, one.index).clamp_max(len(other.index) - 1)
    mine = (other.index[places] == one.index).nonzero().squeeze(1)
    return mine, places[mine]


def values_at(change: LowRank | Dense, index: Tensor) -> Tensor:
    """The change at flat positions row * I + column, without the rest of the matrix. (k,) -> (k,)."""
    if isinstance(change, Dense):
        return change.values.reshape(-1)[index]
    rows, columns = index // change.shape[1], index % change.shape[1]
    found = change.B.new_zeros(len(index), dtype=torch.promote_types(change.B.dtype, change.A.dtype))
    for i in range(change.A.shape[0]):  # term by term: (k, r) of many entries would be larger than the matrix
        found += change.B[rows, i] * change.A[i, columns]
    return change.scale * found


def rows_of(change: LowRank | Dense, start: int, stop: int) -> Tensor:
    """Some rows of the change. -> (stop - start, I)."""
    if isinstance(change, Dense):
        return change.values[start:stop]
    return change.scale * (change.B[start:stop] @ change.A)


def _dense(change: LowRank | Dense) -> Tensor:
    return rows_of(change, 0, change.shape[0])
