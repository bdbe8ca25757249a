"""Codings of supports: exact, the smallest, the same digest whatever the coding; what a head claims is checked before it is believed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

import intarsia as ia
from intarsia import store
from intarsia.edits import Edit, LowRank, Sum, elements
from intarsia.edits import Sparse as SparseEdit
from intarsia.method import Start
from intarsia.methods import Rosa
from intarsia.store import HEAD, TENSORS
from intarsia.store.coding import decode, encode
from intarsia.support import Drawn, Line, sample, sample_rows
from small import adapted, small_net

FORMAT_1 = Path(__file__).parent / "fixtures" / "format-1"
BASE = store.Base("0" * 64, "float32")


def _adapter(edits: dict[str, Edit], seed: int | None = 0) -> store.Adapter:
    return store.Adapter("a", edits, BASE, {"name": "shira"}, {} if seed is None else {"seed": seed})


def _values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _head(folder: Path) -> dict[str, Any]:
    head: dict[str, Any] = json.loads((folder / HEAD).read_text())
    return head


def _honest(folder: Path, head: dict[str, Any]) -> None:
    """Write a head whose own digests fit."""
    head["digest"] = store.json_digest(
        {"edits": head["edits"], "tensors": head["tensors"], "base": head["base"]["digest"]}
    )
    head["checksum"] = store.json_digest({key: value for key, value in head.items() if key != "checksum"})
    (folder / HEAD).write_text(json.dumps(head))


# ------------------------------------------------------------------ format 1
@pytest.mark.parametrize("name", ["shira", "lines", "dora", "rosa"])
@pytest.mark.parametrize("read", [store.read, store.open])
def test_format_1_still_loads_with_its_numbers_and_its_digest(name, read, tmp_path):
    expected = json.loads((FORMAT_1 / "expected.json").read_text())[name]
    adapter = read(FORMAT_1 / name)
    assert adapter.digest == expected["digest"]
    assert adapter.facts() == expected["edits"]
    tensors = adapter.tensors()
    assert {k: list(t.shape) for k, t in tensors.items()} == expected["shapes"]
    assert {k: t.flatten()[:5].tolist() for k, t in tensors.items()} == expected["tensors"]
    assert {k: float(t.double().sum()) for k, t in tensors.items()} == expected["sums"]
    again = store.write(adapter, tmp_path / "again")
    assert _head(again)["format"] == 2
    assert store.read(again).digest == expected["digest"]
    ia.load(small_net(), FORMAT_1 / name, any_base=True)


def test_format_1_has_no_codings(tmp_path):
    folder = store.write(store.read(FORMAT_1 / "shira"), tmp_path / "a")
    _honest(folder, _head(folder) | {"format": 1})
    with pytest.raises(ia.IntarsiaError, match="format 1 has no codings"):
        store.open(folder)


# ------------------------------------------------------------------ gaps
def _by_hand(stored: torch.Tensor) -> list[int]:
    """The definition in docs/format.md, number by number."""
    most = torch.iinfo(stored.dtype).max
    found, at, sum_ = [], 0, 0
    for number in stored.tolist():
        sum_ += number
        if number != most:
            found.append(sum_ + at)
            at += 1
    return found


@settings(max_examples=150)
@given(data=st.data(), top=st.sampled_from([100, 5_000, 200_000, 2**31 - 1, 2**40]))
def test_gaps_are_exact_and_never_larger_than_plain(data, top):
    index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, top - 1), max_size=300))), dtype=torch.int64)
    plain = index.to(torch.int32 if top < 2**31 else torch.int64)
    shape = (1, top)
    entry, stored = encode(plain, shape, top, None)
    assert stored is not None
    assert stored.nbytes <= plain.nbytes
    if not entry:
        assert torch.equal(stored, plain)
        return
    assert entry["coding"] == "gaps"
    assert torch.equal(decode(entry, shape, stored), index)
    assert _by_hand(stored) == index.tolist()


def test_dense_supports_take_a_byte_and_thin_ones_two():
    for step, dtype in ((1, torch.uint8), (200, torch.uint8), (254, torch.uint8), (1000, torch.uint16)):
        index = torch.arange(2000, dtype=torch.int32) * step
        entry, stored = encode(index, (2000, 1000), 2_000_000, None)
        assert stored is not None
        assert (stored.dtype, len(stored)) == (dtype, 2000)
        assert torch.equal(decode(entry, (2000, 1000), stored), index.long())


@pytest.mark.parametrize("gap", [254, 255, 256, 509, 510, 511, 65534 * 3, 65535, 65536, 65535 * 2 + 1])
def test_gaps_at_the_escape_come_back(gap):
    index = torch.cat([torch.arange(500), torch.tensor([499 + gap, 499 + 2 * gap])])
    entry, stored = encode(index.to(torch.int32), (1, 10**6), 10**6, None)
    assert entry["coding"] == "gaps"
    assert stored is not None
    assert torch.equal(decode(entry, (1, 10**6), stored), index)


def _gapped(tmp_path: Path) -> Path:
    index = torch.arange(1000) * 7 + torch.arange(1000) // 3
    return store.write(_adapter({"up.weight": elements((100, 100), index, _values(1000))}), tmp_path / "gaps")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.index_fill(0, torch.tensor([5]), 3), "bytes do not match its digest"),
        (lambda t: t[:-1].clone(), "1000 gaps are said to be stored, found 999"),
        (lambda t: t.to(torch.int32), "found 1000 numbers of torch.int32; expected one row of uint8 or uint16"),
        (lambda t: t.view(2, -1), "found nothing"),
    ],
)
def test_damaged_gaps_are_refused(change, message, tmp_path):
    folder = _gapped(tmp_path)
    tensors = load_file(folder / TENSORS)
    tensors["up.weight.indices"] = change(tensors["up.weight.indices"])
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ia.IntarsiaError, match=f"up.weight.*{message}"):
        store.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.index_fill(0, torch.tensor([5]), 255), "holds 999 gaps, expected 1000"),
        (lambda t: torch.cat([t, t.new_tensor([255])]), "holds 1000 gaps, expected 1000"),
        (lambda t: torch.cat([t, t.new_tensor([9])]), "holds 1001 gaps, expected 1000"),
        (lambda t: t.index_fill(0, torch.tensor([5]), 9), "do not match its digest"),
        (lambda t: t.new_full((1000,), 254), "do not match its digest"),
    ],
)
def test_gaps_are_checked_even_where_their_bytes_fit(change, message, tmp_path):
    folder = _gapped(tmp_path)
    tensors, head = load_file(folder / TENSORS), _head(folder)
    stored = change(tensors["up.weight.indices"])
    save_file(tensors | {"up.weight.indices": stored}, folder / TENSORS)
    head["codings"]["up.weight.indices"]["sha256"] = store.tensor_digest(stored)
    _honest(folder, head)
    with pytest.raises(ia.IntarsiaError, match=message):
        store.read(folder)


@pytest.mark.parametrize("coding", ["zip", None, ["gaps"], "seed"])
def test_an_unknown_coding_is_refused(coding, tmp_path):
    folder = _gapped(tmp_path)
    head = _head(folder)
    head["codings"]["up.weight.indices"]["coding"] = coding
    _honest(folder, head)
    with pytest.raises(
        ia.IntarsiaError,
        match="unexpected tensor"
        if coding == "seed"
        else "this version knows gaps, masks, nonzero, normal, ranks, rice, same, seed",
    ):
        store.open(folder)


def test_gaps_that_lead_out_of_the_weight_are_refused(tmp_path):
    folder = _gapped(tmp_path)
    tensors, head = load_file(folder / TENSORS), _head(folder)
    stored = tensors["up.weight.indices"].new_full((1000,), 254)
    save_file(tensors | {"up.weight.indices": stored}, folder / TENSORS)
    head["codings"]["up.weight.indices"]["sha256"] = store.tensor_digest(stored)
    index = decode(head["codings"]["up.weight.indices"], (100, 100), stored)
    head["tensors"]["up.weight.indices"] = store.tensor_digest(index.to(torch.int32))
    _honest(folder, head)
    with pytest.raises(ia.IntarsiaError, match=r"reach from 254 to 254999; expected .* 0\.\.9999"):
        store.read(folder)


# ------------------------------------------------------------------ seeds
@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (ia.Shira(density=0.1), None),
        (ia.Shira(density=0.2, granularity="line", width=2), None),
        (ia.Shira(density=0.1, budget="neuron"), 24),
        (ia.Dora(ia.Shira(density=0.1)), None),
        (Rosa(rank=2, density=0.1, scorer="random"), None),
    ],
    ids=["elements", "lines", "by row", "dora", "rosa"],
)
def test_a_random_support_stores_no_indices(method, rows, tmp_path):
    model = adapted(method)
    folder = ia.save(model, tmp_path / "a")
    stored, codings = load_file(folder / TENSORS), _head(folder)["codings"]
    assert not [name for name in stored if name.endswith("indices")]
    assert {name.rpartition(".")[0] for name in codings} == {"up.weight", "down.weight", "again.weight"}
    assert {entry["coding"] for entry in codings.values()} == {"seed"}
    key = Start.at("up", 0).key
    part = next(name for name in codings if name.startswith("up."))
    entry = codings[part]
    assert (int(entry["key"], 16), entry.get("rows")) == (key, rows)
    units, count = entry["units"], entry["count"]
    if rows is None:
        expected = sample(units, count, key)
    else:
        each = sample_rows(rows, units // rows, count // rows, key)
        expected = (each + torch.arange(rows)[:, None] * (units // rows)).view(-1)
    back = store.read(folder)
    assert torch.equal(back.tensors()[part], expected.to(torch.int32))
    assert back.digest == ia.export(model).digest


def _permute_by_hand(x: int, n: int, keys: list[int]) -> int:
    """As docs/format.md defines it, for a reader without our code."""
    b = max(2, (n - 1).bit_length())
    low = b // 2
    width = (b - low, low)
    while True:
        left, right = x >> low, x % 2**low
        for i in range(4):
            left, right = right, left ^ _mix_by_hand(right ^ keys[i]) % 2 ** width[i % 2]
        x = left << low | right
        if x < n:
            return x


def _mix_by_hand(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("n", [1, 2, 7, 384, 1000, 4097, 2**33])
def test_the_generator_is_the_one_that_the_page_defines(n):
    key, k = Start.at("up", 3).key, min(n, 20)
    assert key == int.from_bytes(hashlib.blake2b(b"3:up", digest_size=8).digest(), "little") >> 1
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=16).digest()
    keys = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(4)]
    assert Drawn(key).index(n, k).tolist() == sorted(_permute_by_hand(x, n, keys) for x in range(k))
    rows = []
    for i in range(3):
        mixed = [_mix_by_hand(_mix_by_hand(i + 1) ^ each) for each in keys]
        rows += [i * n + x for x in sorted(_permute_by_hand(x, n, mixed) for x in range(k))]
    assert Drawn(key, 3).index(3 * n, 3 * k).tolist() == rows


def test_any_random_support_gets_its_seed_whatever_drew_it(tmp_path):
    """No method is asked: the support is compared with what the key of its making draws."""
    shape, seed = (60, 50), 7
    random = sample(3000, 300, Start.at("one", seed).key)
    other = sample(3000, 300, Start.at("one", seed + 1).key)
    line = Line(width=5)
    lines = sample(line.units(shape), 40, Start.at("three", seed).key)
    edits: dict[str, Edit] = {
        "one.weight": elements(shape, random, _values(300)),
        "two.weight": elements(shape, other, 1 + _values(300)),
        "three.weight": SparseEdit(shape, line, lines, _values(40, 5)),
    }
    head = _head(store.write(_adapter(edits, seed), tmp_path / "a"))
    assert {k: e["coding"] for k, e in head["codings"].items()} == {
        "one.weight.indices": "seed", "two.weight.indices": "gaps", "three.weight.indices": "seed",
    }  # fmt: skip
    head = _head(store.write(_adapter(edits, None), tmp_path / "b"))
    assert {e["coding"] for e in head["codings"].values()} == {"gaps"}


def test_a_support_that_moved_is_stored(tmp_path):
    model = adapted(ia.Shira(density=0.1))
    edit = ia.export(model).edits["up.weight"]
    assert isinstance(edit, SparseEdit)
    free = sorted(set(range(384)) - set(edit.index.tolist()))[0]
    index = torch.cat([edit.index[1:], torch.tensor([free])]).sort().values
    moved = SparseEdit(edit.shape, edit.granularity, index, edit.values)
    folder = store.write(_adapter({"up.weight": moved}), tmp_path / "a")
    assert "up.weight.indices" in load_file(folder / TENSORS)
    assert torch.equal(store.read(folder).tensors()["up.weight.indices"].long(), index)


def test_a_wrong_seed_is_found(tmp_path):
    folder = ia.save(adapted(ia.Shira(density=0.1)), tmp_path / "a")
    head = _head(folder)
    head["codings"]["up.weight.indices"]["key"] = "0" * 16
    _honest(folder, head)
    with pytest.raises(ia.IntarsiaError, match=r"up.weight.indices: its bytes do not match its digest"):
        store.read(folder)


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"count": 10**12, "units": 10**13}, "count 1000000000000; expected a whole number up to the weight's entries"),
    ({"count": 384}, r"values are \(38,\); 384 indices need \(384,\)"),
    ({"count": -1}, "count -1"),
    ({"count": True}, "count True"),
    ({"count": 38.0}, "count 38.0"),
    ({"count": None}, "count None"),
    ({"count": 10**400}, "count 1000"),
    ({"units": 37}, "units 37"),
    ({"units": 385}, "units 385"),
    ({"units": "384"}, "units '384'"),
    ({"key": "0"}, "key '0'"),
    ({"key": "g" * 16}, "key 'g"),
    ({"key": 5}, "key 5"),
    ({"rows": 5}, "rows 5; expected a divisor"),
    ({"rows": 0}, "rows 0"),
    ({"coding": "zip"}, "missing tensor up.weight.indices"),
    ({"coding": ["seed"]}, "missing tensor up.weight.indices"),
    ({"coding": "gaps"}, "missing tensor up.weight.indices"),
    ({"coding": "same", "as": "up.weight.indices"}, "same as what is no stored tensor"),
    ({"coding": "same", "as": "gone"}, "same as what is no stored tensor"),
    ({"coding": "same", "as": ["up.weight.values"]}, "same as what is no stored tensor"),
    ({"coding": "same", "as": "up.weight.values"}, "indices are .* torch.float32"),
    ({"coding": "same", "as": "again.weight.indices"}, "another digest"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=str)
def test_a_coding_is_checked_before_anything_is_drawn(change, message, tmp_path):
    folder = ia.save(adapted(ia.Shira(density=0.1)), tmp_path / "a")
    head = _head(folder)
    head["codings"]["up.weight.indices"] |= change
    _honest(folder, head)
    drawn = mock.Mock(side_effect=AssertionError("it was drawn"))
    late = "digest" in message
    with (
        mock.patch.object(Drawn, "index", Drawn.index if late else drawn),
        pytest.raises(ia.IntarsiaError, match=message),
    ):
        store.read(folder) if late else store.open(folder)


def test_a_coding_of_no_tensor_is_refused(tmp_path):
    folder = ia.save(adapted(ia.Shira(density=0.1)), tmp_path / "a")
    head = _head(folder)
    head["codings"]["gone.weight.indices"] = head["codings"]["up.weight.indices"]
    _honest(folder, head)
    with pytest.raises(ia.IntarsiaError, match="a coding of gone.weight.indices, which is no tensor of it"):
        store.open(folder)


# ------------------------------------------------------------------ the same whatever the coding
def test_the_digest_does_not_depend_on_the_coding(tmp_path):
    index = torch.arange(1000) * 7
    adapter = _adapter(
        {
            "up.weight": elements((100, 100), index, _values(1000)),
            "one.weight": LowRank((9, 8), _values(9, 2), _values(2, 8), 2.0),
        }
    )
    compact = store.write(adapter, tmp_path / "compact")
    plain = store.write(adapter, tmp_path / "plain", coding="plain")
    assert (compact / TENSORS).stat().st_size < (plain / TENSORS).stat().st_size
    assert store.read(compact).digest == store.read(plain).digest == adapter.digest
    assert _head(compact)["digest"] == _head(plain)["digest"] == adapter.digest
    again = store.write(store.open(plain), tmp_path / "again")
    assert (again / TENSORS).read_bytes() == (compact / TENSORS).read_bytes()
    tensors = load_file(plain / TENSORS)
    assert torch.equal(tensors["up.weight.indices"], index.to(torch.int32))


def test_an_unknown_coding_or_type_is_refused_before_anything_is_written(tmp_path):
    model = adapted(ia.Shira(density=0.1))
    with pytest.raises(ia.IntarsiaError, match="coding='plane'; did you mean 'plain'"):
        ia.save(model, tmp_path / "a", coding="plane")
    with pytest.raises(ia.IntarsiaError, match="values='int8'; expected one of bfloat16, float16"):
        ia.save(model, tmp_path / "a", values="int8")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ nothing twice
def _twins(count: int = 3) -> dict[str, Edit]:
    index, A = torch.arange(400) * 6, _values(2, 300)
    edits: dict[str, Edit] = {f"{i}.weight": elements((50, 50), index, _values(400) + i) for i in range(count)}
    return edits | {f"low{i}.weight": LowRank((20, 300), _values(20, 2) + i, A, 2.0) for i in range(count)}


def test_no_tensor_is_stored_twice(tmp_path):
    adapter = _adapter(_twins())
    folder = store.write(adapter, tmp_path / "a")
    stored = load_file(folder / TENSORS)
    assert sorted(name for name in stored if name.endswith(("indices", ".A"))) == ["0.weight.indices", "low0.weight.A"]
    back = store.read(folder)
    assert back.digest == adapter.digest
    for name, tensor in adapter.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
    low = [back.edits[f"low{i}.weight"] for i in range(3)]
    assert len({edit.A.data_ptr() for edit in low if isinstance(edit, LowRank)}) == 1
    plain = store.write(adapter, tmp_path / "plain", coding="plain")
    assert load_file(plain / TENSORS).keys() == adapter.tensors().keys()


def test_values_that_are_all_the_same_are_no_bomb(tmp_path):
    """Hundreds of supports over one row of values would be a small file that fills the memory: it is not written so, and not read."""
    edits: dict[str, Edit] = {
        f"{i}.weight": elements((200, 200), sample(40_000, 4000, Start.at(str(i), 0).key), _values(4000))
        for i in range(80)
    }
    folder = store.write(_adapter(edits), tmp_path / "a")
    tensors, head = load_file(folder / TENSORS), _head(folder)
    assert len(tensors) == 80
    for i in range(1, 80):
        del tensors[f"{i}.weight.values"]
        head["codings"][f"{i}.weight.values"] = {"coding": "same", "as": "0.weight.values"}
    save_file(tensors, folder / TENSORS)
    _honest(folder, head)
    with pytest.raises(ia.IntarsiaError, match="it claims 320,000 indices, and .* made to fill memory"):
        store.open(folder)


# ------------------------------------------------------------------ rounded
@pytest.mark.parametrize("values", ["bfloat16", "float16"])
def test_values_are_rounded_once_and_the_file_says_so(values, tmp_path):
    model = adapted(Rosa(rank=2, density=0.1, scorer="random"))
    adapter = ia.export(model)
    folder = ia.save(model, tmp_path / "a", values=values)
    back, dtype = store.read(folder), getattr(torch, values)
    for name, tensor in adapter.tensors().items():
        expected = tensor if name.endswith("indices") else tensor.to(dtype)
        assert back.tensors()[name].dtype == expected.dtype
        assert torch.equal(back.tensors()[name], expected)
    assert back.digest == adapter.rounded(values).digest == _head(folder)["digest"] != adapter.digest
    assert _head(folder)["about"]["rounded"] == values
    assert f"| rounded | `{values}` |" in (folder / "README.md").read_text()
    assert isinstance(adapter.edits["up.weight"], Sum)
    net, deck_net = small_net(), small_net()
    ia.load(net, folder, any_base=True)
    deck = ia.Deck(deck_net)
    deck.add(folder)
    deck.use("a")


def test_lengths_of_rescaled_edits_stay_wide():
    adapter = ia.export(adapted(ia.Dora(ia.Shira(density=0.1))))
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in adapter.rounded("bfloat16").tensors().items()}
    assert dtypes == {"indices": torch.int32, "values": torch.bfloat16, "magnitude": torch.float32}


def test_numbers_too_large_for_the_type_are_refused(tmp_path):
    adapter = _adapter({"up.weight": elements((9, 9), torch.arange(2), torch.tensor([1.0, 1e5]))})
    with pytest.raises(ia.IntarsiaError, match=r"up.weight.values: numbers that float16 cannot hold"):
        store.write(adapter, tmp_path / "a", values="float16")
    assert list(tmp_path.iterdir()) == []
    store.write(adapter, tmp_path / "a", values="bfloat16")
