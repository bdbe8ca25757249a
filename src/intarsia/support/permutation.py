"""A keyed permutation of 0..n-1, so that k distinct random indices cost O(k) and no permutation of the whole weight.

A Feistel network of four rounds over b bits, the fewest with 2^b >= n (but two), whose halves change their widths with
every round where b is odd; walked until the value falls below n (fewer than two steps on average). The round function is the 32-bit finaliser of MurmurHash3 (Appleby 2011) of the half and the round key.
Written in exact integer arithmetic, so that a seed means the same support on every device and in every release:
this file is part of the adapter format, and ``tests/support`` pins its numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[Any]

ROUNDS = 4
_LOW32 = 0xFFFFFFFF
MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 0))  # MurmurHash3's finaliser: xor with a shift of itself, multiply


def permute(index: Tensor, n: int, key: int) -> Tensor:
    """Where the keyed permutation of 0..n-1 sends each index. (k,) int64 in 0..n-1 -> (k,) int64, distinct if the indices are."""
    return torch.from_numpy(_walk(index.numpy(force=True), n, _round_keys(key))).to(index.device)


def ranks(index: Tensor, n: int, key: int) -> Tensor:
    """The inverse of :func:`permute`: as which number each index is drawn. (k,) int64 in 0..n-1 -> (k,) int64."""
    return torch.from_numpy(_walk(index.numpy(force=True), n, _round_keys(key), back=True)).to(index.device)


def sample(n: int, k: int, key: int) -> Tensor:
    """k distinct indices of 0..n-1, sorted. -> (k,) int64."""
    found = _walk(np.arange(k), n, _round_keys(key))
    # numpy sorts 32-bit numbers with the processor's vectors, several times as quick as 64-bit ones.
    return torch.from_numpy(np.sort(found.astype(np.uint32)).astype(np.int64) if n <= _LOW32 else np.sort(found))


def sample_free(free: Tensor, k: int, key: int) -> Tensor:
    """The first k indices in the order of the permutation that are free, sorted. (n,) bool -> (k,) int64.

    Where nothing that :func:`sample` draws is taken, this is what it draws.
    """
    n = len(free)
    order = permute(torch.arange(min(n, k + int((~free).sum()))), n, key)
    return order[free[order]][:k].sort().values


def sample_rows(rows: int, n: int, k: int, key: int) -> Tensor:
    """k distinct indices of 0..n-1 in each of the rows, each row with its own permutation. -> (rows, k) int64, each row sorted."""
    return torch.from_numpy(np.sort(_rows(rows, n, k, key), axis=1))


def sample_free_rows(free: Tensor, k: int, key: int) -> Tensor:
    """The same for each row of free indices. (rows, n) bool -> (rows, k) int64, each row sorted."""
    rows, n = free.shape
    order = torch.from_numpy(_rows(rows, n, min(n, k + int((~free).sum(1).max())), key))
    open_ = free.gather(1, order)
    first = open_ & (open_.cumsum(1) <= k)
    return order[first].view(rows, k).sort(1).values


def _rows(rows: int, n: int, k: int, key: int) -> Numbers:
    """Where each row's own permutation sends 0..k-1. -> (rows, k) int64."""
    number = _mixed(np.arange(1, rows + 1, dtype=np.uint32)).repeat(k)
    keys = [_mixed(number ^ each) for each in _round_keys(key)]
    return _walk(np.tile(np.arange(k), rows), n, keys).reshape(rows, k)


def uniform(index: Tensor, key: int) -> Tensor:
    """A number of [0, 1) for each index, that depends on it and the key alone: whatever else is drawn, and on every device.

    (k,) int64 of 0..2^63-1 -> (k,) float64, multiples of 2^-32.
    """
    first, second, *_ = _round_keys(key)
    number = index.numpy(force=True)
    mixed = _mixed((number & _LOW32).astype(np.uint32) ^ first)
    mixed = _mixed(mixed ^ (number >> 32).astype(np.uint32) ^ second)
    return torch.from_numpy(mixed.astype(np.float64) / 2**32).to(index.device)


def _walk(index: Numbers, n: int, keys: Sequence[Any], back: bool = False) -> Numbers:
    """The permutation of 0..n-1 with these round keys, each a single number or one for every index. (k,) int64 -> (k,) int64."""
    bits = max(2, (n - 1).bit_length())
    feistel = _unfeistel if back else _feistel
    out = feistel(index, bits, keys)
    outside = np.flatnonzero(out >= n)
    while len(outside):  # cycle walking keeps it a permutation of 0..n-1
        again = feistel(out[outside], bits, [key if np.ndim(key) == 0 else key[outside] for key in keys])
        out[outside] = again
        outside = outside[again >= n]
    return out


def _round_keys(key: int) -> list[np.uint32]:
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=4 * ROUNDS).digest()
    return [np.uint32(int.from_bytes(digest[4 * i : 4 * i + 4], "little")) for i in range(ROUNDS)]


def _feistel(x: Numbers, bits: int, keys: Sequence[Any]) -> Numbers:
    # In numpy, whose 32-bit numbers wrap as the hash wants them, and in place: ten times as quick as 64-bit ones in torch.
    low = bits // 2
    left, right = (x >> low).astype(np.uint32), (x & ((1 << low) - 1)).astype(np.uint32)
    widths = (bits - low, low)  # of left and right, which change places with every round
    mixed, room = np.empty_like(left), np.empty_like(left)
    for round, key in enumerate(keys):
        np.bitwise_xor(right, key, out=mixed)
        _mixed(mixed, room)
        np.bitwise_and(mixed, np.uint32((1 << widths[round % 2]) - 1), out=mixed)
        np.bitwise_xor(left, mixed, out=left)
        left, right = right, left
    return (left.astype(np.int64) << low) | right


def _unfeistel(x: Numbers, bits: int, keys: Sequence[Any]) -> Numbers:
    """The inverse of :func:`_feistel`: the rounds from the last to the first."""
    low = bits // 2
    left, right = (x >> low).astype(np.uint32), (x & ((1 << low) - 1)).astype(np.uint32)
    widths = (bits - low, low)
    for round in range(ROUNDS - 1, -1, -1):
        left, right = right, left
        left = left ^ (_mixed(right ^ keys[round]) & np.uint32((1 << widths[round % 2]) - 1))
    return (left.astype(np.int64) << low) | right


def _mixed(x: Numbers, room: Numbers | None = None) -> Numbers:
    """The hash of numpy's 32-bit numbers, in place; ``room`` is as large as they are. -> x."""
    room = np.empty_like(x) if room is None else room
    for shift, constant in MIX:
        np.bitwise_xor(x, np.right_shift(x, np.uint32(shift), out=room), out=x)
        if constant:
            np.multiply(x, np.uint32(constant), out=x)
    return x


def _mix(x: Tensor) -> Tensor:
    """The hash of torch's 64-bit numbers below 2^32."""
    for shift, constant in MIX:
        x = x ^ (x >> shift)
        if constant:  # in two halves, so that int64 never overflows
            x = (x * (constant & 0xFFFF) + (((x * (constant >> 16)) & 0xFFFF) << 16)) & _LOW32
    return x


def draw(key: Tensor, step: Tensor, n: int) -> Tensor:
    """A number of 0..n-1 for each key at a step, the same on every device. (k,) int64 below 2^32, () int64 -> (k,) int64."""
    drawn: Tensor = _mix(key ^ _mix(step + 1)) % n  # in torch: a compiled forward draws too
    return drawn
