"""The adapter: a set of edits with its metadata, and the folder that holds it.

    adapter.safetensors   the numbers: ``<weight>.indices`` + ``<weight>.values``, or ``.A`` + ``.B`` (+ ``.magnitude``)
    adapter.json          format, method, base, the type and shape of each edit, a SHA-256 of each tensor and of the whole
    README.md             the model card

A folder is written aside and renamed, so that a half-written one is never taken for an adapter, and a failed save leaves
the old one whole. Reading imports no method and no pickle, and checks everything before anything is used.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from intarsia._version import __version__
from intarsia.edits import Edit, build_edit
from intarsia.errors import IntarsiaError
from intarsia.store.card import card
from intarsia.store.digest import json_digest, tensor_digest

FORMAT = 1
TENSORS, HEAD, CARD = "adapter.safetensors", "adapter.json", "README.md"
REQUIRED = ("format", "name", "method", "base", "edits", "tensors", "digest", "checksum")


@dataclass(frozen=True)
class Base:
    """Which base an adapter belongs to: SHA-256 of all its weights, their dtype, and where it came from."""

    digest: str
    dtype: str
    source: str = ""


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is saved, switched, fused and served: edits by weight name, and what is to be known of them.

    Attributes:
        method: the config of the method that trained it, ``{"name": "shira", ...}``.
        about: targets, seed and what else belongs to its making.
        note: free remarks of whoever made it, such as losses; not part of the digest.
    """

    name: str
    edits: Mapping[str, Edit]
    base: Base
    method: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Every number of the adapter, by its name in the file."""
        return {f"{w}.{k}": t for w, edit in self.edits.items() for k, t in edit.tensors().items()}

    def facts(self) -> dict[str, Any]:
        """Type, shape and constants of each edit, as plain JSON values."""
        return {w: {"type": e.kind, "shape": list(e.shape)} | e.facts() for w, e in self.edits.items()}

    @property
    def digest(self) -> str:
        """SHA-256 over edits and base: equal for equal adapters, whatever their name and notes."""
        return _digest(self.facts(), {k: tensor_digest(t) for k, t in self.tensors().items()}, self.base.digest)

    @property
    def touched(self) -> int:
        """Entries of the base that it can change."""
        return sum(edit.touched for edit in self.edits.values())

    @property
    def size(self) -> int:
        """Entries of the weights that it edits."""
        return sum(edit.shape[0] * edit.shape[1] for edit in self.edits.values())

    @property
    def bytes(self) -> int:
        """Bytes of its numbers."""
        return sum(edit.bytes for edit in self.edits.values())


def _digest(facts: Mapping[str, Any], digests: Mapping[str, str], base: str) -> str:
    return json_digest({"edits": facts, "tensors": digests, "base": base})


def _checksum(head: Mapping[str, Any]) -> str:
    """SHA-256 of all the rest of the head, as it stands in the file."""
    return json_digest(json.loads(json.dumps({key: value for key, value in head.items() if key != "checksum"})))


# ------------------------------------------------------------------ writing
def write(adapter: Adapter, folder: str | Path, overwrite: bool = False) -> Path:
    """Write the adapter's folder, whole or not at all. -> the folder.

    Raises:
        IntarsiaError: when the folder exists (and is not to be overwritten), when a number is not finite, or when it
            cannot be written (no space, no permission); what stood there before is untouched.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise IntarsiaError(
            f"{folder} exists already; choose another folder, or pass overwrite=True (--overwrite) to replace it"
        )
    if folder.exists() and not (folder / HEAD).exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise IntarsiaError(f"{folder} is not an adapter folder, so it is not overwritten; choose another one")
    broken = [
        name for name, tensor in adapter.tensors().items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        raise IntarsiaError(
            f"not saved: {', '.join(broken[:5])} hold numbers that are not finite; the training diverged, lower the learning rate"
        )
    try:
        json.dumps([dict(adapter.method), dict(adapter.about), dict(adapter.note)])
    except (TypeError, ValueError) as error:
        raise IntarsiaError(
            f"not saved: the note holds what is no plain JSON value ({error}); give texts and numbers"
        ) from error
    aside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        _fill(aside, adapter)
        _swap(aside, folder)
    except OSError as error:
        raise IntarsiaError(
            f"could not save to {folder}: {error.strerror or error}; nothing there was changed"
        ) from error
    except SafetensorError as error:
        raise IntarsiaError(f"could not save to {folder}: {error}; nothing there was changed") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _fill(aside: Path, adapter: Adapter) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors().items()}
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    head = {
        "format": FORMAT,
        "written_by": f"intarsia {__version__}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": adapter.name,
        "digest": _digest(adapter.facts(), digests, adapter.base.digest),
        "method": dict(adapter.method),
        "base": {"digest": adapter.base.digest, "dtype": adapter.base.dtype, "source": adapter.base.source},
        "values": "delta",  # W' = W + values; never absolute in format 1
        "about": dict(adapter.about),
        "note": dict(adapter.note),
        "edits": adapter.facts(),
        "tensors": digests,
    }
    save_file(tensors, aside / TENSORS, metadata={"format": str(FORMAT), "library": "intarsia"})
    head["checksum"] = _checksum(head)
    (aside / HEAD).write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    (aside / CARD).write_text(card(head, adapter), encoding="utf-8")
    for name in (TENSORS, HEAD, CARD):
        with open(aside / name, "rb") as file:
            os.fsync(file.fileno())
    aside.chmod(0o755)


def _swap(aside: Path, folder: Path) -> None:
    """Put the finished folder in place of the old one; a failure in between puts the old one back.

    Other files in the old folder, such as a training log, are carried over.
    """
    if not folder.exists():
        aside.rename(folder)
        return
    hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    old = hidden / "adapter"
    try:
        folder.rename(old)
        try:
            aside.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        for other in [path for path in old.iterdir() if path.name not in (TENSORS, HEAD, CARD)]:
            other.rename(folder / other.name)
    finally:
        if folder.exists() and not (old.exists() and {p.name for p in old.iterdir()} - {TENSORS, HEAD, CARD}):
            shutil.rmtree(hidden, ignore_errors=True)


# ------------------------------------------------------------------ reading
def read(folder: str | Path) -> Adapter:
    """An adapter from its folder, checked whole. Needs neither a model nor the method's code.

    Raises:
        IntarsiaError: for a missing, truncated or changed file, a newer format, missing or extra tensors, indices out of
            range, numbers that are not finite; all faults at once.
    """
    folder = Path(folder)
    head = _read_head(folder)
    try:
        # Not load_file: it maps the file, and whoever wrote into it later would change what has been checked here.
        tensors = load((folder / TENSORS).read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise IntarsiaError(
            f"{folder / TENSORS} cannot be read: {error}; it is cut off or not a safetensors file. Fetch it again"
        ) from error
    faults = [f"missing tensor {name}" for name in sorted(head["tensors"].keys() - tensors.keys())]
    faults += [f"unexpected tensor {name}" for name in sorted(tensors.keys() - head["tensors"].keys())]
    faults += [
        f"{name}: its bytes do not match its digest; the file was changed or damaged"
        for name in sorted(tensors.keys() & head["tensors"].keys())
        if tensor_digest(tensors[name]) != head["tensors"][name]
    ]
    fits = _digest(head["edits"], head["tensors"], head["base"]["digest"]) == head["digest"]
    if not faults and not (fits and _checksum(head) == head["checksum"]):
        faults.append(f"{HEAD} does not match its own digest; it was edited or damaged")
    edits, more = _build_edits(head["edits"], tensors) if not faults else ({}, [])
    faults += more
    if faults:
        shown = faults[:10] + ([f"... and {len(faults) - 10} more"] if len(faults) > 10 else [])
        raise IntarsiaError(f"{folder} is not a whole adapter:\n  " + "\n  ".join(shown))
    base = Base(head["base"]["digest"], head["base"]["dtype"], head["base"].get("source", ""))
    return Adapter(head["name"], edits, base, head["method"], head.get("about", {}), head.get("note", {}))


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


def _build_edits(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Edit], list[str]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        weight, _, part = name.rpartition(".")
        parts.setdefault(weight, {})[part] = tensor
    faults = [f"{weight}: tensors of a weight that has no edit" for weight in sorted(parts.keys() - facts.keys())]
    edits = {}
    for weight, fact in facts.items():
        try:
            edits[weight] = build_edit(fact["type"], _shape(fact["shape"]), parts.get(weight, {}), fact)
        except IntarsiaError as error:
            faults.append(f"{weight}: {error}")
        except (KeyError, TypeError, ValueError, OverflowError):
            faults.append(f"{weight}: its entry in {HEAD} is damaged")
    return edits, faults


def _shape(value: Any) -> tuple[int, int]:
    rows, columns = value
    if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0):
        raise ValueError(value)
    return rows, columns


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
