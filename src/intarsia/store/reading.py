"""Reading an adapter's folder: strictly, without the method's code and without pickle.

``open`` reads and checks the head, and the sizes of all tensors; a weight's numbers are read and checked when its edit is
asked for. ``read`` does all of it at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from intarsia.edits import Edit, build_edit
from intarsia.errors import IntarsiaError
from intarsia.store.adapter import FORMAT, HEAD, TENSORS, Adapter, Base, LazyEdits, edits_digest
from intarsia.store.digest import tensor_digest
from intarsia.store.tensorfile import TensorFile, Unreadable
from intarsia.store.writing import checksum

T = TypeVar("T")

REQUIRED = ("format", "name", "method", "base", "edits", "tensors", "digest", "checksum")
MOST_ENTRIES = 1 << 62  # of a weight: flat positions are int64


def read(folder: str | Path) -> Adapter:
    """An adapter from its folder, checked whole. Needs neither a model nor the method's code.

    Raises:
        IntarsiaError: for a missing, truncated or changed file, a newer format, missing or extra tensors, indices out of
            range, numbers that are not finite; all faults at once.
    """
    folder = Path(folder)
    adapter = open(folder)
    edits, faults = {}, []
    for weight in adapter.edits:
        try:
            edits[weight] = adapter.edits[weight]
        except IntarsiaError as error:
            faults.append(str(error).removeprefix(_not_whole(folder, [])))
    _raise(folder, faults)
    return Adapter(adapter.name, edits, adapter.base, adapter.method, adapter.about, adapter.note)


def open(folder: str | Path) -> Adapter:
    """An adapter whose ``edits`` are read one by one, each when it is first asked for. Needs neither a model nor the method.

    Checked at once: the head with its checksum, and that names, types, shapes and sizes of all tensors fit it. A weight's
    digest, range of indices and finiteness are checked when ``edits[weight]`` is first asked for, which then raises what
    this would. The file is not mapped: a weight's numbers are copied, and one that was changed since is refused.

    Raises:
        IntarsiaError: for a missing, truncated or newer file, a changed head, missing or extra tensors; all faults at once.
    """
    folder = Path(folder)
    head = _read_head(folder)
    try:
        file = TensorFile.open(folder / TENSORS)
    except Unreadable as error:
        raise IntarsiaError(_unreadable(folder, error)) from error
    faults = [f"missing tensor {name}" for name in sorted(head["tensors"].keys() - file.entries.keys())]
    faults += [f"unexpected tensor {name}" for name in sorted(file.entries.keys() - head["tensors"].keys())]
    if not faults and not _fits_itself(head):
        faults.append(f"{HEAD} does not match its own digest; it was edited or damaged")
    _raise(folder, faults)
    outlines: dict[str, Edit] = {}
    names = _by_weight(head["tensors"])
    faults = [
        f"{weight}: tensors of a weight that has no edit" for weight in sorted(names.keys() - head["edits"].keys())
    ]
    for weight, fact in head["edits"].items():
        try:
            found = {part: _outline(file, name) for part, name in names.get(weight, {}).items()}
            outlines[weight] = _checked(weight, lambda fact=fact, found=found: _build(fact, found))  # type: ignore[misc]
        except IntarsiaError as error:
            faults.append(str(error))
    _raise(folder, faults)
    make = partial(_make, folder, file, names, head["edits"], head["tensors"])
    edits = LazyEdits(outlines, head["tensors"], make)
    base = Base(head["base"]["digest"], head["base"]["dtype"], head["base"].get("source", ""))
    return Adapter(head["name"], edits, base, head["method"], head.get("about", {}), head.get("note", {}))


def _make(
    folder: Path,
    file: TensorFile,
    names: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, Any],
    digests: Mapping[str, str],
    weight: str,
) -> Edit:
    """One weight's edit from the file."""
    tensors, faults = {}, []
    for part, name in names.get(weight, {}).items():
        try:
            tensors[part] = file.read(name)
        except Unreadable as error:
            raise IntarsiaError(_unreadable(folder, error)) from error
        if tensor_digest(tensors[part]) != digests[name]:
            faults.append(f"{name}: its bytes do not match its digest; the file was changed or damaged")
    _raise(folder, faults)
    try:
        return _checked(weight, lambda: _build(facts[weight], tensors))
    except IntarsiaError as error:
        raise IntarsiaError(_not_whole(folder, [str(error)])) from error


def _build(fact: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    return build_edit(fact["type"], _shape(fact["shape"]), tensors, fact)


def _checked(weight: str, build: Callable[[], T]) -> T:
    """What ``build`` makes of a weight's entry. Raises one IntarsiaError, whatever is wrong with it."""
    try:
        return build()
    except IntarsiaError as error:
        raise IntarsiaError(f"{weight}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise IntarsiaError(f"{weight}: its entry in {HEAD} is damaged") from error


def _outline(file: TensorFile, name: str) -> Tensor:
    entry = file.entries[name]
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _by_weight(names: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The tensors' whole names by weight and part: ``up.weight.A`` is part ``A`` of ``up.weight``."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        weight, _, part = name.rpartition(".")
        found.setdefault(weight, {})[part] = name
    return found


def _fits_itself(head: Mapping[str, Any]) -> bool:
    try:
        whole = edits_digest(head["edits"], head["tensors"], head["base"]["digest"])
        return bool(whole == head["digest"] and checksum(head) == head["checksum"])
    except RecursionError:
        return False


def _raise(folder: Path, faults: list[str]) -> None:
    if faults:
        raise IntarsiaError(_not_whole(folder, faults))


def _not_whole(folder: Path, faults: list[str]) -> str:
    shown = faults[:10] + ([f"... and {len(faults) - 10} more"] if len(faults) > 10 else [])
    return f"{folder} is not a whole adapter:\n  " + "\n  ".join(shown)


def _unreadable(folder: Path, error: Unreadable) -> str:
    return f"{folder / TENSORS} cannot be read: {error}; it is cut off or not a safetensors file. Fetch it again"


def _read_head(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise IntarsiaError(f"{folder} {what}; an adapter is a folder with {HEAD} and {TENSORS}")
    if not (folder / HEAD).exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise IntarsiaError(f"{folder} is not an adapter: it has no {HEAD} (found {found})")
    try:
        head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise IntarsiaError(
            f"{folder / HEAD} cannot be read: {error}; it is cut off or damaged. Fetch it again"
        ) from error
    if not isinstance(head, dict) or not isinstance(head.get("format"), int):
        raise IntarsiaError(f"{folder / HEAD} does not say which format it is in; it is not an adapter of intarsia")
    if isinstance(head["format"], bool) or head["format"] < 1:
        raise IntarsiaError(f"{folder / HEAD} says format {head['format']}; there is none below 1. It is damaged")
    if head["format"] > FORMAT:
        raise IntarsiaError(
            f"{folder} is in format {head['format']}; this version reads up to {FORMAT}. Upgrade: pip install -U intarsia"
        )
    missing = [key for key in REQUIRED if key not in head]
    if missing:
        raise IntarsiaError(f"{folder / HEAD} lacks {', '.join(missing)}; it is damaged")
    faults = [
        f"{where} is {type(value).__name__}, expected {kind.__name__}"
        for where, value, kind in (
            *((key, head[key], dict) for key in ("method", "base", "edits", "tensors")),
            *((key, head.get(key, {}), dict) for key in ("about", "note")),
            *((key, head[key], str) for key in ("name", "digest")),
        )
        if not isinstance(value, kind)
    ]
    if not faults:
        base = {"source": ""} | head["base"]
        faults = [
            f"base.{key} is no text" for key in ("digest", "dtype", "source") if not isinstance(base.get(key), str)
        ]
    if faults:
        raise IntarsiaError(f"{folder / HEAD} is damaged: {'; '.join(faults)}")
    return head


def _shape(value: Any) -> tuple[int, int]:
    rows, columns = value
    if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0):
        raise ValueError(value)
    if rows * columns >= MOST_ENTRIES:
        raise ValueError(value)
    return rows, columns
