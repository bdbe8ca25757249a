"""Three-valued vectors as two bit masks, for algebra by counting bits.    <a, b> = s t (|P & Q| + |M & N| - |P & N| - |M & Q|)

ComPEFT, arXiv:2311.13171, sec. 2.2. P and M are where a is +s and -s, Q and N where b is +t and -t: 2 bits a number, and 64 numbers in one
instruction. ``store.write(..., coding="masks")`` keeps a file in this form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intarsia.compress.numbers import flat, numbers
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter
from intarsia.store.packing import Bytes


@dataclass(frozen=True, eq=False)
class Bitmasks:
    """``count`` numbers of -scalar, 0 and scalar. Masks: (ceil(count / 8),) uint8, the first number in the lowest bit."""

    plus: Bytes
    minus: Bytes
    scalar: float
    count: int

    @classmethod
    def of(cls, values: Tensor) -> Bitmasks:
        """From the numbers, of any shape.

        Raises:
            IntarsiaError: where they are not three-valued.
        """
        row = values.detach().reshape(-1)
        sizes = row[row != 0].abs()
        if len(sizes) and not bool((sizes == sizes[0]).all()):
            raise IntarsiaError(f"a bit mask is of numbers -c, 0 and c; found {len(sizes.unique())} sizes besides 0")
        plus, minus = (np.packbits((sign * row > 0).numpy(), bitorder="little") for sign in (1, -1))
        return cls(plus, minus, float(sizes[0]) if len(sizes) else 0.0, len(row))

    def dense(self) -> Tensor:
        """The numbers. -> (count,) float32."""
        plus, minus = (
            np.unpackbits(m, count=self.count, bitorder="little").astype(np.float32) for m in (self.plus, self.minus)
        )
        return torch.from_numpy(np.float32(self.scalar) * (plus - minus))


def bitmasks(adapter: Adapter) -> Bitmasks:
    """All that a compressed adapter learned, as one vector in the order of :func:`intarsia.compress.numbers`.

    Raises:
        IntarsiaError: where its numbers are not three-valued with one scalar.
    """
    return Bitmasks.of(flat(numbers(adapter)))


def dot(one: Bitmasks, other: Bitmasks) -> float:
    """<one, other>.

    Raises:
        IntarsiaError: for vectors of different lengths.
    """
    if one.count != other.count:
        raise IntarsiaError(f"vectors of {one.count} and {other.count} numbers have no product")
    same = _both(one.plus, other.plus) + _both(one.minus, other.minus)
    opposite = _both(one.plus, other.minus) + _both(one.minus, other.plus)
    return one.scalar * other.scalar * (same - opposite)


def distance(one: Bitmasks, other: Bitmasks) -> float:
    """||one - other||."""
    return math.sqrt(max(0.0, dot(one, one) - 2 * dot(one, other) + dot(other, other)))


def _both(one: Bytes, other: Bytes) -> int:
    return int(np.bitwise_count(one & other).sum(dtype=np.int64))
