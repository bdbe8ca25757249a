"""A keyed permutation of 0..n-1, so that k distinct random indices cost O(k) and no permutation of the whole weight.

A Feistel network of four rounds over 2h bits, 4^h >= n, walked until the value falls below n (fewer than four steps
on average). The round function is the 32-bit finaliser of MurmurHash3 (Appleby 2011) of the half and the round key.
Written in exact integer arithmetic, so that a seed means the same support on every device and in every release:
this file is part of the adapter format, and ``tests/support`` pins its numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[Any]

ROUNDS = 4
_LOW32 = 0xFFFFFFFF


def permute(index: Tensor, n: int, key: int) -> Tensor:
    """Where the keyed permutation of 0..n-1 sends each index. (k,) int64 in 0..n-1 -> (k,) int64, distinct if the indices are."""
    return torch.from_numpy(_walk(index.numpy(force=True), n, _round_keys(key))).to(index.device)


def sample(n: int, k: int, key: int) -> Tensor:
    """k distinct indices of 0..n-1, sorted. -> (k,) int64."""
    found = _walk(np.arange(k), n, _round_keys(key))
    if n > 64 * k:
        return torch.from_numpy(np.sort(found))
    taken = np.zeros(n, dtype=bool)  # where many are drawn, marking them is quicker than sorting
    taken[found] = True
    return torch.from_numpy(np.flatnonzero(taken))


def sample_rows(rows: int, n: int, k: int, key: int) -> Tensor:
    """k distinct indices of 0..n-1 in each of the rows, each row with its own permutation. -> (rows, k) int64, each row sorted."""
    number = _mix(np.arange(1, rows + 1, dtype=np.uint32), _wrapped).repeat(k)
    keys = [_mix(number ^ each, _wrapped) for each in _round_keys(key)]
    found = _walk(np.tile(np.arange(k), rows), n, keys).reshape(rows, k)
    return torch.from_numpy(np.sort(found, axis=1))


def _walk(index: Numbers, n: int, keys: Sequence[Any]) -> Numbers:
    """The permutation of 0..n-1 with these round keys, each a single number or one for every index. (k,) int64 -> (k,) int64."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    out = _feistel(index, half, keys)
    outside = np.flatnonzero(out >= n)
    while len(outside):  # cycle walking keeps it a permutation of 0..n-1
        again = _feistel(out[outside], half, [key if np.ndim(key) == 0 else key[outside] for key in keys])
        out[outside] = again
        outside = outside[again >= n]
    return out


def _round_keys(key: int) -> list[np.uint32]:
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=4 * ROUNDS).digest()
    return [np.uint32(int.from_bytes(digest[4 * i : 4 * i + 4], "little")) for i in range(ROUNDS)]


def _feistel(x: Numbers, half: int, keys: Sequence[Any]) -> Numbers:
    # In numpy, whose 32-bit numbers wrap as the hash wants them: five times as quick as 64-bit ones in torch.
    mask = np.uint32((1 << half) - 1)
    left, right = (x >> half).astype(np.uint32), (x & int(mask)).astype(np.uint32)
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key, _wrapped) & mask)
    return (left.astype(np.int64) << half) | right


def _mix(x: Any, multiply: Callable[[Any, int], Any]) -> Any:
    """The finaliser, of numpy's 32-bit numbers or of torch's 64-bit ones below 2^32; a shift is logical on both."""
    x = x ^ (x >> 16)
    x = multiply(x, 0x85EBCA6B)
    x = x ^ (x >> 13)
    x = multiply(x, 0xC2B2AE35)
    return x ^ (x >> 16)


def _wrapped(x: Numbers, constant: int) -> Numbers:
    return x * np.uint32(constant)


def _multiply(x: Tensor, constant: int) -> Tensor:
    """x * constant mod 2^32 for x < 2^32, in two halves so that int64 never overflows."""
    low, high = constant & 0xFFFF, constant >> 16
    return (x * low + (((x * high) & 0xFFFF) << 16)) & _LOW32


def draw(key: Tensor, step: Tensor, n: int) -> Tensor:
    """A number of 0..n-1 for each key at a step, the same on every device. (k,) int64 below 2^32, () int64 -> (k,) int64."""
    drawn: Tensor = _mix(key ^ _mix(step + 1, _multiply), _multiply) % n  # in torch: a compiled forward draws too
    return drawn
