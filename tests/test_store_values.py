"""Codings of values and the tight ones of supports: exact to the bit, as small as the formulas say, whatever the machine's order of bytes."""

from __future__ import annotations

import itertools
import json
import math
import sys
import zlib
from pathlib import Path
from statistics import NormalDist
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

import intarsia as ia
from intarsia import store
from intarsia.edits import Dense, Edit, LowRank, elements
from intarsia.method import Start
from intarsia.store import HEAD, TENSORS, Code, packing
from intarsia.store.coding import decode, encode
from intarsia.store.normal import BITS, levels
from intarsia.store.tensorfile import TensorFile
from intarsia.store.values import decode_values, encode_values, shape_of
from intarsia.support import permute, ranks, sample

FORMAT_2 = Path(__file__).parent / "fixtures" / "format-2"
BASE = store.Base("0" * 64, "float32")
PHI = (1 + 5**0.5) / 2  # the golden ratio


def _adapter(edits: dict[str, Edit], **more: Any) -> store.Adapter:
    return store.Adapter("a", edits, BASE, {"name": "any"}, {"seed": 0}, **more)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _three(count: int, density: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of -0.3, 0 and 0.3, so many of them not 0."""
    x = _normal(count)
    return torch.where(x.abs() >= x.abs().quantile(1 - density), 0.3 * x.sign(), torch.zeros(())).to(dtype)


def _head(folder: Path) -> dict[str, Any]:
    head: dict[str, Any] = json.loads((folder / HEAD).read_text())
    return head


def _honest(folder: Path, head: dict[str, Any]) -> None:
    head["digest"] = store.json_digest(
        {"edits": head["edits"], "tensors": head["tensors"], "base": head["base"]["digest"]}
    )
    head["checksum"] = store.json_digest({key: value for key, value in head.items() if key != "checksum"})
    (folder / HEAD).write_text(json.dumps(head))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.numpy(force=True).tobytes() == other.numpy().tobytes()
    )


# ------------------------------------------------------------------ format 2
@pytest.mark.parametrize("name", ["seed", "rows", "rosa", "gaps"])
@pytest.mark.parametrize("read", [store.read, store.open])
def test_format_2_still_loads_with_its_numbers_and_its_digest(name, read, tmp_path):
    expected = json.loads((FORMAT_2 / "expected.json").read_text())[name]
    adapter = read(FORMAT_2 / name)
    tensors = adapter.tensors()
    assert adapter.digest == expected["digest"]
    assert {k: t.flatten()[:5].tolist() for k, t in tensors.items()} == expected["tensors"]
    assert {k: float(t.double().sum()) for k, t in tensors.items()} == expected["sums"]
    head = _head(store.write(adapter, tmp_path / "again"))
    assert head["format"] == 2, "a file that needs nothing new is one that older versions read"
    assert {k: entry["coding"] for k, entry in head["codings"].items()} == expected["codings"]


def test_a_file_with_a_new_coding_says_format_3(tmp_path):
    folder = store.write(_adapter({"a.weight": Dense((50, 40), _three(2000, 0.2).view(50, 40))}), tmp_path / "a")
    head = _head(folder)
    assert head["format"] == 3
    _honest(folder, head | {"format": 2})
    with pytest.raises(ia.IntarsiaError, match="format 2 has no coding ternary"):
        store.open(folder)


# ------------------------------------------------------------------ packing
@settings(max_examples=60)
@given(bits=st.integers(0, 20), data=st.data())
def test_packed_numbers_come_back_and_the_first_is_in_the_lowest_bits(bits, data):
    numbers = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), dtype=np.int64)
    packed = packing.pack(numbers, bits)
    assert len(packed) == math.ceil(bits * len(numbers) / 8)
    assert packing.unpack(packed, len(numbers), bits).tolist() == numbers.tolist()
    assert int.from_bytes(packed.tobytes(), "little") == sum(int(n) << bits * i for i, n in enumerate(numbers))


def _rice_by_hand(data: bytes, count: int, bits: int) -> list[int]:
    """The definition in docs/format.md, bit by bit."""
    stream = [byte >> i & 1 for byte in data for i in range(8)]
    low, found = -(-count * bits // 8) * 8, []
    at = low
    for i in range(count):
        high = 0
        while not stream[at]:
            high, at = high + 1, at + 1
        at += 1
        found.append(high << bits | sum(stream[i * bits + j] << j for j in range(bits)))
    return found


@settings(max_examples=60)
@given(numbers=st.lists(st.integers(0, 3000), min_size=1, max_size=60), bits=st.integers(0, 12))
def test_rice_codes_come_back_and_are_what_the_page_defines(numbers, bits):
    data = packing.rice_encode(np.array(numbers, dtype=np.int64), bits)
    assert packing.rice_decode(data, len(numbers), bits).tolist() == numbers
    assert _rice_by_hand(data.tobytes(), len(numbers), bits) == numbers
    best = packing.rice_bits(np.array(numbers, dtype=np.int64))
    sizes = {b: sum(b + 1 + (n >> b) for n in numbers) for b in range(14)}
    assert sizes[best] <= sizes[min(sizes, key=lambda b: (sizes[b], b))] * 1.05


# ------------------------------------------------------------------ ternary
CARD = {0.05: (0.339, 47.2), 0.1: (0.576, 27.8), 0.2: (0.939, 17.0), 0.3: (1.188, 13.5), 0.5: (1.5, 10.7)}


def _formula(k: float) -> tuple[int, float]:
    """ComPEFT sec. 2.2: the parameter of the code, and bits a number: k (b_pos + 1)."""
    b = 1 + math.floor(math.log2(math.log(PHI - 1) / math.log(1 - k)))
    return b, k * (b + 1 / (1 - (1 - k) ** (2**b)) + 1)


@pytest.mark.parametrize("density", CARD)
def test_a_million_numbers_take_what_the_formula_says(density, tmp_path):
    count, (b, bits) = 1_000_000, _formula(density)
    assert (round(bits, 3), round(16 / bits, 1)) == pytest.approx(CARD[density], rel=2e-3)
    kept = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: round(density * count)]
    values = torch.zeros(count).index_fill(0, kept, 0.01)
    values[kept[::2]] *= -1
    folder = store.write(_adapter({"a.weight": Dense((1000, 1000), values.view(1000, 1000))}), tmp_path / "a")
    stored = load_file(folder / TENSORS)["a.weight.values"]
    formula = (bits * count + 16) / 8
    assert stored.nbytes == pytest.approx(formula, rel=0.02)
    assert sum(path.stat().st_size for path in folder.iterdir() if path.name == TENSORS) == pytest.approx(
        formula, rel=0.02
    )
    # One code is as good as the next one where their sizes cross.
    assert _head(folder)["codings"]["a.weight.values"]["bits"] in (b, b - 1, b + 1)
    assert _same_bits(store.read(folder).tensors()["a.weight.values"], values.view(1000, 1000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_three_values_come_back_to_the_bit(dtype, masks, density):
    values = _three(4000, density, dtype).view(40, 100)
    found = encode_values(values, masks=masks)
    assert found is not None
    entry, stored = found
    assert entry["coding"] == ("masks" if masks else "ternary")
    assert entry.get("dtype", "float32") == str(values.dtype).removeprefix("torch.")
    assert shape_of(entry, (stored.dtype, len(stored))) == ((40, 100), dtype)
    back, code = decode_values(entry, stored)
    assert code is None
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))
    if masks:
        assert len(stored) == dtype.itemsize + 2 * 500
    elif density == 1.0:
        assert len(stored) == dtype.itemsize + 500, "where nothing is 0 only the signs are stored"


@settings(max_examples=120)
@given(
    numbers=hnp.arrays(
        np.float32, st.integers(1, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    places=st.lists(st.tuples(st.integers(0, 2999), st.integers(0, 2)), max_size=300),
    fill=st.sampled_from([0.0, -0.0, 0.5, -0.5]),
)
def test_any_numbers_come_back_to_the_bit_however_they_are_coded(numbers, places, fill):
    values = torch.full((3000,), fill)
    for place, which in places:
        values[place] = float(numbers[which % len(numbers)])
    for masks in (False, True):
        found = encode_values(values, masks=masks)
        if found is not None:
            back, _ = decode_values(*found)
            assert _same_bits(back, values)
            assert found[1].nbytes < values.nbytes


def test_what_is_not_sparse_is_stored_as_it_is():
    assert encode_values(_normal(3000)) is None
    assert encode_values(_normal(0)) is None
    assert encode_values(_three(30, 0.3)) is None, "the head would take more than is saved"
    assert encode_values(torch.arange(3000)) is None


@pytest.mark.parametrize("kept", [0, 1, 2000])
def test_hardly_any_signs_among_zeros_are_no_bomb(kept, tmp_path):
    """Four bytes for a million zeros would be refused by a reader: two masks are written, a quarter of a byte for each."""
    values = torch.zeros(1000, 1000)
    values.view(-1)[:kept] = 1.0
    folder = store.write(_adapter({"a.weight": Dense((1000, 1000), values)}), tmp_path / "a")
    assert _head(folder)["codings"]["a.weight.values"]["coding"] == "masks"
    assert load_file(folder / TENSORS)["a.weight.values"].nbytes == 4 + 2 * 125_000
    assert _same_bits(store.read(folder).tensors()["a.weight.values"], values)


# ------------------------------------------------------------------ normal
@pytest.mark.parametrize("bits", BITS)
def test_the_levels_are_the_medians_of_a_standard_normal(bits):
    q, cdf = levels(bits).astype(float), NormalDist().cdf
    assert len(q) == 2**bits
    assert (q == -q[::-1]).all()
    assert (np.diff(q) > 0).all()
    bounds = [0.0, *map(cdf, (q[:-1] + q[1:]) / 2), 1.0]
    for i, level in enumerate(q):
        assert cdf(level) == pytest.approx((bounds[i] + bounds[i + 1]) / 2, abs=4e-6)  # levels are multiples of 2^-16


def test_the_levels_are_the_authors():
    assert levels(1).tolist() == pytest.approx([-0.6745, 0.6745], abs=5e-5)
    assert levels(2).tolist() == pytest.approx([-1.2657, -0.3778, 0.3778, 1.2657], abs=1e-4)
    assert ((levels(2)[1:] + levels(2)[:-1]) / 2).tolist() == pytest.approx([-0.8217, 0, 0.8217], abs=1e-4)
    assert levels(4)[-1] == pytest.approx(2.2655, abs=5e-5)
    q = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
    for _ in range(500):  # as they make the table
        cuts = [0.0, *(NormalDist().cdf(t) for t in (q[:-1] + q[1:]) / 2), 1.0]
        q = np.array([NormalDist().inv_cdf((a + b) / 2) for a, b in itertools.pairwise(cuts)])
    assert levels(4).tolist() == pytest.approx(q.tolist(), abs=2e-5)


def test_the_table_is_part_of_the_format():
    """Whatever changes a level would change what files say."""
    found = {bits: store.tensor_digest(torch.from_numpy(levels(bits).copy()))[:16] for bits in BITS}
    assert found == TABLES


TABLES = {1: "02829aa571cbadae", 2: "b9a176922f1ed727", 4: "2be1a99461a31a30", 8: "44eebae767f2fdff"}


@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_takes_b_bits_a_number_and_8_bytes(bits, tmp_path):
    weight = 3 + 2 * _normal(70, 61)
    code = Code.of(weight, bits)
    rounded = code.rounded(weight)
    mu, sd = np.float32(weight.double().mean()), np.float32(weight.double().std())
    assert (code.mu, code.sd) == (float(mu), float(sd))
    assert len(rounded.unique()) <= 2**bits
    if bits == 1:
        assert sorted(rounded.unique().tolist()) == pytest.approx([mu - 0.6745 * sd, mu + 0.6745 * sd], rel=1e-4)
    nearest = (weight.view(-1, 1).double() - torch.from_numpy(code.table.astype(float))).abs().argmin(1)
    assert code.nearest(weight).tolist() == nearest.tolist()
    folder = store.write(
        _adapter({"a.weight": Dense((70, 61), rounded)}, codes={"a.weight.values": code}), tmp_path / "a"
    )
    stored = load_file(folder / TENSORS)["a.weight.values"]
    assert len(stored) == math.ceil(bits * 70 * 61 / 8) + 8
    first = stored.numpy()[8:][0] & (2**bits - 1)
    assert first == nearest[0], "the first number is in the lowest bits"
    back = store.read(folder)
    assert _same_bits(back.tensors()["a.weight.values"], rounded)
    assert back.codes == {"a.weight.values": code}
    again = store.write(back, tmp_path / "again")
    assert (again / TENSORS).read_bytes() == (folder / TENSORS).read_bytes(), "what was read is stored as it was"


@settings(max_examples=40)
@given(weight=hnp.arrays(np.float32, (12, 30), elements=st.floats(-1e4, 1e4, width=32)), bits=st.sampled_from(BITS))
def test_rounding_twice_changes_nothing_and_files_are_exact(weight, bits):
    tensor = torch.from_numpy(weight).repeat(4, 1)
    code = Code.of(tensor, bits)
    rounded = code.rounded(tensor)
    found = encode_values(rounded, code)
    if found is not None:
        assert _same_bits(decode_values(*found)[0], rounded)


def test_numbers_that_are_not_in_their_code_are_stored_as_they_are(tmp_path):
    weight = _normal(40, 40)
    folder = store.write(
        _adapter({"a.weight": Dense((40, 40), weight)}, codes={"a.weight.values": Code.of(weight, 4)}), tmp_path / "a"
    )
    assert _head(folder)["codings"] == {}
    assert _same_bits(store.read(folder).tensors()["a.weight.values"], weight)


# ------------------------------------------------------------------ supports
@pytest.mark.parametrize("n", [2, 7, 384, 4097, 2**33])
def test_ranks_are_the_inverse_of_the_permutation(n):
    numbers = torch.arange(min(n, 300))
    assert torch.equal(ranks(permute(numbers, n, 5), n, 5), numbers)
    assert torch.equal(permute(ranks(numbers, n, 5), n, 5), numbers)


@pytest.mark.parametrize("seeded", [True, False])
def test_a_part_of_a_drawn_support_takes_what_is_left_of_it(seeded, tmp_path):
    shape, drawn, kept = (1000, 1000), 10_000, 1000
    index = sample(10**6, drawn, Start.at("a", 0 if seeded else 1).key)[torch.arange(kept) * 10]
    signs = _normal(kept).sign() * 0.01
    folder = store.write(_adapter({"a.weight": elements(shape, index, signs)}), tmp_path / "a")
    entry, stored = _head(folder)["codings"]["a.weight.indices"], load_file(folder / TENSORS)
    _, bits = _formula(kept / (drawn if seeded else 10**6))
    assert entry["coding"] == ("ranks" if seeded else "rice")
    assert stored["a.weight.indices"].nbytes * 8 == pytest.approx(
        kept * (bits / (kept / (drawn if seeded else 10**6)) - 1), rel=0.05
    )
    assert stored["a.weight.values"].nbytes == 4 + kept // 8
    back = store.read(folder)
    assert torch.equal(back.tensors()["a.weight.indices"].long(), index)
    assert _same_bits(back.tensors()["a.weight.values"], signs)


@settings(max_examples=100)
@given(data=st.data(), top=st.sampled_from([100, 5_000, 200_000, 2**31 - 1, 2**40]), key=st.none() | st.integers(0, 9))
def test_tight_supports_are_exact(data, top, key):
    index = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, top - 1), min_size=1, max_size=300))), dtype=torch.int64
    )
    plain = index.to(torch.int32 if top < 2**31 else torch.int64)
    entry, stored = encode(plain, (1, top), top, key, tight=True)
    if entry["coding"] == "seed":
        return
    assert stored is not None
    assert torch.equal(decode(entry, (1, top), stored), index)


# ------------------------------------------------------------------ the machine's order of bytes
def _mixed() -> store.Adapter:
    weight = _normal(60, 50)
    code = Code.of(weight, 4)
    edits: dict[str, Edit] = {
        "three.weight": LowRank((60, 50), _three(1200, 0.3).view(60, 20), _three(1000, 0.3).view(20, 50), 2.0),
        "zeros.weight": Dense((60, 50), weight * (weight > 1)),
        "normal.weight": Dense((60, 50), code.rounded(weight)),
        "part.weight": elements((60, 50), torch.arange(900) * 3, _three(900, 1.0)),
        "plain.weight": elements((60, 50), torch.arange(40) * 7, _normal(40)),
    }
    return _adapter(edits, codes={"normal.weight.values": code})


def test_the_file_says_the_same_bytes_for_ever(tmp_path):
    """Coded tensors, byte by byte: numbers stand in a file with their lowest byte first."""
    values = torch.zeros(2000)
    values[[0, 3, 1999]] = torch.tensor([1.5, -1.5, 1.5])
    entry, stored = encode_values(values)  # type: ignore[misc]
    assert (entry["kept"], entry["coding"]) == (3, "ternary")
    assert stored[:4].tolist() == [0x00, 0x00, 0xC0, 0x3F]  # 1.5
    assert int(stored[-1]) == 0b010
    assert _rice_by_hand(bytes(stored[4:-1].tolist()), 3, entry["bits"]) == [0, 2, 1995]
    weight = torch.tensor([1.0, -1.0]).repeat(500)
    entry, stored = encode_values(Code(1, 0.5, 2.0).rounded(weight), Code(1, 0.5, 2.0))  # type: ignore[misc]
    assert bytes(stored[:8].tolist()) == bytes([0, 0, 0, 0x3F, 0, 0, 0, 0x40])
    assert set(stored[8:].tolist()) == {0b01010101}


def test_a_machine_of_the_other_order_reads_the_same_numbers(tmp_path, monkeypatch):
    """Its memory is simulated: there a number's bytes stand the other way round, so what is read as plain numbers must come out turned."""
    adapter = _mixed()
    folder = store.write(adapter, tmp_path / "a")
    coded = _head(folder)["codings"]
    assert {entry["coding"] for entry in coded.values()} == {"ternary", "nonzero", "normal", "rice"}
    before = {name: t.clone() for name, t in store.read(folder).tensors().items()}
    monkeypatch.setattr(sys, "byteorder", "big")
    file = TensorFile.open(folder / TENSORS)
    for name, entry in file.entries.items():
        read = file.read(name)
        if name in coded:  # bytes, and what they say is no matter of the machine
            shape = (60, 50)
            decoded = (
                decode(coded[name], shape, read) if name.endswith("indices") else decode_values(coded[name], read)[0]
            )
            assert torch.equal(decoded.to(before[name].dtype), before[name]), name
        else:
            turned = read.numpy().byteswap()
            assert (turned == before[name].numpy()).all(), name
            # The digest of numbers as they lie in that machine's memory is the file's.
            assert store.tensor_digest(read) == _head(folder)["tensors"][name]
        assert entry.dtype == read.dtype
    assert sys.byteorder == "big"


# ------------------------------------------------------------------ hostile files
HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    (
        "three.weight.A",
        {"shape": [10**6, 10**6]},
        "do not multiply",
    ),
    ("three.weight.A", {"shape": [2**47] * 8}, "more numbers than any weight has"),
    ("three.weight.A", {"shape": [-1, 5]}, "shape"),
    ("three.weight.A", {"shape": "x"}, "shape 'x'; expected a list of whole numbers"),
    ("three.weight.A", {"shape": [True, 5]}, "shape"),
    ("three.weight.A", {"shape": [50, 20]}, "do not multiply"),
    ("three.weight.A", {"kept": 10**12}, "kept 1000000000000; expected a whole number up to its 1000 numbers"),
    ("three.weight.A", {"kept": None}, "kept None"),
    ("three.weight.A", {"bits": 49}, "bits 49"),
    ("three.weight.A", {"bits": -1}, "bits -1"),
    ("three.weight.A", {"bits": 40}, "bytes are stored of it"),
    ("three.weight.A", {"dtype": "int8"}, "dtype 'int8'; expected one of float64, float32"),
    ("three.weight.A", {"dtype": ["float32"]}, "dtype"),
    ("three.weight.A", {"dtype": "float64"}, "A.*(bytes|digest|numbers)"),
    ("three.weight.A", {"coding": "masks"}, "bytes are stored of it; 1000 numbers in the coding masks need 254"),
    ("three.weight.A", {"coding": "normal"}, "1000 numbers in the coding normal need"),
    ("three.weight.A", {"coding": "rice", "count": 10}, "A"),
    ("normal.weight.values", {"bits": 3}, "bits 3; expected one of 1, 2, 4, 8"),
    ("normal.weight.values", {"bits": 8}, "need 3008"),
    ("zeros.weight.values", {"kept": 0}, "bytes are stored"),
    ("part.weight.indices", {"count": 901}, "901 indices need"),
    ("part.weight.indices", {"count": 10**9}, "count 1000000000"),
    ("part.weight.indices", {"bits": 1}, "(holds .* numbers, expected 900|digest|bytes)"),
    ("part.weight.indices", {"bits": 60}, "bits 60"),
    ("part.weight.indices", {"coding": "ranks", "units": 10, "key": "0" * 16}, "units 10"),
    ("part.weight.indices", {"coding": "ranks", "units": 3000, "key": "x"}, "key 'x'"),
    ("part.weight.indices", {"coding": "ranks", "units": 900, "key": "0" * 16}, "lie beyond 899"),
    ("part.weight.indices", {"coding": "ranks", "units": 3000, "key": "0" * 16}, "digest"),
    ("part.weight.indices", {"coding": "ternary", "shape": [900], "kept": 900}, "indices.*bytes are stored of it"),
]


@pytest.mark.parametrize(("name", "change", "message"), HOSTILE)
def test_what_a_head_claims_is_checked_before_it_is_believed(name, change, message, tmp_path):
    folder = store.write(_mixed(), tmp_path / "a")
    head = _head(folder)
    head["codings"][name] |= change
    _honest(folder, head)
    with pytest.raises(ia.IntarsiaError, match=message):
        store.read(folder)


@pytest.mark.parametrize("coding", ["compact", "masks"])
def test_bytes_that_were_changed_are_refused(coding, tmp_path):
    folder = store.write(_mixed(), tmp_path / "a", coding=coding)
    tensors = load_file(folder / TENSORS)
    for name in _head(folder)["codings"]:
        for at in (0, len(tensors[name]) // 2, len(tensors[name]) - 1):
            changed = tensors[name].clone()
            changed[at] ^= 0x10 if at else 0x80
            save_file(tensors | {name: changed}, folder / TENSORS)
            with pytest.raises(ia.IntarsiaError, match=name.replace(".", r"\.")):
                store.read(folder)


def test_zeros_that_would_fill_the_memory_are_refused(tmp_path):
    """A hundred million numbers of which none is kept: 12 bytes would make 400 MB."""
    folder = store.write(_mixed(), tmp_path / "a")
    tensors, head = load_file(folder / TENSORS), _head(folder)
    tensors["zeros.weight.values"] = torch.zeros(4, dtype=torch.uint8)
    head["codings"]["zeros.weight.values"] = {"coding": "ternary", "kept": 0, "bits": 48, "shape": [10_000, 10_000]}
    head["edits"]["zeros.weight"]["shape"] = [10_000, 10_000]
    save_file(tensors, folder / TENSORS)
    _honest(folder, head)
    with pytest.raises(ia.IntarsiaError, match="it claims 400,0.* bytes of coded numbers, and .* made to fill memory"):
        store.open(folder)


def test_a_drawn_support_of_hardly_any_values_is_still_readable(tmp_path):
    """Eight bytes of an index for each of a hundred thousand that take no byte themselves, beside values of a few bits."""
    index = sample(10**7, 10**5, Start.at("a", 0).key)
    values = _three(10**5, 0.05)
    folder = store.write(_adapter({"a.weight": elements((10_000, 1000), index, values)}), tmp_path / "a")
    assert _same_bits(store.read(folder).tensors()["a.weight.values"], values)


# ------------------------------------------------------------------ the folder
@pytest.mark.parametrize("coding", ["compact", "masks", "plain"])
def test_the_digest_is_the_same_however_it_is_stored_and_weights_are_read_one_by_one(coding, tmp_path):
    adapter = _mixed()
    folder = store.write(adapter, tmp_path / "a", coding=coding)
    opened = store.open(folder)
    assert opened.digest == adapter.digest == _head(folder)["digest"]
    assert opened.edits.made == ()  # type: ignore[attr-defined]
    assert opened.facts() == adapter.facts()
    assert (opened.bytes, opened.touched) == (adapter.bytes, adapter.touched)
    one = opened.edits["three.weight"]
    assert opened.edits.made == ("three.weight",)  # type: ignore[attr-defined]
    assert _same_bits(one.tensors()["A"], adapter.edits["three.weight"].tensors()["A"])
    for name, tensor in store.read(folder).tensors().items():
        assert _same_bits(tensor, adapter.tensors()[name])


def test_equal_coded_tensors_are_stored_once(tmp_path):
    A = _three(6000, 0.3).view(20, 300)
    edits: dict[str, Edit] = {f"{i}.weight": LowRank((20, 300), _normal(20, 20, seed=i), A, 1.0) for i in range(3)}
    folder = store.write(_adapter(edits), tmp_path / "a")
    assert sorted(name for name in load_file(folder / TENSORS) if name.endswith("A")) == ["0.weight.A"]
    assert _same_bits(store.read(folder).tensors()["2.weight.A"], A)


def test_a_head_has_a_line_for_every_weight(tmp_path):
    folder = store.write(_mixed(), tmp_path / "a")
    lines = (folder / HEAD).read_text().splitlines()
    assert sum(line.startswith('"three.weight"') for line in lines) == 1
    assert sum(line.startswith('"three.weight.A"') for line in lines) == 2  # its digest and its coding


# ------------------------------------------------------------------ the bundle
def _many(count: int = 60) -> store.Adapter:
    edits: dict[str, Edit] = {
        f"layers.{i}.up.weight": LowRank(
            (40, 50), _three(400, 0.3).view(40, 10) * (i + 1), _normal(10, 50, seed=i), 1.0
        )
        for i in range(count)
    }
    return _adapter(edits)


def _unbundled(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The bundle, opened by its description in docs/format.md."""
    tensors = load_file(folder / TENSORS)
    moved = json.loads(zlib.decompress(bytes(tensors["head"].tolist())))
    return moved, tensors


def _rebundle(folder: Path, moved: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """With digests that fit."""
    text = zlib.compress(json.dumps(moved).encode())
    save_file(tensors | {"head": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, folder / TENSORS)
    head = json.loads((folder / HEAD).read_text())
    whole = {k: v for k, v in head.items() if k not in ("bundled", "checksum")} | {
        k: moved[k] for k in moved if k != "lengths"
    }
    head["digest"] = whole["digest"] = store.json_digest(
        {"edits": moved["edits"], "tensors": moved["tensors"], "base": head["base"]["digest"]}
    )
    head["checksum"] = store.json_digest(whole)
    (folder / HEAD).write_text(json.dumps(head))


def test_many_coded_tensors_are_bundled(tmp_path):
    adapter = _many()
    folder = store.write(adapter, tmp_path / "a")
    moved, tensors = _unbundled(folder)
    head = _head(folder)
    assert head["bundled"] is True
    assert not {"edits", "tensors", "codings"} & head.keys()
    assert moved["edits"] == adapter.facts()
    assert tensors.keys() == {"head", "numbers"} | {n for n in adapter.tensors() if n.endswith("A")}
    assert sum(moved["lengths"].values()) == len(tensors["numbers"])
    assert len(moved["lengths"]) == 60
    opened = store.open(folder)
    assert opened.digest == adapter.digest == head["digest"]
    assert opened.edits.made == ()  # type: ignore[attr-defined]
    assert _same_bits(opened.edits["layers.7.up.weight"].tensors()["B"], adapter.tensors()["layers.7.up.weight.B"])
    for name, tensor in store.read(folder).tensors().items():
        assert _same_bits(tensor, adapter.tensors()[name])
    _rebundle(folder, moved, tensors)
    assert store.read(folder).digest == adapter.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m["lengths"].update({"layers.3.up.weight.B": 10**9}), "lengths .* are no whole numbers"),
        (lambda m, t: m["lengths"].update({"layers.3.up.weight.B": -1}), "lengths .* are no whole numbers"),
        (lambda m, t: m["lengths"].update({"layers.3.up.weight.B": 1}), "lengths sum up to"),
        (lambda m, t: m["lengths"].pop("layers.3.up.weight.B"), "lengths sum up to"),
        (lambda m, t: m["codings"].pop("layers.3.up.weight.B"), "is bundled and has no coding"),
        (lambda m, t: m.pop("edits"), "has other keys"),
        (lambda m, t: m.update(edits=[]), "edits is list"),
        (lambda m, t: t.update({"layers.3.up.weight.B": t["numbers"][:9].clone()}), "is stored twice"),
        (lambda m, t: t.update(numbers=t["numbers"].int()), "no row of bytes named numbers"),
        (lambda m, t: t["numbers"].__setitem__(700, t["numbers"][700] ^ 255), "up.weight"),
        (lambda m, t: t.pop("numbers"), "no row of bytes named numbers"),
        (lambda m, t: t.update(numbers=torch.cat([t["numbers"], t["numbers"][:1]])), "lengths sum up to"),
    ],
)
def test_a_damaged_bundle_is_refused(change, message, tmp_path):
    folder = store.write(_many(), tmp_path / "a")
    moved, tensors = _unbundled(folder)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(moved, tensors)
    try:
        _rebundle(folder, moved, tensors)
    except KeyError:  # what is gone has no digest
        text = zlib.compress(json.dumps(moved).encode())
        save_file(tensors | {"head": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, folder / TENSORS)
    with pytest.raises(ia.IntarsiaError, match=message):
        store.read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (zlib.compress(b" " * 10**7 + b"{}"), "cut off, or made to fill memory"),
        (zlib.compress(b"{}")[:-3], "cut off"),
        (zlib.compress(b"{}") + b"more", "cut off"),
        (b"no zlib", "cannot be read"),
        (zlib.compress(b"["), "cannot be read"),
        (zlib.compress(b"[]"), "has other keys"),
        (zlib.compress(b"[" * 2000 + b"]" * 2000), "(cannot be read|made to fill memory)"),
    ],
)
def test_a_bundled_head_that_is_none_is_refused(text, message, tmp_path):
    folder = store.write(_many(), tmp_path / "a")
    tensors = load_file(folder / TENSORS)
    save_file(tensors | {"head": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, folder / TENSORS)
    with pytest.raises(ia.IntarsiaError, match=message):
        store.open(folder)


def test_a_head_that_was_changed_beside_its_bundle_is_refused(tmp_path):
    folder = store.write(_many(), tmp_path / "a")
    head = _head(folder)
    change: dict[str, Any]
    for change in ({"name": "b"}, {"edits": {}}, {"note": {"loss": 0}}):
        (folder / HEAD).write_text(json.dumps(head | change))
        with pytest.raises(ia.IntarsiaError, match="does not match its own digest"):
            store.open(folder)
    for change in ({"format": 2}, {"bundled": False}):
        (folder / HEAD).write_text(json.dumps(head | change))
        with pytest.raises(ia.IntarsiaError, match="(format 2 has no bundles|lacks edits)"):
            store.open(folder)
