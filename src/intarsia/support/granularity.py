"""Granularities: the units of a weight that a support is made of, and the tensor work each of them needs.

Shapes: O out_features, I in_features, k units chosen, ``index`` (k,) sorted. One class of static functions each:

    units, size     how many units a weight has, entries in one unit
    reduce          (O, I) scores -> (units,) scores
    gather, put     read or write the entries of the support in a weight
    scatter         values -> (O, I), zero elsewhere
    keep, gradient  what backward needs of x, and the gradient of the support alone
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

Shape = tuple[int, int]


class Granularity(Protocol):
    """The functions of a granularity; see the head of this file."""

    name: ClassVar[str]

    @staticmethod
    def units(shape: Shape) -> int: ...
    @staticmethod
    def size(shape: Shape) -> int: ...
    @staticmethod
    def values_shape(shape: Shape, k: int) -> tuple[int, ...]: ...
    @staticmethod
    def reduce(scores: Tensor) -> Tensor: ...
    @staticmethod
    def gather(W: Tensor, index: Tensor) -> Tensor: ...
    @staticmethod
    def put(W: Tensor, index: Tensor, values: Tensor) -> None: ...
    @staticmethod
    def scatter(shape: Shape, index: Tensor, values: Tensor) -> Tensor: ...
    @staticmethod
    def keep(x: Tensor, index: Tensor) -> Tensor: ...
    @staticmethod
    def gradient(gy: Tensor, kept: Tensor, index: Tensor) -> Tensor: ...


def _tokens(x: Tensor) -> Tensor:
    """(..., n) -> (T, n), a single token without a batch too."""
    return x.reshape(-1, x.shape[-1])


class Element:
    """Single entries. index: flat positions row * I + column; values (k,)."""

    name: ClassVar[str] = "element"

    @staticmethod
    def units(shape: Shape) -> int:
        return shape[0] * shape[1]

    @staticmethod
    def size(shape: Shape) -> int:
        return 1

    @staticmethod
    def values_shape(shape: Shape, k: int) -> tuple[int, ...]:
        return (k,)

    @staticmethod
    def reduce(scores: Tensor) -> Tensor:
        return scores.reshape(-1)

    @staticmethod
    def gather(W: Tensor, index: Tensor) -> Tensor:
        return W.reshape(-1).index_select(0, index)

    @staticmethod
    def put(W: Tensor, index: Tensor, values: Tensor) -> None:
        W.view(-1).index_copy_(0, index, values)  # scatter_ on a bf16 CPU tensor is 20-40 times slower

    @staticmethod
    def scatter(shape: Shape, index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(shape[0] * shape[1]).index_copy(0, index, values).view(shape)

    @staticmethod
    def keep(x: Tensor, index: Tensor) -> Tensor:
        return x

    @staticmethod
    def gradient(gy: Tensor, kept: Tensor, index: Tensor) -> Tensor:
        # One layer's dense product, transient: only the k gathered entries outlive this line.
        return (_tokens(gy).mT @ _tokens(kept)).view(-1).index_select(0, index)


class Column:
    """Whole input columns. index: column numbers; values (O, k). Backward needs only x[..., index]."""

    name: ClassVar[str] = "column"

    @staticmethod
    def units(shape: Shape) -> int:
        return shape[1]

    @staticmethod
    def size(shape: Shape) -> int:
        return shape[0]

    @staticmethod
    def values_shape(shape: Shape, k: int) -> tuple[int, ...]:
        return (shape[0], k)

    @staticmethod
    def reduce(scores: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(scores, dim=0)
        return norms

    @staticmethod
    def gather(W: Tensor, index: Tensor) -> Tensor:
        return W.index_select(1, index)

    @staticmethod
    def put(W: Tensor, index: Tensor, values: Tensor) -> None:
        W.index_copy_(1, index, values)

    @staticmethod
    def scatter(shape: Shape, index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(shape).index_copy(1, index, values)

    @staticmethod
    def keep(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(-1, index)

    @staticmethod
    def gradient(gy: Tensor, kept: Tensor, index: Tensor) -> Tensor:
        return _tokens(gy).mT @ _tokens(kept)


GRANULARITIES: dict[str, type[Granularity]] = {g.name: g for g in (Element, Column)}


def file_index_dtype(shape: Shape) -> torch.dtype:
    """int32 wherever every flat position fits: half the file. In memory indices are int64, as index_copy_ asks."""
    return torch.int32 if shape[0] * shape[1] < 2**31 else torch.int64
