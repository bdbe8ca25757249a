"""Writing an adapter's folder, whole or not at all.

    adapter.safetensors   the numbers: ``<weight>.indices`` + ``<weight>.values``, or ``.A`` + ``.B`` (+ ``.magnitude``)
    adapter.json          format, method, base, the type and shape of each edit, a SHA-256 of each tensor and of the whole
    README.md             the model card

A folder is written aside and renamed, so that a half-written one is never taken for an adapter, and a failed save leaves
the old one whole.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from intarsia._version import __version__
from intarsia.errors import IntarsiaError
from intarsia.store.adapter import CARD, FORMAT, HEAD, TENSORS, Adapter, edits_digest
from intarsia.store.card import card
from intarsia.store.digest import json_digest, tensor_digest


def checksum(head: Mapping[str, Any]) -> str:
    """SHA-256 of all the rest of the head, as it stands in the file."""
    return json_digest(json.loads(json.dumps({key: value for key, value in head.items() if key != "checksum"})))


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
        "digest": edits_digest(adapter.facts(), digests, adapter.base.digest),
        "method": dict(adapter.method),
        "base": {"digest": adapter.base.digest, "dtype": adapter.base.dtype, "source": adapter.base.source},
        "values": "delta",  # W' = W + values; never absolute in format 1
        "about": dict(adapter.about),
        "note": dict(adapter.note),
        "edits": adapter.facts(),
        "tensors": digests,
    }
    save_file(tensors, aside / TENSORS, metadata={"format": str(FORMAT), "library": "intarsia"})
    head["checksum"] = checksum(head)
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
