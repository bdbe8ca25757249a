"""Writing an adapter's folder, whole or not at all.

    adapter.safetensors   the numbers: ``<weight>.indices`` + ``<weight>.values``, or ``.A`` + ``.B`` (+ ``.magnitude``)
    adapter.json          format, method, base, type and shape of each edit, codings, a SHA-256 of each tensor and of the whole
    README.md             the model card

A folder is written aside and renamed, so that a half-written one is never taken for an adapter, and a failed save leaves
the old one whole.
"""

from __future__ import annotations

import ctypes
import datetime
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from intarsia._version import __version__
from intarsia.errors import IntarsiaError, nearest
from intarsia.method import Start
from intarsia.store.adapter import CARD, FORMAT, HEAD, TENSORS, Adapter, edits_digest
from intarsia.store.bundle import bundle
from intarsia.store.card import card
from intarsia.store.coding import INDEX_BYTES, MOST_INDICES, SINCE_3, encode
from intarsia.store.digest import json_digest, tensor_digest
from intarsia.store.values import MOST_NUMBERS, encode_values

CODINGS = ("compact", "masks", "plain")
OLD = ".old"  # of the hidden folder that holds the adapter before, while two renames are made
SMALL = 256  # bytes; below it, saying in the head that a tensor is the same as another one takes more than the tensor


def checksum(head: Mapping[str, Any]) -> str:
    """SHA-256 of all the rest of the head, as it stands in the file."""
    return json_digest(json.loads(json.dumps({key: value for key, value in head.items() if key != "checksum"})))


def write(
    adapter: Adapter, folder: str | Path, overwrite: bool = False, *, coding: str = "compact", values: str | None = None
) -> Path:
    """Write the adapter's folder, whole or not at all. -> the folder.

    Args:
        coding: ``compact``: indices, and values that were compressed, in the smallest exact coding, no tensor twice; ``masks``: the
            same, with three-valued numbers as two bit masks; ``plain``: every tensor as it is, so that
            any program can read ``<weight>.indices`` and ``<weight>.values``. All are exact, and read back alike.
        values: ``bfloat16`` or ``float16``: round what is added once (:meth:`Adapter.rounded`); None: keep every bit.

    Raises:
        IntarsiaError: when the folder exists (and is not to be overwritten), when a number is not finite or too large for
            the type asked for, or when it cannot be written (no space, no permission); what stood there before is untouched.
    """
    folder = Path(folder)
    if coding not in CODINGS:
        raise IntarsiaError(f"coding={coding!r}; {nearest(coding, CODINGS)}")
    if folder.exists() and not overwrite:
        raise IntarsiaError(
            f"{folder} exists already; choose another folder, or pass overwrite=True (--overwrite) to replace it"
        )
    if folder.exists() and not (folder / HEAD).exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise IntarsiaError(f"{folder} is not an adapter folder, so it is not overwritten; choose another one")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors().items()}
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise IntarsiaError(
            f"not saved: {', '.join(broken[:5])} hold numbers that are not finite; the training diverged, lower the learning rate"
        )
    if values is not None:
        adapter = adapter.rounded(values)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors().items()}
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
        _fill(aside, adapter, tensors, coding)
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


def _fill(aside: Path, adapter: Adapter, tensors: dict[str, Tensor], coding: str) -> None:
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    codings, stored = ({}, tensors) if coding == "plain" else _compact(adapter, tensors, digests, coding == "masks")
    head: dict[str, Any] = {
        "format": FORMAT if any(entry["coding"] in SINCE_3 for entry in codings.values()) else FORMAT - 1,
        "written_by": f"intarsia {__version__}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": adapter.name,
        "digest": edits_digest(adapter.facts(), digests, adapter.base.digest),
        "method": dict(adapter.method),
        "base": {"digest": adapter.base.digest, "dtype": adapter.base.dtype, "source": adapter.base.source},
        "values": "delta",  # W' = W + values; never absolute
        "about": dict(adapter.about),
        "note": dict(adapter.note),
        "edits": adapter.facts(),
        "tensors": digests,
        "codings": codings,
    }
    head["checksum"] = checksum(head)
    shown, stored = bundle(head, stored) if head["format"] > 2 else (head, stored)
    save_file(_apart(stored), aside / TENSORS, metadata={"format": "pt"})
    (aside / HEAD).write_text(_lines(shown), encoding="utf-8")
    (aside / CARD).write_text(card(head, adapter, (aside / TENSORS).stat().st_size), encoding="utf-8")
    (aside / TENSORS).chmod((aside / HEAD).stat().st_mode)  # safetensors keeps its file from all but the owner
    for name in (TENSORS, HEAD, CARD):
        with open(aside / name, "rb") as file:
            os.fsync(file.fileno())
    aside.chmod(0o755)


def _lines(head: Mapping[str, Any]) -> str:
    """JSON for people in little room: a line for each key, and for each weight and tensor."""
    whole = []
    for key, value in head.items():
        text = json.dumps(value)
        if key in ("edits", "tensors", "codings") and value:
            text = "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"
        whole.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(whole) + "\n}\n"


def _compact(
    adapter: Adapter, tensors: Mapping[str, Tensor], digests: Mapping[str, str], masks: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the head says of tensors that are not stored as they are, and those that are stored."""
    codings, stored, coded = _coded(adapter, tensors, masks)
    first: dict[str, str] = {}
    again = {
        name: first.setdefault(digests[name], name)
        for name in stored
        if (tensors if name in coded else stored)[name].nbytes > SMALL and first.setdefault(digests[name], name) != name
    }
    # So many times the file's bytes a reader would take for hostile: then each is written out.
    if _readable(adapter, {n: t for n, t in stored.items() if n not in again}, MOST_INDICES // 2):
        codings |= {name: {"coding": "same", "as": other} for name, other in again.items()}
        stored = {name: tensor for name, tensor in stored.items() if name not in again}
    return codings, stored


def _coded(
    adapter: Adapter, tensors: Mapping[str, Tensor], masks: bool
) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """Codings, stored tensors, and whose values are coded: in the smallest way that a reader does not take for hostile."""
    for few in (masks, True):
        numbers = {name: encode_values(tensor, adapter.codes.get(name), few) for name, tensor in tensors.items()}
        coded = {name: found for name, found in numbers.items() if found is not None}
        codings, stored = _supports(adapter, tensors, coded)
        # Hardly any signs among very many zeros would be a small file that fills the memory.
        most = MOST_NUMBERS * sum(tensor.nbytes for tensor in stored.values())
        if sum(tensors[name].nbytes for name in coded) <= most and _readable(adapter, stored, MOST_INDICES):
            return codings, stored, set(coded)
    return *_supports(adapter, tensors, {}), set()


def _supports(
    adapter: Adapter, tensors: Mapping[str, Tensor], coded: Mapping[str, tuple[dict[str, Any], Tensor]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Codings and stored tensors, with the values that are ``coded`` and the best for each support beside them."""
    codings: dict[str, Any] = {name: entry for name, (entry, _) in coded.items()}
    small = "compressed" in adapter.about
    stored = dict(tensors) | {name: data for name, (_, data) in coded.items()}
    for weight, edit in adapter.outlines.items():
        for part, units in edit.supports().items():
            name, values = f"{weight}.{part}", f"{weight}.{part.removesuffix('indices')}values"
            entry, data = encode(
                tensors[name], edit.shape, units, _key(adapter, weight), tight=values in coded or small
            )
            if entry:
                del stored[name]
                codings[name] = entry
                stored |= {} if data is None else {name: data}
    return codings, stored


def _readable(adapter: Adapter, stored: Mapping[str, Tensor], most: int) -> bool:
    """Whether the indices in memory are at most so many times the bytes that are stored."""
    return INDEX_BYTES * _indices(adapter) <= most * sum(tensor.nbytes for tensor in stored.values())


def _key(adapter: Adapter, weight: str) -> int | None:
    """The key that draws random supports at a weight, where it is known: that of its making."""
    seed = adapter.about.get("seed")
    return None if type(seed) is not int else Start.at(weight.removesuffix(".weight"), seed).key


def _indices(adapter: Adapter) -> int:
    return sum(edit.tensors()[part].numel() for edit in adapter.outlines.values() for part in edit.supports())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as the safetensors library asks."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _swap(aside: Path, folder: Path) -> None:
    """Put the finished folder in place of the old one; what is left at ``aside`` may be thrown away.

    Other files in the old folder, such as a training log, are carried over. On Linux the two change places in one step, so
    whoever looks, or whatever is killed, finds the old adapter or the new one. Elsewhere there is an instant between two
    renames when the folder is not there; a failure in between puts the old one back.
    """
    if not folder.exists():
        aside.rename(folder)
        return
    for other in [path for path in folder.iterdir() if path.name not in (TENSORS, HEAD, CARD)]:
        _carry(other, aside / other.name)
    if not folder.is_symlink() and _exchange(aside, folder):
        return
    hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=OLD, dir=folder.parent))
    old = hidden / "adapter"
    try:
        folder.rename(old)
        try:
            aside.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
    finally:
        if folder.exists():
            shutil.rmtree(hidden, ignore_errors=True)


def _carry(path: Path, to: Path) -> None:
    """The same file or folder at another place too; as a second name where the file system has such."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, to, symlinks=True, copy_function=link)
    elif path.is_symlink():
        to.symlink_to(path.readlink())
    else:
        link(str(path), str(to))


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step. -> False where the system or its file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(error, os.strerror(error))
