"""Whole numbers in as few bits as they need. Every byte is defined: no machine's own order of bytes enters here.

pack    numbers of b bits one after another, the first in the lowest bits: ceil(b n / 8) bytes
Rice    a number g is g >> b times a 0 and a 1 (unary), and its b lowest bits (Rice 1979: Golomb's code of 2^b).
        All the low bits are packed first, then all the unary ones, so that both are read without a loop over numbers.

For gaps between the places of a vector that are kept, each with the chance k, the best b is about 1 + floor(log2(log(phi - 1) / log(1 - k)))
with the golden ratio phi, and a place takes b + 1 / (1 - (1 - k)^(2^b)) bits on average.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import IntarsiaError

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

MOST_BITS = 48  # of a packed number: more than any weight has entries


def packed_bytes(count: int, bits: int) -> int:
    """ceil(bits * count / 8)."""
    return -(-bits * count // 8)


def pack(numbers: NDArray[Any], bits: int) -> Bytes:
    """Numbers of 0..2^bits - 1, the first one in the lowest bits of the first byte. (n,) -> (ceil(bits n / 8),)."""
    if bits == 8:
        return numbers.astype(np.uint8)
    spread = np.empty((len(numbers), bits), dtype=np.uint8)
    for bit in range(bits):
        spread[:, bit] = (numbers >> bit) & 1
    return np.packbits(spread.reshape(-1), bitorder="little")


def unpack(data: Bytes, count: int, bits: int) -> Numbers:
    """The inverse of :func:`pack`. (ceil(bits n / 8),) -> (n,).

    Raises:
        IntarsiaError: where a bit beyond the last number is set: so a file has but one spelling.
    """
    if bits == 8:
        return data[:count].astype(np.int64)
    if count * bits % 8 and int(data[-1]) >> count * bits % 8:
        raise IntarsiaError("bits beyond its last number are set; the file was changed or damaged")
    spread = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    numbers = np.zeros(count, dtype=np.int64)
    for bit in range(bits):
        numbers |= spread[:, bit].astype(np.int64) << bit
    return numbers


def rice_bits(numbers: Numbers) -> int:
    """The b with which these numbers take the fewest bytes."""
    if not len(numbers):
        return 0
    guess = max(0, math.floor(math.log2(max(float(numbers.mean()) * math.log(2), 1))))
    near = range(max(0, guess - 1), min(guess + 3, MOST_BITS + 1))
    return min(near, key=lambda bits: len(numbers) * bits + int((numbers >> bits).sum()))


def rice_encode(numbers: Numbers, bits: int) -> Bytes:
    """Whole numbers, none below 0, by Rice's code."""
    ends = np.cumsum((numbers >> bits) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.uint8)
    unary[ends] = 1
    return np.concatenate([pack(numbers & ((1 << bits) - 1), bits), np.packbits(unary, bitorder="little")])


def rice_decode(data: Bytes, count: int, bits: int) -> Numbers:
    """The inverse of :func:`rice_encode`. -> (count,).

    Raises:
        IntarsiaError: where the data are not so many numbers.
    """
    low = packed_bytes(count, bits)
    ends = np.flatnonzero(np.unpackbits(data[low:], bitorder="little"))
    if len(ends) != count or len(data) - low != (ends[-1] // 8 + 1 if count else 0):
        raise IntarsiaError(f"it holds {len(ends)} numbers, expected {count}; the file was changed or damaged")
    return ((np.diff(ends, prepend=-1) - 1) << bits) | unpack(data[:low], count, bits)


def gaps(places: NDArray[Any]) -> Numbers:
    """What lies between ascending places: the first, then each difference less 1. (k,) -> (k,)."""
    before = np.concatenate([[-1], places[:-1]])
    between: Numbers = places.astype(np.int64) - before - 1
    return between


def from_gaps(between: Numbers) -> Numbers:
    """The inverse of :func:`gaps`."""
    return np.cumsum(between + 1) - 1
