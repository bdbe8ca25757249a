"""A keyed permutation of 0..n-1, so that k distinct random indices cost O(k) and no permutation of the whole weight.

A Feistel network of four rounds over 2h bits, 4^h >= n, walked until the value falls below n (fewer than four steps
on average). The round function is the 32-bit finaliser of MurmurHash3 (Appleby 2011) of the half and the round key.
Written in exact integer arithmetic, so that a seed means the same support on every device and in every release:
this file is part of the adapter format, and ``tests/support`` pins its numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROUNDS = 4
_LOW32 = 0xFFFFFFFF


def permute(index: Tensor, n: int, key: int) -> Tensor:
    """Where the keyed permutation of 0..n-1 sends each index. (k,) int64 in 0..n-1 -> (k,) int64, distinct if the indices are."""
    return _walk(index, n, [torch.tensor(k) for k in _round_keys(key)])


def sample(n: int, k: int, key: int) -> Tensor:
    """k distinct indices of 0..n-1, sorted. -> (k,) int64."""
    return permute(torch.arange(k), n, key).sort().values


def sample_rows(rows: int, n: int, k: int, key: int) -> Tensor:
    """k distinct indices of 0..n-1 in each of the rows, each row with its own permutation. -> (rows, k) int64, each row sorted."""
    number = _mix(torch.arange(1, rows + 1))[:, None].expand(rows, k).reshape(-1)
    keys = [_mix(number ^ each) for each in _round_keys(key)]
    return _walk(torch.arange(k).repeat(rows), n, keys).view(rows, k).sort(dim=1).values


def _walk(index: Tensor, n: int, keys: list[Tensor]) -> Tensor:
    """The permutation of 0..n-1 with these round keys, each a single number or one for every index."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    out = _feistel(index, half, keys)
    outside = (out >= n).nonzero().squeeze(1)
    while len(outside):  # cycle walking keeps it a permutation of 0..n-1
        again = _feistel(out[outside], half, [key[outside] if key.ndim else key for key in keys])
        out[outside] = again
        outside = outside[again >= n]
    return out


def _round_keys(key: int) -> list[int]:
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=4 * ROUNDS).digest()
    return [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(ROUNDS)]


def _feistel(x: Tensor, half: int, keys: list[Tensor]) -> Tensor:
    mask = (1 << half) - 1
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = _multiply(x, 0x85EBCA6B)
    x = x ^ (x >> 13)
    x = _multiply(x, 0xC2B2AE35)
    return x ^ (x >> 16)


def _multiply(x: Tensor, constant: int) -> Tensor:
    """x * constant mod 2^32 for x < 2^32, in two halves so that int64 never overflows."""
    low, high = constant & 0xFFFF, constant >> 16
    return (x * low + (((x * high) & 0xFFFF) << 16)) & _LOW32


def draw(key: Tensor, step: Tensor, n: int) -> Tensor:
    """A number of 0..n-1 for each key at a step, the same on every device. (k,) int64 below 2^32, () int64 -> (k,) int64."""
    return _mix(key ^ _mix(step + 1)) % n
