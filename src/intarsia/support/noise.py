"""Random numbers by their place: an endless matrix of which any block can be made alone, the same on every device.

Entry (i, j) of stream s of a key is m(m(i ^ a) ^ m(j ^ b)), two 32-bit keys a and b being mixed of key and stream, its upper 24
bits taken as a number of [-1, 1); m is a 32-bit hash found by search (Wellons, hash-prospector: two multiplications, three shifts).
So a frozen random basis costs a key in a file, a slice of it is the slice of a larger one, and nothing has to be kept that can be
made again. Exact integer arithmetic in torch, on numbers of 32 bits that wrap around: one key means the same numbers in every
release, and ``tests/goldens`` pins them. This file is part of the adapter format.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Range = tuple[int, int]  # from, up to

_LOW32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # so that key 0 is a key like any other
_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97
_BLOCK = 1 << 20  # numbers made at a time: 8 MiB, where making them takes less than reading them again from memory


def noise(key: Tensor, stream: int, rows: Range, columns: Range, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of [-1, 1), multiples of 2^-23. ``key``: () int64 of 0..2^63-1, on the device of the result. -> (rows, columns)."""
    a, b = _keys(key, stream)
    i, j = (torch.arange(*range_, dtype=torch.int32, device=key.device) for range_ in (rows, columns))
    mixed = _mixed(_mixed(i ^ a)[:, None] ^ _mixed(j ^ b))
    return mixed.bitwise_right_shift_(8).to(dtype).mul_(2.0**-23)


def combination(coefficients: Tensor, key: Tensor, stream: int, size: int) -> Tensor:
    """sum_i c_i E_i / sqrt(k), E_i (size,) the rows of a stream. They are made by blocks, in forward and again in backward.

    (k,) -> (size,), in the coefficients' dtype.
    """
    return _Combination.apply(coefficients, key, stream, size)  # type: ignore[no-any-return, no-untyped-call]


class _Combination(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, key: Tensor, stream: int, size: int) -> Tensor:
        ctx.save_for_backward(key)
        ctx.stream, ctx.count = stream, len(coefficients)
        total = coefficients.new_zeros(size)
        for rows in _blocks(len(coefficients), size):
            total += coefficients[slice(*rows)] @ noise(key, stream, rows, (0, size), total.dtype)
        return total / math.sqrt(len(coefficients))

    @staticmethod
    @once_differentiable  # linear, and made by hand: a second derivative would be wrong without a word
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (key,) = ctx.saved_tensors
        parts = [noise(key, ctx.stream, rows, (0, len(g)), g.dtype) @ g for rows in _blocks(ctx.count, len(g))]
        return torch.cat(parts) / math.sqrt(ctx.count), None, None, None


def _blocks(count: int, size: int) -> list[Range]:
    step = max(1, _BLOCK // size)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _keys(key: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Of a stream's rows and columns. -> () int32 both."""
    first = _mix(_mix(_mix((key & _LOW32) ^ _GOLDEN) ^ (key >> 32)) ^ stream)
    return _signed(first), _signed(_mix(first ^ _GOLDEN))


def _mix(x: Tensor) -> Tensor:
    """The hash of 64-bit numbers below 2^32, whose products with the constants stay below 2^63."""
    x = ((x ^ (x >> 16)) * _FIRST) & _LOW32
    x = ((x ^ (x >> 15)) * _SECOND) & _LOW32
    return x ^ (x >> 15)


def _signed(x: Tensor) -> Tensor:
    return (x - ((x >> 31) << 32)).to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    """The same hash of the same numbers as int32, in place: ten times as quick. A shift brings in zeros, whatever the sign."""
    x ^= (x >> 16) & 0xFFFF
    x *= _FIRST
    x ^= (x >> 15) & 0x1FFFF
    x *= _SECOND
    x ^= (x >> 15) & 0x1FFFF
    return x
