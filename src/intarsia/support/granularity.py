"""Granularities: the units of a weight that a support is made of, and the tensor work each of them needs.

Shapes: O out_features, I in_features, k units chosen, ``index`` (k,) sorted unit numbers, T tokens. A granularity is a
value: ``Line(width=32)`` is another one than ``Line(width=16)``. Where a width does not divide the weight, the rest at
its right or lower edge belongs to no unit.

Training needs the gradient of the support alone, ``(gy^T x)[support]``. What that takes besides gy and x is made once
for a support by ``plan``; ``keep`` is what backward needs of x.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError, nearest
from intarsia.precision import goes_wide, product

Shape = tuple[int, int]
Plan = tuple[Tensor, ...]


@dataclass(frozen=True)
class Granularity(ABC):
    """What a support is made of. What is written here is slow and right for any; each kind does better where it can."""

    name: ClassVar[str]  # of one unit, in configs
    plural: ClassVar[str]  # of the edit in a file
    axis: ClassVar[int] = 0  # of the values along which the units lie

    @abstractmethod
    def units(self, shape: Shape) -> int:
        """How many units a weight has."""

    @abstractmethod
    def size(self, shape: Shape) -> int:
        """Entries in one unit."""

    @abstractmethod
    def values_shape(self, shape: Shape, k: int) -> tuple[int, ...]:
        """Of the values of k units."""

    @abstractmethod
    def flat(self, shape: Shape, index: Tensor) -> Tensor:
        """Flat positions row * I + column of every entry, shaped as the values."""

    def run(self, shape: Shape) -> int:
        """Entries that always stay side by side: every row of :meth:`flat` falls into runs r, r + 1, ... of so many,

        each of which begins at a multiple of it. What is copied at once when a support is written."""
        return 1

    @abstractmethod
    def reduce(self, scores: Tensor) -> Tensor:
        """The scores of the units. (O, I) -> (units,)."""

    @abstractmethod
    def gradient(self, gy: Tensor, kept: Tensor, index: Tensor, plan: Plan, shape: Shape) -> Tensor:
        """The entries of gy^T x on the support. (..., O), what was kept of (..., I) -> values' shape."""

    def spread(self, index: Tensor) -> Tensor:
        """Where units lie along ``axis`` of the values: (k,) unit numbers -> places."""
        return index

    def __str__(self) -> str:
        return self.plural

    def facts(self) -> dict[str, Any]:
        """The fields, for a file."""
        return dataclasses.asdict(self)

    def gather(self, W: Tensor, index: Tensor) -> Tensor:
        """The entries of the support, a copy. (O, I) -> values' shape."""
        positions = self.flat(_shape(W), index)
        memory, places = _in_memory(W, positions.reshape(-1))
        return memory.index_select(0, places).view(positions.shape)

    def put(self, W: Tensor, index: Tensor, values: Tensor) -> None:
        """Write the entries of the support into W, in place."""
        memory, places = _in_memory(W, self.flat(_shape(W), index).reshape(-1))
        memory.index_copy_(0, places, values.reshape(-1))  # scatter_ on a bf16 CPU tensor is 20-40 times slower

    def scatter(self, shape: Shape, index: Tensor, values: Tensor) -> Tensor:
        """The values in a weight of zeros. -> (O, I), differentiable in the values."""
        positions = self.flat(shape, index).reshape(-1)
        return values.new_zeros(shape[0] * shape[1]).index_copy(0, positions, values.reshape(-1)).view(shape)

    def plan(self, shape: Shape, index: Tensor) -> Plan:
        """What ``keep`` and ``gradient`` need to know of a support besides its index."""
        return ()

    def keep(self, x: Tensor, index: Tensor, plan: Plan) -> Tensor:
        """What backward needs of x. (..., I) -> x itself, or some of its columns."""
        return x


@dataclass(frozen=True)
class Wide(Granularity):
    """Units that are ``width`` entries, rows or columns wide."""

    width: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise IntarsiaError(f"{self.name}: width={self.width!r} must be 1 or more")

    def __str__(self) -> str:
        return self.plural if self.width == 1 else f"{self.plural} of width {self.width}"

    def spread(self, index: Tensor) -> Tensor:
        return _spread(index, self.width)


@dataclass(frozen=True)
class Element(Granularity):
    """Single entries. index: flat positions row * I + column; values (k,)."""

    name, plural = "element", "elements"

    def units(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def size(self, shape: Shape) -> int:
        return 1

    def values_shape(self, shape: Shape, k: int) -> tuple[int, ...]:
        return (k,)

    def flat(self, shape: Shape, index: Tensor) -> Tensor:
        return index

    def reduce(self, scores: Tensor) -> Tensor:
        return scores.reshape(-1)

    def plan(self, shape: Shape, index: Tensor) -> Plan:
        """Where entries are few, how they lie by rows: (entries in the rows before each (O + 1,), their columns (k,))."""
        rows, columns = shape
        few = len(index) * FEW < rows * columns and SMALL * (rows + columns) <= rows * columns
        if not few or index.device.type != "cpu":
            return ()
        before = torch.zeros(rows + 1, dtype=torch.int32)
        before[1:] = (index // columns).bincount(minlength=rows).cumsum(0)
        return before, (index % columns).to(torch.int32)

    def gradient(self, gy: Tensor, kept: Tensor, index: Tensor, plan: Plan, shape: Shape) -> Tensor:
        gy, x = _tokens(gy), _tokens(kept)
        if plan and gy.device.type == "cpu":
            # In float32: the sampled product knows no narrower numbers.
            wide = torch.promote_types(gy.dtype, torch.float32)
            found: Tensor = sampled(*plan, gy.mT.contiguous().to(wide), x.mT.contiguous().to(wide))
            return found.to(gy.dtype)
        return _entries(gy, x, index)


@dataclass(frozen=True)
class Line(Wide):
    """``width`` entries side by side in a row, by default 64 bytes of bfloat16: a line of the cache. values (k, width)."""

    width: int = 32
    name, plural = "line", "lines"

    def units(self, shape: Shape) -> int:
        return shape[0] * (shape[1] // self.width)

    def size(self, shape: Shape) -> int:
        return self.width

    def values_shape(self, shape: Shape, k: int) -> tuple[int, ...]:
        return (k, self.width)

    def spread(self, index: Tensor) -> Tensor:
        return index

    def flat(self, shape: Shape, index: Tensor) -> Tensor:
        blocks = max(1, shape[1] // self.width)
        first = (index // blocks) * shape[1] + (index % blocks) * self.width
        return first[:, None] + torch.arange(self.width, device=index.device)

    def run(self, shape: Shape) -> int:
        return math.gcd(self.width, shape[1])

    def reduce(self, scores: Tensor) -> Tensor:
        blocks = scores.shape[1] // self.width
        return _norms(scores[:, : blocks * self.width].reshape(-1, self.width), 1)

    def gather(self, W: Tensor, index: Tensor) -> Tensor:
        if W.shape[1] % self.width or not W.is_contiguous():
            return super().gather(W, index)
        return W.reshape(-1, self.width).index_select(0, index)

    def put(self, W: Tensor, index: Tensor, values: Tensor) -> None:
        if W.shape[1] % self.width or not W.is_contiguous():
            super().put(W, index, values)
        else:
            W.view(-1, self.width).index_copy_(0, index, values)

    def plan(self, shape: Shape, index: Tensor) -> Plan:
        """(rows (u, m), slot (k,), blocks): for each of the u column blocks in use its rows, filled up to m with row 0."""
        blocks = max(1, shape[1] // self.width)
        row, block = index // blocks, index % blocks
        used, which = block.unique(return_inverse=True)
        order = which.argsort(stable=True)
        counts = which.bincount(minlength=len(used))
        within = torch.empty_like(index)
        within[order] = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[which[order]]
        most = int(counts.max()) if len(index) else 0
        slot = which * most + within
        rows = index.new_zeros(len(used) * most)
        rows[slot] = row
        return rows.view(len(used), most), slot, _unless_all(used, self.width, shape)

    def keep(self, x: Tensor, index: Tensor, plan: Plan) -> Tensor:
        return _keep(x, plan[-1], self.width)

    def gradient(self, gy: Tensor, kept: Tensor, index: Tensor, plan: Plan, shape: Shape) -> Tensor:
        gy, x, (rows, slot, used) = _tokens(gy), _tokens(kept), plan
        blocks, most = rows.shape
        some = gy.mT.index_select(0, rows.view(-1)).view(blocks, most, -1)  # (u, m, T)
        dense = some @ _blocks(x, used, self.width, shape).transpose(0, 1)  # (u, m, width)
        return dense.view(-1, self.width).index_select(0, slot)


@dataclass(frozen=True)
class Tile(Wide):
    """Squares of ``width`` x ``width`` entries. index: row of tiles * (I // width) + column of tiles; values (k, width, width)."""

    width: int = 32
    name, plural = "tile", "tiles"

    def units(self, shape: Shape) -> int:
        return (shape[0] // self.width) * (shape[1] // self.width)

    def size(self, shape: Shape) -> int:
        return self.width * self.width

    def values_shape(self, shape: Shape, k: int) -> tuple[int, ...]:
        return (k, self.width, self.width)

    def spread(self, index: Tensor) -> Tensor:
        return index

    def flat(self, shape: Shape, index: Tensor) -> Tensor:
        across = max(1, shape[1] // self.width)
        first = (index // across) * self.width * shape[1] + (index % across) * self.width
        step = torch.arange(self.width, device=index.device)
        return first[:, None, None] + (step * shape[1])[:, None] + step

    def run(self, shape: Shape) -> int:
        return math.gcd(self.width, shape[1])

    def reduce(self, scores: Tensor) -> Tensor:
        down, across, t = scores.shape[0] // self.width, scores.shape[1] // self.width, self.width
        squares = scores[: down * t, : across * t].reshape(down, t, across, t).transpose(1, 2)
        return _norms(squares.reshape(down * across, t * t), 1)

    def plan(self, shape: Shape, index: Tensor) -> Plan:
        """(row of tiles (k,), place of the column of tiles among those in use (k,), columns of tiles in use)."""
        across = max(1, shape[1] // self.width)
        used, which = (index % across).unique(return_inverse=True)
        return index // across, which, _unless_all(used, self.width, shape)

    def keep(self, x: Tensor, index: Tensor, plan: Plan) -> Tensor:
        return _keep(x, plan[-1], self.width)

    def gradient(self, gy: Tensor, kept: Tensor, index: Tensor, plan: Plan, shape: Shape) -> Tensor:
        gy, x, (down, across, used) = _tokens(gy), _tokens(kept), plan
        t, rows = self.width, gy.shape[1] // self.width
        left = gy[:, : rows * t].reshape(len(gy), rows, t).index_select(1, down).permute(1, 2, 0)  # (k, t, T)
        right = _blocks(x, used, t, shape).index_select(1, across).transpose(0, 1)  # (k, T, t)
        return left.contiguous() @ right.contiguous()  # a bf16 product of views is half as quick on a CPU


@dataclass(frozen=True)
class Row(Wide):
    """Whole output rows, ``width`` neighbours a unit (a head, say). index: row // width; values (k * width, I)."""

    name, plural = "row", "rows"

    def units(self, shape: Shape) -> int:
        return shape[0] // self.width

    def size(self, shape: Shape) -> int:
        return self.width * shape[1]

    def values_shape(self, shape: Shape, k: int) -> tuple[int, ...]:
        return (k * self.width, shape[1])

    def flat(self, shape: Shape, index: Tensor) -> Tensor:
        return self.spread(index)[:, None] * shape[1] + torch.arange(shape[1], device=index.device)

    def run(self, shape: Shape) -> int:
        return shape[1]

    def reduce(self, scores: Tensor) -> Tensor:
        units = scores.shape[0] // self.width
        return _norms(scores[: units * self.width].reshape(units, -1), 1)

    def gather(self, W: Tensor, index: Tensor) -> Tensor:
        return W.index_select(0, self.spread(index))

    def put(self, W: Tensor, index: Tensor, values: Tensor) -> None:
        W.index_copy_(0, self.spread(index), values)

    def scatter(self, shape: Shape, index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(shape).index_copy(0, self.spread(index), values)

    def plan(self, shape: Shape, index: Tensor) -> Plan:
        return () if self.width == 1 else (self.spread(index),)

    def gradient(self, gy: Tensor, kept: Tensor, index: Tensor, plan: Plan, shape: Shape) -> Tensor:
        return product(_tokens(gy).index_select(1, plan[0] if plan else index).mT, _tokens(kept))


@dataclass(frozen=True)
class Column(Wide):
    """Whole input columns, ``width`` neighbours a unit (a head of the input, say). index: column // width;
    values (O, k * width). Backward needs only these columns of x."""

    name, plural, axis = "column", "columns", 1

    def units(self, shape: Shape) -> int:
        return shape[1] // self.width

    def size(self, shape: Shape) -> int:
        return shape[0] * self.width

    def values_shape(self, shape: Shape, k: int) -> tuple[int, ...]:
        return (shape[0], k * self.width)

    def flat(self, shape: Shape, index: Tensor) -> Tensor:
        return (torch.arange(shape[0], device=index.device) * shape[1])[:, None] + self.spread(index)

    def run(self, shape: Shape) -> int:
        return math.gcd(self.width, shape[1])

    def reduce(self, scores: Tensor) -> Tensor:
        units = scores.shape[1] // self.width
        return _norms(scores[:, : units * self.width].reshape(len(scores), units, self.width), (0, 2))

    def gather(self, W: Tensor, index: Tensor) -> Tensor:
        return W.index_select(1, self.spread(index))

    def put(self, W: Tensor, index: Tensor, values: Tensor) -> None:
        W.index_copy_(1, self.spread(index), values)

    def scatter(self, shape: Shape, index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(shape).index_copy(1, self.spread(index), values)

    def plan(self, shape: Shape, index: Tensor) -> Plan:
        return () if self.width == 1 else (self.spread(index),)

    def keep(self, x: Tensor, index: Tensor, plan: Plan) -> Tensor:
        return x.index_select(-1, plan[0] if plan else index)

    def gradient(self, gy: Tensor, kept: Tensor, index: Tensor, plan: Plan, shape: Shape) -> Tensor:
        return product(_tokens(kept).mT, _tokens(gy)).mT.contiguous()  # the other way round takes half as long again


@dataclass(frozen=True)
class Diagonal(Granularity):
    """Wrapped diagonals: unit d has the entries (i, (i + d) mod I) of every row i. index: d; values (k, O)."""

    name, plural = "diagonal", "diagonals"

    def units(self, shape: Shape) -> int:
        return shape[1]

    def size(self, shape: Shape) -> int:
        return shape[0]

    def values_shape(self, shape: Shape, k: int) -> tuple[int, ...]:
        return (k, shape[0])

    def flat(self, shape: Shape, index: Tensor) -> Tensor:
        rows = torch.arange(shape[0], device=index.device)
        return rows * shape[1] + (rows + index[:, None]) % shape[1]

    def reduce(self, scores: Tensor) -> Tensor:
        return _norms(self.gather(scores, torch.arange(scores.shape[1], device=scores.device)), 1)

    def gradient(self, gy: Tensor, kept: Tensor, index: Tensor, plan: Plan, shape: Shape) -> Tensor:
        return _entries(_tokens(gy), _tokens(kept), self.flat(shape, index).view(-1)).view(len(index), -1)


AT_ONCE = 1 << 26  # entries of a dense product that single entries may make at a time: 256 MB of float32
FEW = 50  # one entry in so many: then sampling the product is quicker than the dense one (on a CPU, in float32),
SMALL = 512  # but not on weights below 1024 x 1024, where copying x and gy by columns outweighs the product

GRANULARITIES: dict[str, type[Granularity]] = {g.name: g for g in (Element, Line, Tile, Row, Column, Diagonal)}


def named_granularity(name: str, width: int | None = None) -> Granularity:
    """A granularity by its name, and its width where that is not the usual one.

    Raises:
        IntarsiaError: for an unknown name, or a width for what has none.
    """
    if name not in GRANULARITIES:
        raise IntarsiaError(f"no granularity {name!r}; {nearest(name, GRANULARITIES)}")
    kind = GRANULARITIES[name]
    if width is None:
        return kind()
    if not issubclass(kind, Wide):
        raise IntarsiaError(f"{name}: width={width!r} is given, and {kind.plural} have no width")
    return kind(width=width)


def file_index_dtype(shape: Sequence[int]) -> torch.dtype:
    """int32 wherever every flat position fits: half the file. In memory indices are int64, as index_copy_ asks."""
    return torch.int32 if shape[0] * shape[1] < 2**31 else torch.int64


def _shape(W: Tensor) -> Shape:
    return W.shape[0], W.shape[1]


def _in_memory(W: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """A weight's memory as one row, and where its flat positions lie there: elsewhere where it is stored as (I, O)."""
    if not W.is_contiguous() and W.mT.is_contiguous():
        rows, columns = W.shape
        return W.mT.view(-1), (positions % columns) * rows + positions // columns
    return W.view(-1), positions


def _tokens(x: Tensor) -> Tensor:
    """(..., n) -> (T, n), a single token without a batch too."""
    return x.reshape(-1, x.shape[-1])


def _entries(gy: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """Entries of gy^T x at flat positions. (T, O), (T, I), (n,) -> (n,)."""
    rows, columns = gy.shape[1], x.shape[1]
    if goes_wide(gy):
        return _entries(gy.float(), x.float(), positions).to(gy.dtype)
    if rows * columns <= AT_ONCE:
        # One layer's dense product, transient: only the gathered entries outlive this line.
        return (gy.mT @ x).view(-1).index_select(0, positions)
    found = torch.empty_like(positions, dtype=gy.dtype)
    some = max(1, AT_ONCE // columns)
    for first in range(0, rows, some):
        here = ((positions >= first * columns) & (positions < (first + some) * columns)).nonzero().squeeze(1)
        part = gy[:, first : first + some].mT @ x
        found[here] = part.view(-1).index_select(0, positions[here] - first * columns)
    return found


@torch.library.custom_op("intarsia::sampled", mutates_args=())
def sampled(before: Tensor, column: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Some entries of left @ right^T, row by row: ``before`` (O + 1,) counts those of the rows before, ``column`` (k,).

    An operator of its own, because torch.compile cannot trace sparse tensors. (O, T), (I, T) -> (k,).
    """
    _heard()
    size = (len(left), len(right))
    pattern = torch.sparse_csr_tensor(before, column, left.new_zeros(len(column)), size=size, check_invariants=False)
    found: Tensor = torch.sparse.sampled_addmm(pattern, left, right.mT).values()
    return found


@functools.cache
def _heard() -> None:
    """torch says once that compressed sparse tensors are in beta: let it say so here, to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1), check_invariants=False)


@sampled.register_fake
def _(before: Tensor, column: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(len(column))


def _norms(scores: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(scores, dim=dim)
    return norms


def _spread(index: Tensor, width: int) -> Tensor:
    if width == 1:
        return index
    return (index[:, None] * width + torch.arange(width, device=index.device)).view(-1)


def _unless_all(used: Tensor, width: int, shape: Shape) -> Tensor:
    """The column blocks in use; none where they are all of x, which then needs no copy."""
    return used if len(used) * width < shape[1] else used.new_empty(0)


def _keep(x: Tensor, used: Tensor, width: int) -> Tensor:
    # A copy pays where it is small: x itself is often kept by other layers too, as by q, k and v.
    if 0 < 2 * len(used) * width <= x.shape[-1]:
        return _pick(x, used, width).reshape(*x.shape[:-1], -1)
    return x


def _blocks(kept: Tensor, used: Tensor, width: int, shape: Shape) -> Tensor:
    """The column blocks in use of what was kept. (T, ...) -> (T, u, width)."""
    if len(used) and kept.shape[1] == shape[1]:
        return _pick(kept, used, width)
    return kept.view(len(kept), -1, width)


def _pick(x: Tensor, used: Tensor, width: int) -> Tensor:
    blocks = x.shape[-1] // width
    return x[..., : blocks * width].view(*x.shape[:-1], blocks, width).index_select(-2, used)
