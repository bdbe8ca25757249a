"""The product D1^T D2 of two changes of one weight: how far they write into the same outputs, and which pairs of inputs meet.

With the changes transposed it is D1 D2^T: how far they read the same inputs. Shapes: O out_features, I in_features, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from intarsia.analyze.reduced import Reduced, reduced, rows_of
from intarsia.analyze.spectrum import singular_values
from intarsia.edits import Edit, LowRank, Sparse
from intarsia.errors import IntarsiaError

THRESHOLD = 0.3  # of the largest singular value: what lies below it does not count as a direction of the change
BLOCK = 2**24  # entries of a product that are in memory at once
WORK = 2**22  # multiplications of entry by entry that are in memory at once
DENSE_GAIN = 500  # multiplications that a dense product does in the time of one of entry by entry; measured on a CPU


# ------------------------------------------------------------------ what the SHiRA paper measures
def awom(one: Edit, other: Edit, weight: Tensor | None = None, *, spectral: bool = False) -> float:
    """Adapter weight orthogonality magnitude: ||D1^T D2||, of Frobenius, or the spectral one. 0 for orthogonal outputs.

    Bhardwaj et al. 2024, arXiv:2406.13175, sec. 3.2. ``weight``: see :func:`intarsia.analyze.change_of`.

    Raises:
        IntarsiaError: for different shapes, and where the weight is needed and not given.
    """
    first, second = _alike(one, other, weight)
    if spectral:
        return spectral_norm(directions(first), directions(second))
    return math.sqrt(product(first, second).square)


def awor(one: Edit, other: Edit, weight: Tensor | None = None) -> float:
    """Adapter weight orthogonality ratio: 1 - nnz(D1^T D2) / I^2, the share of zeros in the product, 0..1.

    Zeros are counted by the supports: an entry that happens to cancel counts as nonzero. The same source as :func:`awom`.
    """
    first, second = _alike(one, other, weight)
    return 1 - product(first, second).nonzero / first.shape[1] ** 2


def _alike(one: Edit, other: Edit, weight: Tensor | None) -> tuple[Reduced, Reduced]:
    if tuple(one.shape) != tuple(other.shape):
        raise IntarsiaError(f"edits of {tuple(one.shape)} and {tuple(other.shape)} are not of one weight")
    return reduced(one, weight), reduced(other, weight)


# ------------------------------------------------------------------ by kinds
@dataclass(frozen=True)
class Product:
    """What is kept of D1^T D2: ||.||_F^2, and how many of its I^2 entries are not 0 by the supports."""

    square: float
    nonzero: int


def product(one: Reduced, other: Reduced, *, count: bool = True) -> Product:
    """D1^T D2 by the quickest way for the kinds. ``count=False`` leaves the nonzero entries uncounted, at 0."""
    if isinstance(one, LowRank):
        return _of_factors(one, other, count)
    if isinstance(other, LowRank):
        return _of_factors(other, one, count)  # the transpose, alike in norm and zeros
    if isinstance(one, Sparse) and isinstance(other, Sparse):
        return _of_elements(one, other, count)
    return _in_blocks(_matrix(one), _matrix(other), count)


def _of_factors(one: LowRank, other: Reduced, count: bool) -> Product:
    """A^T (B^T D2): the square is <A A^T, N N^T> with N = B^T D2 (r, I). In float64: the factors are thin."""
    A, B = one.A.double(), one.B.double()
    if isinstance(other, LowRank):
        middle = other.scale * (B.mT @ other.B.double())  # (r1, r2)
        N_square = middle @ (other.A.double() @ other.A.double().mT) @ middle.mT
    elif isinstance(other, Sparse):
        N = _gathered(B, other, other.values.double())
        N_square = N @ N.mT
    else:
        N = (one.B.mT.to(other.values.dtype) @ other.values).double()
        N_square = N @ N.mT
    square = one.scale**2 * float(((A @ A.mT) * N_square).sum())
    return Product(max(square, 0.0), _count_of_factors(one, other) if count else 0)


def _gathered(B: Tensor, change: Sparse, values: Tensor) -> Tensor:
    """B^T D of a sparse D with these values, term by term. (O, r), (k,) -> (r, I)."""
    rows, columns = change.index // change.shape[1], change.index % change.shape[1]
    found = values.new_zeros(B.shape[1], change.shape[1])
    for i in range(B.shape[1]):
        found[i].index_add_(0, columns, B[rows, i] * values)
    return found


def _count_of_factors(one: LowRank, other: Reduced) -> int:
    """Nonzero entries of A^T N by their zeros. Inputs whose column of A is zero in the same places are counted together."""
    B = (one.B != 0).float()
    if isinstance(other, LowRank):
        met = B.mT @ (other.B != 0).float() @ (other.A != 0).float()
    elif isinstance(other, Sparse):
        met = _gathered(B, other, torch.ones_like(other.values, dtype=B.dtype))
    else:
        met = B.mT @ (other.values != 0).float()
    (left, many), (right, often) = _patterns(one.A != 0), _patterns(met > 0)
    return int((((left.mT @ right) > 0) * many[:, None] * often).sum())


def _patterns(there: Tensor) -> tuple[Tensor, Tensor]:
    """The different columns, and how often each is there. (r, I) -> (r, n), (n,)."""
    if bool(there.all()):  # of most factors; looking for different ones takes a while
        return there[:, :1].float(), torch.tensor([there.shape[1]], device=there.device)
    found, often = there.float().unique(dim=1, return_counts=True)
    return found, often


def _of_elements(one: Sparse, other: Sparse, count: bool) -> Product:
    """Only rows that both change matter, and in them only the columns that are there."""
    O, I = one.shape
    rows = one.index // I, other.index // I
    each = [torch.bincount(r, minlength=O) for r in rows]
    both = (each[0] > 0) & (each[1] > 0)
    work = int((each[0] * each[1]).sum())  # multiplications of entry by entry
    if not work:
        return Product(0.0, 0)
    X, Y = _packed(one, rows[0], both), _packed(other, rows[1], both)
    if X.height * X.width * Y.width < DENSE_GAIN * work:
        return _in_blocks(X.dense(), Y.dense(), count, (X.dense(pattern=True), Y.dense(pattern=True)))
    pieces = min(X.width, 1 + max(work // WORK, X.width * Y.width // BLOCK))
    square, nonzero = 0.0, 0
    for low, high in pairwise(X.width * piece // pieces for piece in range(pieces + 1)):
        found, there = _entry_by_entry(X.columns_between(low, high), Y, count)
        square += found
        nonzero += there
    return Product(square, nonzero)


@dataclass(frozen=True, eq=False)
class _Packed:
    """Entries by row and column, ascending, of a matrix without empty rows and columns."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    height: int
    width: int

    def dense(self, pattern: bool = False) -> Tensor:
        found = self.values.new_zeros(self.height, self.width)
        found[self.rows, self.columns] = torch.ones_like(self.values) if pattern else self.values
        return found

    def columns_between(self, low: int, high: int) -> _Packed:
        if (low, high) == (0, self.width):
            return self
        kept = (self.columns >= low) & (self.columns < high)
        return _Packed(self.rows[kept], self.columns[kept] - low, self.values[kept], self.height, high - low)


def _packed(change: Sparse, rows: Tensor, both: Tensor) -> _Packed:
    """The rows in ``both`` of a change."""
    kept = both[rows]
    columns = change.index[kept] % change.shape[1]
    there = torch.zeros(change.shape[1], dtype=torch.bool, device=columns.device)
    there[columns] = True
    rows, columns = both.cumsum(0)[rows[kept]] - 1, there.cumsum(0)[columns] - 1
    return _Packed(rows, columns, change.values[kept], int(both.sum()), int(there.sum()))


def _entry_by_entry(X: _Packed, Y: _Packed, count: bool) -> tuple[float, int]:
    """X^T Y, every entry of X times every one of Y in the same row. -> (||.||_F^2, entries that any product falls on)."""
    many = torch.bincount(Y.rows, minlength=Y.height)
    times = many[X.rows]  # how many partners each entry of X has
    first = (many.cumsum(0) - many)[X.rows] - (times.cumsum(0) - times)
    one = torch.repeat_interleave(torch.arange(len(times), device=times.device), times)
    other = first[one] + torch.arange(len(one), device=times.device)
    place = (X.columns * Y.width)[one] + Y.columns[other]
    P = X.values.new_zeros(X.width * Y.width).index_add_(0, place, X.values[one] * Y.values[other])
    there = place.new_zeros(len(P) if count else 0, dtype=torch.bool)
    if count:
        there[place] = True
    return float(P @ P), int(there.count_nonzero())


def _in_blocks(X: Tensor, Y: Tensor, count: bool, patterns: tuple[Tensor, Tensor] | None = None) -> Product:
    """X^T Y of dense matrices, some columns of X at a time; ``patterns``: 1 where they can differ from 0, else 0."""
    dtype = torch.promote_types(X.dtype, Y.dtype)
    X, Y = X.to(dtype), Y.to(dtype)
    mine, its = patterns or ((X != 0).to(dtype), (Y != 0).to(dtype))
    square, nonzero, width = 0.0, 0, max(1, BLOCK // max(1, Y.shape[1]))
    for start in range(0, X.shape[1], width):
        piece = slice(start, start + width)
        P = (X[:, piece].mT @ Y).reshape(-1)
        square += float(P @ P)
        nonzero += int((mine[:, piece].mT @ its.to(mine.dtype)).count_nonzero()) if count else 0
    return Product(square, nonzero)


def _matrix(change: Reduced) -> Tensor:
    if isinstance(change, Sparse):
        return change.delta(torch.zeros(change.shape, dtype=change.values.dtype))
    return rows_of(change, 0, change.shape[0])


# ------------------------------------------------------------------ by singular vectors
@dataclass(frozen=True, eq=False)
class Directions:
    """The singular vectors and values of a change: D = U diag(s) V^T, U (O, n), V (I, n)."""

    U: Tensor
    s: Tensor
    V: Tensor


def directions(change: Reduced) -> Directions:
    """Singular value decomposition; of low rank by its factors, never multiplied out. The expensive one: O I min(O, I)."""
    if isinstance(change, LowRank):
        Q, R = torch.linalg.qr(change.B)
        P, S = torch.linalg.qr(change.A.mT)
        u, s, vt = torch.linalg.svd(change.scale * (R @ S.mT), full_matrices=False)
        return Directions(Q @ u, s, P @ vt.mT)
    D = _matrix(change)
    rows, columns = (D.any(dim=axis).nonzero().squeeze(1) for axis in (1, 0))
    u, s, vt = torch.linalg.svd(D[rows][:, columns], full_matrices=False)
    U, V = D.new_zeros(D.shape[0], len(s)), D.new_zeros(D.shape[1], len(s))
    U[rows], V[columns] = u, vt.mT
    return Directions(U, s, V)


def spectral_norm(one: Directions, other: Directions) -> float:
    """||D1^T D2||_2 = || diag(s) U^T U' diag(s') ||_2."""
    inside = one.s[:, None] * (one.U.mT @ other.U.to(one.U.dtype)) * other.s.to(one.s.dtype)
    return float(singular_values(inside)[:1].sum())


def aligned(one: Directions, other: Directions) -> tuple[float, float, float]:
    """Over singular values above THRESHOLD times the largest of their change: (the sum, and ||s||^2 of each), of which

    R = sum_ij s_i t_j (u_i . u'_j)(v_i . v'_j) / (||s|| ||t||). Ito et al. 2024, arXiv:2402.04051, sec. 4; the threshold is ours.
    """
    first, second = (_leading(d) for d in (one, other))
    U, V = first.U.mT @ second.U, first.V.mT @ second.V
    total = (first.s[:, None] * U * V * second.s).sum()
    return float(total), float(first.s.square().sum()), float(second.s.square().sum())


def _leading(one: Directions) -> Directions:
    kept = one.s > THRESHOLD * one.s[:1]
    return Directions(one.U[:, kept].double(), one.s[kept].double(), one.V[:, kept].double())
