"""The keyed permutation is part of the adapter format: its numbers are pinned, and written out a second time here."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.method import Start
from intarsia.support import permute, sample, uniform

KEYS = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize(
    ("n", "k", "key", "expected"),
    [
        (1, 1, 5, [0]),
        (2, 1, 5, [1]),
        (100, 10, 0, [9, 28, 47, 50, 63, 67, 69, 71, 86, 95]),
        (331776, 8, 1, [75785, 116114, 153749, 211967, 266006, 278940, 279356, 315300]),
        (2**34, 6, 2**62 + 12345, [2905032466, 5406693145, 5928192993, 6167893281, 6270006435, 7291852300]),
    ],
)
def test_the_numbers_of_the_format(n, k, key, expected):
    """A change here makes seeded adapters mean other entries: it needs a new format, not new numbers in this test."""
    assert sample(n, k, key).tolist() == expected


def test_the_keys_of_the_format():
    assert Start.at("model.layers.0.self_attn.q_proj", 0).key == 2934556070423041679
    assert Start.at("a", 1).key == 8774284364626465354


def _by_hand(index: int, n: int, key: int) -> int:
    """The permutation once more, with Python's integers: four Feistel rounds, MurmurHash3's finaliser, cycle walking."""
    bits = 2
    while 2**bits < n:
        bits += 1
    low = bits // 2
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=16).digest()
    while True:
        left, right = index >> low, index % 2**low
        wide, narrow = bits - low, low
        for start in range(0, 16, 4):
            h = right ^ int.from_bytes(digest[start : start + 4], "little")
            h ^= h >> 16
            h = h * 0x85EBCA6B % 2**32
            h ^= h >> 13
            h = h * 0xC2B2AE35 % 2**32
            h ^= h >> 16
            left, right, wide, narrow = right, left ^ (h % 2**wide), narrow, wide
        index = left << low | right
        if index < n:
            return index


@given(n=st.integers(1, 2**40), key=KEYS, data=st.data())
def test_equals_the_permutation_by_hand(n, key, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=8))
    assert permute(torch.tensor(indices, dtype=torch.int64), n, key).tolist() == [_by_hand(i, n, key) for i in indices]


def _draw_by_hand(index: int, key: int) -> float:
    """One number of the draws once more: the hash of the low half under one key, then with the high half under another."""
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=16).digest()
    h = 0
    for start, half in ((0, index % 2**32), (4, index >> 32)):
        h ^= half ^ int.from_bytes(digest[start : start + 4], "little")
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        h ^= h >> 16
    return h / 2**32


@given(key=KEYS, indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=8))
def test_draws_equal_those_by_hand(key, indices):
    assert uniform(torch.tensor(indices), key).tolist() == [_draw_by_hand(i, key) for i in indices]


def test_draws_are_uniform_and_those_of_two_keys_unrelated():
    first, second = (uniform(torch.arange(200_000), key) for key in (1, 2))
    counts = torch.histc(first, 20, 0, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 43.8  # chi-square of 19 degrees, 0.1 %
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1])) < 0.01


@given(n=st.integers(1, 3000), key=KEYS)
def test_is_a_permutation(n, key):
    assert permute(torch.arange(n), n, key).sort().values.tolist() == list(range(n))


@given(n=st.integers(1, 2000), key=KEYS, data=st.data())
def test_a_larger_sample_contains_the_smaller_one(n, key, data):
    k = data.draw(st.integers(1, n))
    index = sample(n, k, key).tolist()
    assert len(index) == k
    assert set(index) <= set(sample(n, n, key).tolist())
    assert set(sample(n, max(1, k // 2), key).tolist()) <= set(index)


@pytest.mark.parametrize(("n", "k"), [(384, 38), (4096, 41), (9216, 92)])
def test_is_uniform(n, k):
    """Every entry is as likely as another one, and so is every pair of neighbours: chi-square within six deviations."""
    draws = 500
    counts, pairs = torch.zeros(n), 0
    for seed in range(draws):
        index = sample(n, k, Start.at("layer", seed).key)
        counts[index] += 1
        pairs += int((index.diff() == 1).sum())
    expected = draws * k / n
    chi2 = float(((counts - expected) ** 2 / expected).sum()) / (1 - k / n)
    assert abs(chi2 - (n - 1)) < 6 * (2 * (n - 1)) ** 0.5
    neighbours = draws * k * (k - 1) / n
    assert abs(pairs - neighbours) < 6 * neighbours**0.5


def test_costs_as_much_as_the_sample_and_not_as_the_weight():
    assert len(sample(2**45, 1000, 3)) == 1000  # a permutation of the whole would need 256 TiB
