"""Mutate adapter files: each must load as the adapter it was, or be refused with one IntarsiaError, in little time and memory.

    python tests/fuzz_files.py --files 2000

Half of the mutated heads are honest: their digests are made to fit again, as whoever made the file on purpose would do.
Such a file may be another adapter; it may not crash, hang, or fill the memory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import intarsia as ia
from intarsia import store
from intarsia.edits import Dense, Edit, LowRank, elements
from intarsia.method import Start
from intarsia.methods import Rosa, Snell
from intarsia.store import HEAD, TENSORS
from intarsia.support import sample
from small import adapted

SECONDS, MEGABYTES = 20, 32  # that one file may take; the files are of a few KB
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 38, 10**12, 2**31, 2**63, 10**300, -(2**63), 0.5, float("nan"), float("inf"), "", "x", "seed",
    "gaps", "same", "rice", "ranks", "ternary", "masks", "nonzero", "normal", "elements", "sum", "0" * 16, "f" * 64, [], {}, [[]], [10**12, 10**12], [1, 2**62], {"type": "elements"},
)  # fmt: skip


def corpus(place: Path) -> list[Path]:
    """Small adapters of every kind of edit and coding."""
    methods: list[ia.Method] = [
        ia.Shira(density=0.1), ia.Shira(density=0.1, budget="neuron"), ia.Shira(density=0.1, scorer="magnitude"),
        ia.Shira(density=0.2, granularity="line", width=2), ia.Paca(3), ia.Lora(2), ia.Dora(ia.Shira(density=0.1)),
        Rosa(rank=2, density=0.1, scorer="random"), Snell(rank=2),
    ]  # fmt: skip
    folders = [ia.save(adapted(m), place / str(i), coding=c) for i, m in enumerate(methods) for c in ["compact"]]
    folders.append(ia.save(adapted(methods[0]), place / "plain", coding="plain", values="bfloat16"))
    index, A = torch.arange(1000) * 7 + torch.arange(1000) // 3, torch.linspace(-1, 1, 200).view(2, 100)
    twins: dict[str, Edit] = {f"{i}.weight": elements((100, 100), index, torch.linspace(-1, i, 1000)) for i in (1, 2)}
    low: dict[str, Edit] = {f"low{i}.weight": LowRank((9, 100), torch.full((9, 2), float(i)), A, 2.0) for i in (1, 2)}
    adapter = store.Adapter("gaps", twins | low, store.Base("0" * 64, "float32"), {"name": "shira"})
    return [*folders, store.write(adapter, place / "gaps"), *_compressed(place)]


def _compressed(place: Path) -> list[Path]:
    """Values in every coding, and supports in the tight ones: part of a drawn one, part of one that a score chose."""
    chance = torch.Generator().manual_seed(0)
    normal = torch.randn(60, 50, generator=chance)
    three = torch.where(normal.abs() > 1, 0.01 * normal.sign(), torch.zeros(()))
    code = store.Code.of(normal, 2)
    drawn = sample(6000, 1500, Start.at("drawn", 0).key)[::3]
    edits: dict[str, Edit] = {
        "three.weight": LowRank((60, 50), three[:, :20].contiguous(), three[:20].contiguous(), 1.0),
        "zeros.weight": Dense((60, 50), normal * (normal.abs() > 1)),
        "normal.weight": Dense((60, 50), code.rounded(normal)),
        "drawn.weight": elements((60, 100), drawn, three.view(-1)[three.view(-1) != 0][:500]),
        "chosen.weight": elements(
            (60, 100), torch.arange(500) * 11 + torch.arange(500) % 7, -three.view(-1)[three.view(-1) != 0][:500]
        ),
    }
    base = store.Base("0" * 64, "float32")
    adapter = store.Adapter("three", edits, base, {"name": "any"}, {"seed": 0}, codes={"normal.weight.values": code})
    many: dict[str, Edit] = {
        f"layers.{i}.up.weight": LowRank((60, 50), (i + 1) * three[:, :20], normal[:20], 1.0) for i in range(50)
    }
    bundle = store.Adapter("bundle", many, base, {"name": "any"})
    return [
        *(store.write(adapter, place / c, coding=c) for c in ("compact", "masks")),
        store.write(bundle, place / "bundle"),
    ]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, inner in pairs for place in _places(inner, (*path, key))]


def _set(value: Any, place: tuple[Any, ...], new: Any) -> None:
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = new


def bits(folder: Path, chance: random.Random) -> None:
    """A few bits flipped."""
    file = folder / chance.choice((HEAD, TENSORS))
    data = bytearray(file.read_bytes())
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def cut(folder: Path, chance: random.Random) -> None:
    """Cut off, or made longer."""
    file = folder / chance.choice((HEAD, TENSORS))
    data = file.read_bytes()
    more = bytes(chance.randrange(256) for _ in range(chance.randint(1, 99)))
    file.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.7 else data + more)


def splice(folder: Path, chance: random.Random) -> None:
    """A piece taken out, repeated or moved."""
    file = folder / chance.choice((HEAD, TENSORS))
    data = bytearray(file.read_bytes())
    i = chance.randrange(len(data))
    j = min(len(data), i + chance.randint(1, 60))
    data[i:j] = chance.choice((b"", bytes(data[i:j]) * 2, bytes(reversed(data[i:j]))))
    file.write_bytes(data)


def _bomb() -> bytes:
    """100 MB of blanks in 100 kB; made in pieces, since the most memory that this process had is what is measured."""
    squeeze = zlib.compressobj()
    return b"".join([squeeze.compress(b" " * 10**5) for _ in range(1000)] + [squeeze.flush()])


def bundled(folder: Path, chance: random.Random) -> None:
    """A value of what is bundled replaced, and bytes of it; the digests fit, where there is a bundle at all."""
    found, head = load_file(folder / TENSORS), json.loads((folder / HEAD).read_text())
    if "head" not in found:
        return head_value(folder, chance)
    moved = json.loads(zlib.decompress(bytes(found["head"].tolist())))
    for _ in range(chance.randint(1, 2)):
        _set(moved, chance.choice(_places(moved)[1:]), chance.choice(STRANGE))
    text = zlib.compress(json.dumps(moved).encode())
    if chance.random() < 0.1:
        text = _bomb()
    save_file(found | {"head": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, folder / TENSORS)
    whole = {k: v for k, v in head.items() if k not in ("bundled", "checksum")} | {
        k: moved[k] for k in moved if k != "lengths"
    }
    _write_head(folder, whole, True)
    fresh = json.loads((folder / HEAD).read_text())
    return _write_head(folder, head | {key: fresh[key] for key in ("digest", "checksum") if key in fresh}, False)


def head_value(folder: Path, chance: random.Random) -> None:
    """A value of the head replaced or taken out, honestly or not."""
    head = json.loads((folder / HEAD).read_text())
    for _ in range(chance.randint(1, 2)):
        place = chance.choice(_places({k: head[k] for k in head if k != "checksum"})[1:])
        if chance.random() < 0.2:
            inner = head
            for key in place[:-1]:
                inner = inner[key]
            if place[-1] in inner or isinstance(inner, list):
                del inner[place[-1]]
        else:
            _set(head, place, chance.choice(STRANGE))
    _write_head(folder, head, chance.random() < 0.7)


def coding(folder: Path, chance: random.Random) -> None:
    """An entry of the codings changed: honest, so that only what it claims can betray it."""
    head = json.loads((folder / HEAD).read_text())
    if "tensors" not in head:
        return bundled(folder, chance)
    names = sorted(head["tensors"])
    entry = dict(head["codings"].get(chance.choice(names), {"coding": "seed"}))
    key = chance.choice(("coding", "count", "units", "key", "rows", "as", "sha256", "kept", "bits", "shape", "dtype"))
    entry[key] = chance.choice((*STRANGE, *names))
    head["codings"][chance.choice(names)] = entry
    return _write_head(folder, head, True)


def nest(folder: Path, chance: random.Random) -> None:
    """Thousands of lists or tables in each other, or edits in edits."""
    deep = chance.choice((50, 500, 950, 5000, 100_000))
    if chance.random() < 0.5:
        text = (folder / HEAD).read_text()
        at = text.index('"note": ') + 8
        (folder / HEAD).write_text(text[:at] + "[" * deep + "]" * deep + ", " + text[at:])
        return
    head = json.loads((folder / HEAD).read_text())
    if "edits" not in head:
        return
    weight = chance.choice(sorted(head["edits"]))
    part: dict[str, Any] = {"type": "elements"}
    for _ in range(min(deep, 450)):
        part = {"type": "sum", "parts": [part]} if chance.random() < 0.5 else {"type": "rescaled", "inner": part}
    head["edits"][weight] |= part
    _write_head(folder, head, True)


def header(folder: Path, chance: random.Random) -> None:
    """The header of the tensors: huge, negative or overlapping sizes and places."""
    data = (folder / TENSORS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table.pop("__metadata__", None)
    place = chance.choice(_places(table)[1:])
    _set(table, place, chance.choice((*STRANGE, "F64", "I64", "U8", "BOOL")))
    text = json.dumps(table).encode()
    length = len(text) if chance.random() < 0.8 else chance.choice((0, 2**63, 2**40, len(text) - 1, 2**64 - 1))
    (folder / TENSORS).write_bytes(struct.pack("<Q", length) + text + data[8 + int.from_bytes(data[:8], "little") :])


def tensors(folder: Path, chance: random.Random) -> None:
    """Tensors swapped, taken out, of another type or shape, or with NaN; the digests fit."""
    found, head = load_file(folder / TENSORS), json.loads((folder / HEAD).read_text())
    one, other = chance.choice(sorted(found)), chance.choice(sorted(found))
    change: Callable[[], Any] = chance.choice(
        (
            lambda: found.update({one: found[other].clone(), other: found[one].clone()}),
            lambda: found.pop(one),
            lambda: found.update({one: found[one].reshape(-1)[:-1].clone()}),
            lambda: found.update({one: found[one].to(torch.float32) * float("nan")}),
            lambda: found.update({one: found[one].to(torch.int32) * -1}),
            lambda: found.update({one: torch.zeros_like(found[one])}),
            lambda: found.update(
                {one: found[one].new_full(found[one].shape, 255 if found[one].dtype == torch.uint8 else 7)}
            ),
            lambda: found.update({one: torch.zeros(0)}),
            lambda: found.update({one: found[one].to(torch.float64)}),
        )
    )
    change()
    save_file(found, folder / TENSORS)
    for name, tensor in found.items():
        if "tensors" not in head:
            continue
        digest = store.tensor_digest(tensor)
        if "sha256" in head["codings"].get(name, {}):
            head["codings"][name]["sha256"] = digest
        else:
            head["tensors"][name] = digest
    _write_head(folder, head, True)


def _write_head(folder: Path, head: dict[str, Any], honest: bool) -> None:
    if honest:
        try:
            whole = {"edits": head["edits"], "tensors": head["tensors"], "base": head["base"]["digest"]}
            head["digest"] = store.json_digest(whole)
            head["checksum"] = store.json_digest({key: value for key, value in head.items() if key != "checksum"})
        except (KeyError, TypeError, IndexError, AttributeError):
            pass
    (folder / HEAD).write_text(json.dumps(head))


MUTATIONS = (bits, cut, splice, head_value, head_value, coding, coding, bundled, nest, header, header, tensors, tensors)


class Slow(Exception):
    """A file took too long."""


def fuzz(files: int, seed: int) -> Counter[str]:
    """How often a mutated file was ``refused``, loaded as it was (``same``), or as another adapter that fits itself (``other``).

    Raises:
        AssertionError: for the first that crashed, hung or took too much memory: it names the mutation and the number.
    """
    counts: Counter[str] = Counter()

    def late(*_: Any) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory() as place:
        folders = corpus(Path(place))
        digests = {folder: store.read(folder).digest for folder in folders}
        before = _peak()
        for number in range(files):
            chance = random.Random(f"{seed} {number}")
            whole, mutate = chance.choice(folders), chance.choice(MUTATIONS)
            folder = Path(place) / "mutated"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            mutate(folder, chance)
            where = f"file {number} of seed {seed}, {mutate.__name__} of {whole.name}"
            signal.alarm(SECONDS)
            try:
                counts[_outcome(folder, digests[whole])] += 1
            except BaseException as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:300]}") from error
            finally:
                signal.alarm(0)
            after = _peak()
            assert after - before < MEGABYTES, f"{where}: took {after - before:.0f} MB"
            before = after
            counts[mutate.__name__] += 1
    return counts


def _outcome(folder: Path, digest: str) -> str:
    """Read at once and one by one: both end alike."""
    try:
        opened = store.open(folder)
        edits = dict(opened.edits)
        _ = (opened.touched, opened.size, opened.bytes, opened.facts())
    except ia.IntarsiaError:
        opened, edits = None, {}
    try:
        adapter, told = store.read(folder), ""
    except ia.IntarsiaError as error:
        adapter, told = None, str(error)
    if adapter is None:
        assert opened is None, f"opened, and not read: {told}"
        assert len(told) < 5000, "the message is endless"
        return "refused"
    assert opened is not None, "read, and not opened"
    assert opened.digest == adapter.digest
    assert edits.keys() == adapter.edits.keys()
    return "same" if adapter.digest == digest else "other"


def _peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--files", type=int, default=2000)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    start = time.perf_counter()
    counts = fuzz(given.files, given.seed)
    print(f"{given.files} files (seed {given.seed}) in {time.perf_counter() - start:.0f} s: {dict(counts)}")


if __name__ == "__main__":
    main()
