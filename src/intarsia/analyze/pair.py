"""Two changes beside each other, on one weight or on several together: overlap, sign conflicts, angles, interference.

What is kept are sums over entries, so that weights add up to layers, modules and whole adapters; shares follow from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intarsia.analyze.product import Directions, aligned, product, spectral_norm
from intarsia.analyze.reduced import (
    Reduced,
    common,
    inner,
    rows_of,
    square,
    transposed,
    values_at,
    weighted_square,
)
from intarsia.edits import Sparse

Two = tuple[float, float]  # of the first adapter, of the second
BLOCK = 2**18  # entries of a dense change that are compared at once: they stay in the processor's cache


@dataclass(frozen=True)
class Products:
    """Sums over the products of two changes D1, D2 (O, I).

    Attributes:
        awom_square: ||D1^T D2||_F^2.
        nonzero: nonzero entries of D1^T D2, of so many ``cells``, I^2 a weight that both change.
        foreign: ||D2 X1||^2 and ||D1 X2||^2: what the other one does to the outputs, on the inputs of each.
        own: ||D1 X1||^2 and ||D2 X2||^2: what it does itself.
    """

    awom_square: float = 0.0
    nonzero: int = 0
    cells: int = 0
    foreign: Two = (0.0, 0.0)
    own: Two = (0.0, 0.0)


@dataclass(frozen=True)
class Leading:
    """What the singular vectors say.

    Attributes:
        awom: ||D1^T D2||_2, the largest of the weights.
        inner: <D1, D2> of the leading directions alone; ``squares``: ||D||_F^2 of these, of each.
    """

    awom: float = 0.0
    inner: float = 0.0
    squares: Two = (0.0, 0.0)


@dataclass(frozen=True)
class Pair:
    """Two adapters on one weight, or on several together.

    Attributes:
        where: the weight's name, or that of the group.
        weights: how many weights both change.
        touched: entries that each can change, ``shared`` of them both.
        conflicts: entries that both change with opposite signs.
        squares: ||D||_F^2 of each; ``shared_squares`` and ``conflict_squares``: the part of it in those entries.
        inner: <D1, D2>.
    """

    first: str
    second: str
    where: str
    weights: int = 0
    touched: tuple[int, int] = (0, 0)
    shared: int = 0
    conflicts: int = 0
    squares: Two = (0.0, 0.0)
    shared_squares: Two = (0.0, 0.0)
    conflict_squares: Two = (0.0, 0.0)
    inner: float = 0.0
    products: Products | None = None
    leading: Leading | None = None

    @property
    def overlap(self) -> float:
        """Entries that both can change / the smaller support, 0..1; 0 where one has none."""
        return _share(self.shared, min(self.touched))

    @property
    def jaccard(self) -> float:
        """Entries that both can change / those that one of them can, 0..1."""
        return _share(self.shared, sum(self.touched) - self.shared)

    @property
    def conflict_share(self) -> float:
        """Entries with opposite signs / entries that both can change, 0..1: 1/2 for changes that know nothing of each other."""
        return _share(self.conflicts, self.shared)

    @property
    def conflict_norm(self) -> float:
        """||the entries with opposite signs|| / ||D||, of the adapter with the smaller ||D||, 0..1."""
        smaller = 0 if self.squares[0] <= self.squares[1] else 1
        return math.sqrt(_share(self.conflict_squares[smaller], self.squares[smaller]))

    @property
    def norms(self) -> Two:
        """||D||_F of each."""
        return (self.squares[0] ** 0.5, self.squares[1] ** 0.5)

    @property
    def cosine(self) -> float:
        """<D1, D2> / (||D1|| ||D2||): above 0 they push the same way, below 0 against each other."""
        return _share(self.inner, self.norms[0] * self.norms[1])

    @property
    def awom(self) -> float | None:
        """||D1^T D2||_F, over several weights the root of the sum of squares; None where products were not asked for."""
        return None if self.products is None else self.products.awom_square**0.5

    @property
    def awor(self) -> float | None:
        """1 - nonzero entries of D1^T D2 / all, over the weights that both change; 1 where there are none."""
        return None if self.products is None else 1 - _share(self.products.nonzero, self.products.cells)

    @property
    def interference(self) -> tuple[float | None, float | None]:
        """What the second one is predicted to do to the first one's outputs, relative to the first one's own effect; and the

        other way round: ||D2 X1|| / ||D1 X1||, ||D1 X2|| / ||D2 X2||. 0: nothing; 1: as much as the adapter itself.
        None where products were not asked for, or the adapter has no effect here.
        """
        if self.products is None:
            return (None, None)
        one, two = (
            (foreign / own) ** 0.5 if own else None
            for foreign, own in zip(self.products.foreign, self.products.own, strict=True)
        )
        return (one, two)

    @property
    def worst(self) -> float | None:
        """The larger of the two interferences."""
        known = [value for value in self.interference if value is not None]
        return max(known) if known else None

    @property
    def alignment(self) -> float | None:
        """R, the cosine of the leading directions alone; None where it was not asked for."""
        if self.leading is None:
            return None
        return _share(self.leading.inner, (self.leading.squares[0] * self.leading.squares[1]) ** 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "first": self.first,
            "second": self.second,
            "where": self.where,
            "weights": self.weights,
            "touched": list(self.touched),
            "shared": self.shared,
            "overlap": self.overlap,
            "jaccard": self.jaccard,
            "conflicts": self.conflicts,
            "conflict_share": self.conflict_share,
            "conflict_norm": self.conflict_norm,
            "norms": list(self.norms),
            "cosine": self.cosine,
            "awom": self.awom,
            "awor": self.awor,
            "interference": list(self.interference),
            "awom_spectral": None if self.leading is None else self.leading.awom,
            "alignment": self.alignment,
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def together(pairs: Iterable[Pair], where: str) -> Pair:
    """Pairs of the same two adapters on several weights, as one."""
    pairs = list(pairs)
    first, second = pairs[0].first, pairs[0].second
    products = [pair.products for pair in pairs if pair.products is not None]
    leading = [pair.leading for pair in pairs if pair.leading is not None]
    return Pair(
        first,
        second,
        where,
        weights=sum(pair.weights for pair in pairs),
        touched=(sum(pair.touched[0] for pair in pairs), sum(pair.touched[1] for pair in pairs)),
        shared=sum(pair.shared for pair in pairs),
        conflicts=sum(pair.conflicts for pair in pairs),
        squares=_sums(pair.squares for pair in pairs),
        shared_squares=_sums(pair.shared_squares for pair in pairs),
        conflict_squares=_sums(pair.conflict_squares for pair in pairs),
        inner=sum(pair.inner for pair in pairs),
        products=Products(
            sum(one.awom_square for one in products),
            sum(one.nonzero for one in products),
            sum(one.cells for one in products),
            _sums(one.foreign for one in products),
            _sums(one.own for one in products),
        )
        if products
        else None,
        leading=Leading(
            max(one.awom for one in leading),
            sum(one.inner for one in leading),
            _sums(one.squares for one in leading),
        )
        if leading
        else None,
    )


def _sums(twos: Iterable[Two]) -> Two:
    first, second = zip(*twos, strict=True)
    return (sum(first), sum(second))


# ------------------------------------------------------------------ one weight
def compared(first: str, second: str, where: str, one: Reduced | None, other: Reduced | None) -> Pair:
    """Two changes of one weight, without their products. None: the adapter leaves it alone.

    Sparse changes are compared at the entries that both have, whatever the size of the weight.
    """
    touched = (_touched(one), _touched(other))
    squares = (0.0 if one is None else square(one), 0.0 if other is None else square(other))
    if one is None or other is None:
        return Pair(first, second, where, touched=touched, squares=squares)
    shared, conflicts, parts, conflict_parts = _signs(one, other)
    return Pair(
        first,
        second,
        where,
        weights=1,
        touched=touched,
        shared=shared,
        conflicts=conflicts,
        squares=squares,
        shared_squares=parts,
        conflict_squares=conflict_parts,
        inner=inner(one, other),
    )


def _touched(change: Reduced | None) -> int:
    return 0 if change is None else change.touched


def _signs(one: Reduced, other: Reduced) -> tuple[int, int, Two, Two]:
    """(entries of both, those of opposite sign, the squares in the first, in the second) over what both change."""
    if isinstance(one, Sparse) and isinstance(other, Sparse):
        mine, its = common(one, other)
        return _compare(one.values[mine], other.values[its])
    if isinstance(one, Sparse) and not isinstance(other, Sparse):
        return _compare(one.values, values_at(other, one.index))
    if isinstance(other, Sparse) and not isinstance(one, Sparse):
        return _compare(values_at(one, other.index), other.values)
    assert not isinstance(one, Sparse)
    assert not isinstance(other, Sparse)
    O, I = one.shape
    found, height = [], max(1, BLOCK // I)
    for start in range(0, O, height):
        stop = min(O, start + height)
        found.append(_compare(rows_of(one, start, stop), rows_of(other, start, stop)))
    counts, conflicts, shared, against = zip(*found, strict=True)
    return sum(counts), sum(conflicts), _sums(shared), _sums(against)


def _compare(mine: Tensor, its: Tensor) -> tuple[int, int, Two, Two]:
    against = (mine < 0) & (its > 0) | (mine > 0) & (its < 0)  # not by the product, which may underflow to 0
    return (
        mine.numel(),
        int(against.count_nonzero()),
        (_square(mine), _square(its)),
        (_square(mine, against), _square(its, against)),
    )


def _square(numbers: Tensor, where: Tensor | None = None) -> float:
    flat = (numbers if where is None else numbers * where).reshape(-1)
    return float(flat @ flat)


def products_of(
    one: Reduced | None, other: Reduced | None, inputs: tuple[Tensor | None, Tensor | None], own: Two
) -> Products:
    """The products of two changes of one weight; ``own``: :func:`own_effect` of each, ``inputs``: (I,) of each, where known."""
    if one is None or other is None:
        return Products(own=own)
    met = product(one, other)
    on_first = _effect(other, one, inputs[0])
    alike = inputs[0] is None and inputs[1] is None  # ||D2 D1^T|| is ||D1 D2^T||
    foreign = (on_first, on_first if alike else _effect(one, other, inputs[1]))
    return Products(met.square, met.nonzero, one.shape[1] ** 2, foreign, own)


def own_effect(change: Reduced | None, inputs: Tensor | None) -> float:
    """||D X||^2 of a change on its own inputs."""
    return 0.0 if change is None else _effect(change, change, inputs)


def _effect(change: Reduced, of: Reduced, inputs: Tensor | None) -> float:
    """||D X||^2, X the inputs of ``of``: their norms where they are known, else the directions that it learned to read."""
    if inputs is not None:
        return weighted_square(change, inputs)
    return product(transposed(change), transposed(of), count=False).square


def leading_of(one: Directions | None, other: Directions | None) -> Leading:
    """What two changes of one weight have in common by their singular vectors."""
    if one is None or other is None:
        return Leading()
    inner, *squares = aligned(one, other)
    return Leading(spectral_norm(one, other), inner, (squares[0], squares[1]))
