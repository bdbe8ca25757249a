"""The adapter file: whole or not at all, exact, strict, and never another error than an IntarsiaError."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

import intarsia as ia
from fuzz_files import fuzz
from intarsia import store
from intarsia.store import HEAD, TENSORS, writing
from kill_writers import kill_at_every_line
from small import SITES, adapted, small_net, some_input, some_loss, stir

METHODS = [
    ia.Shira(density=0.1),
    ia.Paca(3),
    ia.Lora(2),
    ia.Dora(ia.Lora(2)),
    ia.Dora(ia.Paca(2, parameterization="columns")),
]
IDS = ["shira", "paca", "lora", "dora", "dora-paca"]


@pytest.fixture
def folder(tmp_path):
    """A saved SHiRA adapter."""
    return ia.save(adapted(METHODS[0]), tmp_path / "adapter", note={"loss": 0.5})


@pytest.fixture
def plain(tmp_path):
    """The same, every tensor as it is."""
    return ia.save(adapted(METHODS[0]), tmp_path / "adapter", coding="plain")


def _head(folder: Path) -> dict[str, Any]:
    head: dict[str, Any] = json.loads((folder / HEAD).read_text())
    return head


def _write(folder: Path, head: Any, tensors: dict[str, torch.Tensor] | None = None, honest: bool = True) -> None:
    """Write a head (and tensors), with digests that fit if ``honest``: what a hand-made or malicious file would have."""
    if tensors is not None:
        save_file(tensors, folder / TENSORS)
        head["tensors"] = {name: store.tensor_digest(tensor) for name, tensor in tensors.items()}
    if honest:
        head["digest"] = store.json_digest(
            {"edits": head["edits"], "tensors": head["tensors"], "base": head["base"]["digest"]}
        )
        head["checksum"] = store.json_digest({key: value for key, value in head.items() if key != "checksum"})
    (folder / HEAD).write_text(json.dumps(head))


def _refuses(folder: Path, match: str = "") -> None:
    with pytest.raises(ia.IntarsiaError, match=match):
        ia.read(folder)
    model = small_net()
    with pytest.raises(ia.IntarsiaError):
        ia.load(model, folder)
    assert ia.attached_names(model) == []
    assert ia.digest(model) == ia.digest(small_net())


# ------------------------------------------------------------------ what is written
@pytest.mark.parametrize("method", METHODS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_number_comes_back_to_the_bit(method, dtype, tmp_path):
    model = adapted(method, dtype)
    adapter = ia.export(model)
    ia.save(model, tmp_path / "a")
    back = ia.read(tmp_path / "a")
    assert back.digest == adapter.digest
    assert back.tensors().keys() == adapter.tensors().keys()
    for name, tensor in adapter.tensors().items():
        assert back.tensors()[name].dtype == tensor.dtype
        assert torch.equal(back.tensors()[name], tensor)
    other = small_net(dtype)
    assert ia.load(other, tmp_path / "a") == "a"
    assert torch.equal(other(some_input(dtype)), model(some_input(dtype)))
    assert ia.export(other).digest == adapter.digest


@pytest.mark.parametrize("alpha", [5.0, 0.37, 12.0, 1.0])
@pytest.mark.parametrize("parameterization", ["delta", "columns"])
def test_awkward_scales_come_back_to_the_bit(alpha, parameterization, tmp_path):
    """s = alpha / 3 is no power of two: v with s v = delta must be found again, and the start is the base for any s."""
    model = small_net()
    ia.attach(model, ia.Paca(3, alpha=alpha, parameterization=parameterization))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for seed in range(5):
        optimizer.zero_grad()
        some_loss(model, some_input(seed=seed)).backward()
        optimizer.step()
    ia.save(model, tmp_path / "a")
    other = small_net()
    ia.load(other, tmp_path / "a")
    assert ia.export(other).digest == ia.read(tmp_path / "a").digest


@pytest.mark.parametrize("alpha", [22.0, 5.0, 2.0])
def test_thousands_of_awkward_values_come_back_to_the_bit(alpha, tmp_path):
    """With s = alpha / 3, dividing and multiplying again misses a value in some hundreds by one unit in the last place."""
    model, other = (torch.nn.Sequential(torch.nn.Linear(3, 20_000, bias=False)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    ia.attach(model, ia.Paca(3, alpha=alpha, parameterization="columns"))
    stir(model, size=0.1)
    ia.save(model, tmp_path / "a")
    ia.load(other, tmp_path / "a")
    assert ia.export(other).digest == ia.export(model).digest


def test_the_keys_of_the_format(plain):
    """Frozen: other programs read them. A change here is a new format."""
    head = _head(plain)
    assert list(head) == [
        "format", "written_by", "created", "name", "digest", "method", "base", "values", "about", "note", "edits", "tensors",
        "codings", "checksum",
    ]  # fmt: skip
    assert (head["format"], head["values"], head["codings"]) == (2, "delta", {})
    assert set(head["base"]) == {"digest", "dtype", "source"}
    assert head["edits"]["up.weight"] == {"type": "elements", "shape": [24, 16]}
    names = [f"{site}.weight.{part}" for site in SITES for part in ("indices", "values")]
    assert sorted(head["tensors"]) == sorted(names)
    tensors = load_file(plain / TENSORS)
    assert sorted(tensors) == sorted(names)
    assert tensors["up.weight.indices"].dtype == torch.int32
    assert tensors["up.weight.values"].dtype == torch.float32
    assert sorted(path.name for path in plain.iterdir()) == ["README.md", HEAD, TENSORS]


def test_the_values_are_the_change_of_the_weight(tmp_path):
    """The file is a weight patch for whoever reads it: W'.view(-1)[indices] = W.view(-1)[indices] + values."""
    model = adapted(ia.Shira(density=0.1), torch.float64)
    ia.save(model, tmp_path / "a", coding="plain")
    tensors = load_file(tmp_path / "a" / TENSORS)
    for site in SITES:
        W = small_net(torch.float64).get_parameter(f"{site}.weight").detach().clone().view(-1)
        W[tensors[f"{site}.weight.indices"].long()] += tensors[f"{site}.weight.values"]
        assert torch.equal(W, model.get_parameter(f"{site}.weight").detach().view(-1))


def test_the_digest_is_of_the_numbers_and_not_of_the_name(tmp_path):
    model = adapted(ia.Shira(density=0.1))
    digests = {ia.read(ia.save(model, tmp_path / name, note={"n": name})).digest for name in ("a", "b")}
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0] += 1
    ia.sync(model)
    assert len(digests) == 1
    assert ia.export(model).digest not in digests


def test_the_card_says_what_the_adapter_is(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: intarsia\n")
    for words in (
        "**shira** adapter",
        "`0.1`",
        "114 of their 1,152 entries (9.90%)",
        'deck.use("adapter")',
        "| loss | 0.5 |",
    ):
        assert words in card


def test_a_torn_note_is_refused(tmp_path):
    with pytest.raises(ia.IntarsiaError, match="no plain JSON"):
        ia.save(adapted(METHODS[0]), tmp_path / "a", note={"model": small_net()})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ damaged files
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_flipped_bit_anywhere_is_found(method, tmp_path):
    folder = ia.save(adapted(method), tmp_path / "a")
    whole = (folder / TENSORS).read_bytes()
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 1 << (position % 8)
        (folder / TENSORS).write_bytes(data)
        try:
            adapter = ia.read(folder)
        except ia.IntarsiaError:
            continue
        # What is not refused must be spelling, such as a blank or the free metadata of the header: the numbers are checked.
        (folder / TENSORS).write_bytes(whole)
        assert adapter.digest == ia.read(folder).digest
        assert position < int.from_bytes(whole[:8], "little") + 8


@pytest.mark.parametrize("name", [TENSORS, HEAD])
def test_a_cut_off_file_is_found(name, folder):
    whole = (folder / name).read_bytes()
    for length in [*range(0, len(whole) - 1, 37), len(whole) - 2]:
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(ia.IntarsiaError, match=name):
            ia.read(folder)
    (folder / name).write_bytes(whole)
    ia.read(folder)


def test_missing_and_extra_tensors_are_all_named(plain):
    tensors = load_file(plain / TENSORS)
    del tensors["up.weight.indices"], tensors["down.weight.values"]
    save_file(tensors | {"again.weight.more": torch.ones(2)}, plain / TENSORS)
    _refuses(
        plain,
        "missing tensor down.weight.values\n.*missing tensor up.weight.indices\n.*unexpected tensor again.weight.more",
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("up.weight.indices", lambda t: t.index_fill(0, torch.tensor([37]), 384), r"reach from \d+ to 384; expected .* 0..383"),
        ("up.weight.indices", lambda t: t.index_fill(0, torch.tensor([0]), -1), "reach from -1 to"),
        ("up.weight.indices", lambda t: t.flip(0).contiguous(), "not strictly ascending"),
        ("up.weight.indices", lambda t: t.index_copy(0, torch.tensor([5]), t[6:7]), "not strictly ascending"),
        ("up.weight.indices", lambda t: t.float(), "float32; expected one row of int32 or int64"),
        ("up.weight.indices", lambda t: t.view(2, -1), r"\(2, 19\)"),
        ("up.weight.indices", lambda t: t[:-1].clone(), r"37 indices need \(37,\)"),
        ("up.weight.values", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), "1 numbers that are not finite"),
        ("up.weight.values", lambda t: t.index_fill(0, torch.tensor([3]), float("inf")), "1 numbers that are not finite"),
        ("up.weight.values", lambda t: t.to(torch.int32), "int32; expected floating-point"),
        ("up.weight.values", lambda t: t.to(torch.complex64), "complex64; expected floating-point"),
        ("up.weight.values", lambda t: t.view(1, -1), r"\(1, 38\)"),
    ],
)  # fmt: skip
def test_tensors_are_checked_even_where_every_digest_fits(name, change, message, plain):
    tensors, head = load_file(plain / TENSORS), _head(plain)
    tensors[name] = change(tensors[name])
    _write(plain, head, tensors)
    _refuses(plain, f"up.weight: .*{message}")


@pytest.mark.parametrize(
    ("method", "part", "change"),
    [
        (ia.Lora(2), "A", lambda t: t[:, :-1].clone()),
        (ia.Lora(2), "B", lambda t: t.T.contiguous()),
        (ia.Lora(2), "A", lambda t: t * float("nan")),
        (ia.Dora(ia.Lora(2)), "magnitude", lambda t: t[:-1].clone()),
        (ia.Dora(ia.Lora(2)), "magnitude", lambda t: t / 0),
        (ia.Paca(3), "indices", lambda t: t + 16),
        (ia.Paca(3), "values", lambda t: t.T.contiguous()),
    ],
)
def test_tensors_of_other_kinds_are_checked_too(method, part, change, tmp_path):
    folder = ia.save(adapted(method, targets="up"), tmp_path / "a")
    tensors, head = load_file(folder / TENSORS), _head(folder)
    tensors[f"up.weight.{part}"] = change(tensors[f"up.weight.{part}"])
    _write(folder, head, tensors)
    _refuses(folder, "up.weight: ")


def test_an_edited_head_is_found(folder):
    head = _head(folder)
    head["edits"]["up.weight"]["shape"] = [16, 24]
    _write(folder, head, honest=False)
    _refuses(folder, "does not match its own digest")
    for key, value in {"name": "other", "about": {"seed": 3}, "method": {"name": "shira", "density": 0.0989}}.items():
        _write(folder, _head(folder) | head | {key: value}, honest=False)
        _refuses(folder, "does not match its own digest")
    _write(folder, head)
    ia.read(folder)
    with pytest.raises(ia.IntarsiaError, match=r"up.weight: the adapter edits \(16, 24\), the model has \(24, 16\)"):
        ia.load(small_net(), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 4}, "format 4; this version reads up to 3. Upgrade"),
        ({"format": 0}, "format 0"),
        ({"format": True}, "format"),
        ({"format": "1"}, "does not say which format"),
        ({"format": None}, "does not say which format"),
        ({"name": 3}, "name is int"),
        ({"method": "shira"}, "method is str"),
        ({"base": []}, "base is list"),
        ({"base": {}}, "base.digest"),
        ({"base": {"digest": "", "dtype": "", "source": 3}}, "base.source"),
        ({"edits": None}, "edits is NoneType"),
        ({"tensors": []}, "tensors is list"),
        ({"about": 3}, "about is int"),
        ({"note": "n"}, "note is str"),
        ({"digest": 1}, "digest is int"),
    ],
)
def test_a_head_of_the_wrong_shape_is_named(change, message, folder):
    _write(folder, _head(folder) | change, honest=False)
    _refuses(folder, message)


@pytest.mark.parametrize(
    "key", ["format", "name", "method", "base", "edits", "tensors", "codings", "digest", "checksum"]
)
def test_a_missing_key_is_named(key, folder):
    head = _head(folder)
    del head[key]
    _write(folder, head, honest=False)
    _refuses(folder, key)


@pytest.mark.parametrize(
    ("method", "facts", "message"),
    [
        (
            0,
            {"type": "stripes"},
            "unknown edit type 'stripes'; this version knows elements, lines, tiles, rows, columns",
        ),
        (0, {"type": ["elements"]}, "damaged"),
        (0, {"type": "columns"}, "values are"),
        (0, {"shape": [24]}, "damaged"),
        (0, {"shape": [24, -16]}, "damaged"),
        (0, {"shape": [24.0, 16]}, "damaged"),
        (0, {"shape": None}, "damaged"),
        (2, {"scale": "2"}, "scale is '2'"),
        (2, {"scale": None}, "scale is None"),
        (2, {"scale": float("nan")}, "scale is nan"),
        (2, {"scale": 10**400}, "damaged"),
        (3, {"inner": None}, "inner"),
        (3, {"inner": {"type": "rescaled", "inner": {"type": "low_rank"}}}, "magnitude"),
        (3, {"inner": {"type": "elements"}}, "found the tensors A, B; expected indices, values"),
    ],
    ids=str,
)
def test_facts_of_an_edit_are_checked_even_where_the_digest_fits(method, facts, message, tmp_path):
    folder = ia.save(adapted(METHODS[method]), tmp_path / "a")
    head = _head(folder)
    head["edits"]["up.weight"] |= facts
    _write(folder, head)
    _refuses(folder, f"up.weight: .*{message}")


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        (0, {"name": "shiro"}, "unknown method 'shiro'; did you mean 'shira'"),
        (0, {"name": "shira", "densety": 0.1}, "no field 'densety'; did you mean 'density'"),
        (0, {"name": "shira", "density": 0.2}, "38 elements; its own config asks for 77"),
        (0, {"name": "paca", "rank": 3}, "38 elements; its own config asks for 3 columns"),
        (0, {"name": "lora", "rank": 2}, "elements edit; its own config asks for"),
        (0, {"name": "dora"}, "elements edit; dora needs a rescaled one"),
        (1, {"name": "shira", "density": 0.1}, "3 columns; its own config asks for 38 elements"),
        (2, {"name": "lora", "rank": 3}, "its own config asks for"),
        (2, {"name": "lora", "rank": 2, "alpha": 1.0}, "its own config asks for"),
        (2, {"name": "shira", "density": 0.1}, "a low_rank edit; its own config asks for 38 elements"),
        (3, {"name": "dora", "inner": {"name": "paca", "rank": 2}}, "its own config asks for"),
        (0, {}, "a method is given as"),
    ],
    ids=str,
)
def test_a_method_that_does_not_fit_its_edits_is_refused_on_loading(method, config, message, tmp_path):
    """A deck needs no method and takes the file; whoever would train on needs the right one."""
    folder = ia.save(adapted(METHODS[method]), tmp_path / "a")
    _write(folder, _head(folder) | {"method": config})
    model = small_net()
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.load(model, folder)
    assert ia.attached_names(model) == []
    assert type(model.get_submodule("up")) is torch.nn.Linear
    ia.Deck(model).add(folder)


@pytest.mark.parametrize(
    "about", [{"targets": 5}, {"seed": "x"}, {"exclude": None}, {"seed": None}, {"targets": [3]}], ids=str
)
def test_a_strange_about_is_no_crash(about, folder):
    _write(folder, _head(folder) | {"about": about})
    model = small_net()
    try:
        ia.load(model, folder)
    except ia.IntarsiaError:
        assert ia.attached_names(model) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as keys from the top."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, inner in pairs for place in _places(inner, (*path, key))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Saved adapters that the fuzz copies its files from, by method."""
    top = tmp_path_factory.mktemp("whole")
    return [ia.save(adapted(method), top / name) for method, name in zip(METHODS, IDS, strict=True)]


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), replacement=JSON, honest=st.booleans(), which=st.integers(0, len(METHODS) - 1))
def test_a_head_changed_anywhere_is_refused_or_the_same_adapter(data, replacement, honest, which, whole, tmp_path):
    folder = tmp_path / "fuzz"
    shutil.copytree(whole[which], folder, dirs_exist_ok=True)
    head = _head(folder)
    start = ia.read(folder).digest
    place = data.draw(st.sampled_from(_places(head)))
    if place:
        inner: Any = head
        for key in place[:-1]:
            inner = inner[key]
        if data.draw(st.booleans()):
            del inner[place[-1]]
        else:
            inner[place[-1]] = replacement
    else:
        head = replacement
    try:
        _write(folder, head, honest=honest)
    except (KeyError, TypeError, AttributeError, IndexError):  # no digest can be made of it: leave the old one
        _write(folder, head, honest=False)
    model = small_net()
    try:
        adapter = ia.read(folder)
        ia.Deck(model).add(folder)
        ia.load(model, folder, "x")
    except ia.IntarsiaError:
        assert ia.attached_names(model) == []
        return
    assert honest or adapter.digest == start
    assert honest or adapter.method == ia.read(whole[which]).method
    ia.detach(model, "x")
    assert ia.digest(model) == ia.digest(small_net())


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_refused_or_the_same_adapter(seed, whole, tmp_path):
    """Bytes of either file replaced, removed or repeated at random."""
    chance = random.Random(seed)
    folder = tmp_path / "fuzz"
    shutil.copytree(whole[seed % len(whole)], folder)
    start = ia.read(folder).digest
    for _ in range(60):
        name = chance.choice([HEAD, TENSORS])
        before = (folder / name).read_bytes()
        data = bytearray(before)
        for _ in range(chance.randint(1, 3)):
            i = chance.randrange(len(data))
            j = min(len(data), i + chance.randint(1, 40))
            data[i:j] = chance.choice([bytes(chance.randrange(256) for _ in range(j - i)), b"", bytes(data[i:j]) * 2])
        (folder / name).write_bytes(data)
        try:
            adapter = ia.read(folder)
            ia.load(small_net(), folder, "x")
        except ia.IntarsiaError:
            pass
        else:
            assert adapter.digest == start
        (folder / name).write_bytes(before)


# ------------------------------------------------------------------ no adapter there
def test_what_is_no_adapter_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name, message in {
        "missing": "does not exist",
        "empty": f"no {HEAD} .found nothing",
        "other": "found config.json",
        "file": "is a file; an adapter is a folder",
    }.items():
        _refuses(tmp_path / name, message)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000], ids=lambda d: repr(d[:8]))
def test_a_head_that_is_no_json_table_is_refused(data, folder):
    (folder / HEAD).write_bytes(data)
    _refuses(folder, HEAD)


@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 64, b"\0" * 64, b"PK\x03\x04" * 20], ids=lambda d: repr(d[:8]))
def test_tensors_that_are_no_safetensors_are_refused(data, folder):
    (folder / TENSORS).write_bytes(data)
    _refuses(folder, "not a safetensors file")


def test_a_missing_tensor_file_is_named(folder):
    (folder / TENSORS).unlink()
    _refuses(folder, TENSORS)


def test_another_base_is_refused(folder):
    for model, why in (
        (small_net(seed=1), "its weights differ"),
        (small_net(torch.bfloat16), "it was made on float32, this model is bfloat16"),
    ):
        before = ia.digest(model)
        with pytest.raises(ia.IntarsiaError, match=f"another base .{why}.*any_base=True"):
            ia.load(model, folder)
        assert ia.attached_names(model) == []
        ia.load(model, folder, any_base=True)
        ia.detach(model, "adapter")
        assert ia.digest(model) == before


# ------------------------------------------------------------------ saving fails
def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["intarsia.store.writing.save_file", "os.fsync", "pathlib.Path.write_text"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_the_old_adapter_whole(where, exists, tmp_path):
    if exists:
        ia.save(adapted(METHODS[0]), tmp_path / "a")
    before = _contents(tmp_path)
    model = adapted(METHODS[1])
    with mock.patch(where, _full), pytest.raises(ia.IntarsiaError, match="No space left on device"):
        ia.save(model, tmp_path / "a", overwrite=True)
    assert _contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if exists else [])
    ia.save(model, tmp_path / "a", overwrite=True)
    assert ia.read(tmp_path / "a").digest == ia.export(model).digest


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [1, 2])
def test_a_swap_that_fails_puts_the_old_adapter_back(at, error, tmp_path):
    """By two renames, where two folders cannot change places in one step."""
    ia.save(adapted(METHODS[0]), tmp_path / "a")
    (tmp_path / "a" / "log.jsonl").write_text("log")
    before, calls, real = _contents(tmp_path), 0, Path.rename

    def rename(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return real(self, target)

    with (
        mock.patch.object(Path, "rename", rename),
        mock.patch("intarsia.store.writing._exchange", return_value=False),
        pytest.raises((ia.IntarsiaError, KeyboardInterrupt)),
    ):
        ia.save(adapted(METHODS[1]), tmp_path / "a", overwrite=True)
    assert _contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_exchange_that_fails_leaves_the_old_adapter(folder):
    before = _contents(folder.parent)
    fail = mock.patch("intarsia.store.writing._exchange", side_effect=OSError(errno.EIO, "input/output error"))
    with fail, pytest.raises(ia.IntarsiaError, match="input/output error"):
        ia.save(adapted(METHODS[1]), folder, overwrite=True)
    assert _contents(folder.parent) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_other_files_are_carried_over(exchange, folder):
    (folder / "log.jsonl").write_text("log")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.svg").write_text("svg")
    (folder / "link").symlink_to("log.jsonl")
    real = writing._exchange if exchange else lambda *_: False
    with mock.patch("intarsia.store.writing._exchange", real):
        ia.save(adapted(METHODS[1]), folder, overwrite=True)
    assert ia.read(folder).method["name"] == "paca"
    assert (folder / "log.jsonl").read_text() == "log"
    assert (folder / "plots" / "loss.svg").read_text() == "svg"
    assert (folder / "link").readlink() == Path("log.jsonl")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_save_cut_short_between_two_renames_is_told(folder):
    hidden = folder.parent / ".adapter.x1.old" / "adapter"
    hidden.parent.mkdir()
    folder.rename(hidden)
    with pytest.raises(ia.IntarsiaError, match=r"A save was cut short: .*\.adapter\.x1\.old/adapter, rename it to"):
        ia.read(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="two folders change places in one step on Linux alone")
def test_a_writer_that_is_killed_leaves_a_whole_adapter():
    assert kill_at_every_line() > 50


def test_an_existing_folder_is_not_touched_unasked(folder):
    before = _contents(folder)
    with pytest.raises(ia.IntarsiaError, match="exists already.*overwrite"):
        ia.save(adapted(METHODS[1]), folder)
    assert _contents(folder) == before
    ia.save(adapted(METHODS[1]), folder, overwrite=True)
    assert ia.read(folder).method["name"] == "paca"


def test_only_adapters_are_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    (tmp_path / "file").write_text("x")
    before = _contents(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises(ia.IntarsiaError, match="not an adapter folder"):
            ia.save(adapted(METHODS[0]), tmp_path / name, overwrite=True)
    assert _contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    ia.save(adapted(METHODS[0]), tmp_path / "empty", overwrite=True)


def test_other_files_in_the_folder_are_carried_over(folder):
    (folder / "log.jsonl").write_text("a day of training")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(b"png")
    ia.save(adapted(METHODS[1]), folder, overwrite=True)
    assert (folder / "log.jsonl").read_text() == "a day of training"
    assert (folder / "plots" / "loss.png").read_bytes() == b"png"
    assert ia.read(folder).method["name"] == "paca"
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ia.IntarsiaError, match="could not save to .*file/a"):
        ia.save(adapted(METHODS[0]), tmp_path / "file" / "a")
    assert _contents(tmp_path) == {"file": b"x"}


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    model = adapted(METHODS[0])
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[3] = float("nan")
    ia.sync(model)
    with pytest.raises(ia.IntarsiaError, match="not finite; the training diverged"):
        ia.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ digests
def test_digests_tell_everything_apart():
    tensors = [
        torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(8, dtype=torch.bfloat16),
        torch.tensor([0.0, 0.0, 0.0, -0.0]), torch.zeros(0), torch.zeros(0, 2), torch.tensor(0.0), torch.zeros(1),
    ]  # fmt: skip
    assert len({store.tensor_digest(tensor) for tensor in tensors}) == len(tensors)
    assert store.tensor_digest(torch.arange(6).view(2, 3).T) == store.tensor_digest(
        torch.arange(6).view(2, 3).T.contiguous()
    )
    one, two = torch.zeros(1), torch.ones(1)
    assert store.weights_digest([("a", one), ("b", two)]) == store.weights_digest([("b", two), ("a", one)])
    assert store.weights_digest([("a", one), ("b", two)]) != store.weights_digest([("a", two), ("b", one)])


def test_digests_do_not_change_between_releases():
    assert store.tensor_digest(torch.arange(3.0)) == "90ff15c65b0e4ac6c224eb5ffe2891684a9cbdd2ebf50f5f3a07cedaf7d813c4"
    assert ia.digest(torch.nn.Sequential()) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"


def test_mutated_files_are_refused_or_load_and_take_little_memory():
    """A share of ``python tests/fuzz_files.py --files 2000``; INTARSIA_FUZZ sets another one."""
    counts = fuzz(int(os.environ.get("INTARSIA_FUZZ", "200")), seed=1)
    assert counts["refused"] > counts["same"] + counts["other"] > 0


def test_whoever_may_read_the_head_may_read_the_numbers(tmp_path: Path) -> None:
    net = small_net()
    ia.attach(net, ia.Shira(density=0.5))
    folder = ia.save(net, tmp_path / "saved")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
