"""A lazily opened adapter: the head is read, tensors only when they are asked for; nothing is mapped, everything is checked."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import intarsia as ia
from intarsia import store
from intarsia.methods import Rosa, Snell
from intarsia.store import HEAD, TENSORS
from intarsia.store.tensorfile import TensorFile
from small import SITES, adapted, small_net

METHODS = {
    "shira": ia.Shira(density=0.1, scorer="magnitude"),
    "random": ia.Shira(density=0.1),
    "tiles": ia.Shira(density=0.1, granularity="tile", width=4),
    "paca": ia.Paca(3),
    "lora": ia.Lora(2),
    "dora": ia.Dora(ia.Paca(2)),
    "rosa": Rosa(rank=2, density=0.1, scorer="magnitude"),
    "snell": Snell(rank=2),
}


@pytest.fixture
def folder(tmp_path):
    return ia.save(adapted(METHODS["shira"]), tmp_path / "adapter", note={"loss": 0.5})


@pytest.mark.parametrize("name", METHODS)
def test_an_opened_adapter_is_the_one_that_is_read(name, tmp_path):
    folder = ia.save(adapted(METHODS[name]), tmp_path / "a")
    whole, opened = store.read(folder), store.open(folder)
    with mock.patch.object(TensorFile, "read", side_effect=AssertionError("a tensor was read")):
        assert list(opened.edits) == list(whole.edits)
        assert opened.facts() == whole.facts()
        assert (opened.touched, opened.size, opened.bytes) == (whole.touched, whole.size, whole.bytes)
        assert opened.digest == whole.digest
        assert dataclasses.replace(opened, name="other").digest == whole.digest
        assert (opened.name, opened.base, opened.method, opened.about, opened.note) == (
            whole.name, whole.base, whole.method, whole.about, whole.note,
        )  # fmt: skip
        assert {w: e.shape for w, e in opened.outlines.items()} == {w: e.shape for w, e in whole.edits.items()}
    for key, tensor in whole.tensors().items():
        assert torch.equal(opened.tensors()[key], tensor)
        assert opened.tensors()[key].dtype == tensor.dtype


def test_a_weight_is_read_when_it_is_asked_for_and_only_once(folder):
    opened = store.open(folder)
    edits = opened.edits
    assert isinstance(edits, store.LazyEdits)
    assert not edits.made
    assert "up.weight" in edits
    assert "gone.weight" not in edits
    assert len(edits) == len(SITES)
    assert not edits.made
    first = edits["down.weight"]
    assert list(edits.made) == ["down.weight"]
    assert edits["down.weight"] is first
    edits.forget()
    assert not edits.made
    assert torch.equal(edits["down.weight"].tensors()["values"], first.tensors()["values"])
    with pytest.raises(KeyError, match="gone"):
        edits["gone.weight"]


def test_threads_get_one_edit(folder):
    opened, found = store.open(folder), []
    threads = [threading.Thread(target=lambda: found.append(opened.edits["up.weight"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(edit) for edit in found}) == 1


def test_it_sits_on_a_model_as_any_other(folder):
    model, other = small_net(), small_net()
    deck, second = ia.Deck(model), ia.Deck(other)
    deck.add(store.open(folder))
    second.add(folder)
    deck.use("adapter")
    second.use("adapter")
    assert ia.digest(model) == ia.digest(other)


def test_a_cut_off_file_is_refused_at_once(folder):
    whole = (folder / TENSORS).read_bytes()
    for length in (*range(0, len(whole) - 1, 13), len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:length])
        with pytest.raises(ia.IntarsiaError, match="cut off or not a safetensors file"):
            store.open(folder)
    (folder / TENSORS).write_bytes(whole + b"\0")
    with pytest.raises(ia.IntarsiaError, match="tensors end at byte"):
        store.open(folder)


def test_shapes_and_names_are_checked_at_once(folder):
    tensors = load_file(folder / TENSORS)
    for broken, message in (
        ({k: t for k, t in tensors.items() if k != "up.weight.values"}, "missing tensor up.weight.values"),
        (tensors | {"more": torch.ones(2)}, "unexpected tensor more"),
        (tensors | {"up.weight.values": torch.ones(5)}, r"up.weight: values are \(5,\)"),
        (tensors | {"up.weight.values": torch.ones(38, dtype=torch.int32)}, "up.weight: values is torch.int32"),
    ):
        save_file(broken, folder / TENSORS)
        with pytest.raises(ia.IntarsiaError, match=message):
            store.open(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(ia.IntarsiaError, match=TENSORS):
        store.open(folder)


def test_damage_to_one_weight_is_found_when_it_is_asked_for(folder):
    tensors = load_file(folder / TENSORS)
    tensors["up.weight.values"][3] += 1
    tensors["down.weight.values"][3] = float("nan")
    save_file(tensors, folder / TENSORS)
    opened = store.open(folder)
    opened.edits["again.weight"]
    for weight in ("up.weight", "down.weight"):
        with pytest.raises(ia.IntarsiaError, match=f"{weight}.values: its bytes do not match its digest"):
            opened.edits[weight]
    with pytest.raises(ia.IntarsiaError, match="up.weight.values.*\n  down.weight.values"):
        store.read(folder)


def test_a_file_that_changes_after_opening_is_an_error_and_no_crash(folder):
    """Cut off in place: a mapped file would end the process here. And what was read before stays as it was."""
    opened, big = store.open(folder), store.read(folder)
    kept = opened.edits["down.weight"]
    os.truncate(folder / TENSORS, 400)
    with pytest.raises(ia.IntarsiaError, match="it ends within up.weight"):
        opened.edits["up.weight"]
    for name, tensor in kept.tensors().items():
        assert torch.equal(tensor, big.edits["down.weight"].tensors()[name])
    shutil.rmtree(folder)
    with pytest.raises(ia.IntarsiaError, match="No such file"):
        opened.edits["again.weight"]


def test_a_folder_replaced_after_opening_is_refused(folder):
    opened = store.open(folder)
    model = adapted(METHODS["shira"])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(1)
    ia.sync(model)
    ia.save(model, folder, overwrite=True)
    with pytest.raises(ia.IntarsiaError, match="do not match its digest"):
        opened.edits["up.weight"]


def test_an_edited_head_is_refused_at_once(folder):
    text = (folder / HEAD).read_text()
    (folder / HEAD).write_text(text.replace('"loss": 0.5', '"loss": 0.4'))
    with pytest.raises(ia.IntarsiaError, match="does not match its own digest"):
        store.open(folder)
