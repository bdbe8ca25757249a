"""The head of an adapter's folder, ``adapter.json``: read strictly, before anything else is."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.errors import IntarsiaError
from intarsia.store.adapter import FORMAT, HEAD, TENSORS
from intarsia.store.coding import SINCE_3
from intarsia.store.writing import OLD

REQUIRED = ("format", "name", "method", "base", "edits", "tensors", "digest", "checksum")


def read_head(folder: Path) -> dict[str, Any]:
    """The head as it stands in its file, whole unless it is bundled.

    Raises:
        IntarsiaError: for a folder that is no adapter, a head that cannot be read, and a newer format.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        before = next(folder.parent.glob(f".{glob.escape(folder.name)}.*{OLD}/adapter"), None)
        cut = f". A save was cut short: the adapter before it is {before}, rename it to {folder}" if before else ""
        raise IntarsiaError(f"{folder} {what}; an adapter is a folder with {HEAD} and {TENSORS}{cut}")
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
    if head["format"] < 3 and "bundled" in head:
        raise IntarsiaError(f"{folder / HEAD} is damaged: format {head['format']} has no bundles")
    if not head.get("bundled"):
        check_head(folder, head)
    return head


def check_head(folder: Path, head: Mapping[str, Any]) -> None:
    """Raise IntarsiaError where the whole head lacks something, or has something of another type."""
    required = REQUIRED if head["format"] < 2 else (*REQUIRED, "codings")
    missing = [key for key in required if key not in head]
    if missing:
        raise IntarsiaError(f"{folder / HEAD} lacks {', '.join(missing)}; it is damaged")
    faults = [
        f"{where} is {type(value).__name__}, expected {kind.__name__}"
        for where, value, kind in (
            *((key, head[key], dict) for key in ("method", "base", "edits", "tensors")),
            *((key, head.get(key, {}), dict) for key in ("about", "note", "codings")),
            *((key, head[key], str) for key in ("name", "digest")),
        )
        if not isinstance(value, kind)
    ]
    if not faults:
        base = {"source": ""} | head["base"]
        faults = [
            f"base.{key} is no text" for key in ("digest", "dtype", "source") if not isinstance(base.get(key), str)
        ]
        faults += [
            f"what {key} says of {name} is no {kind.__name__}"
            for key, kind in (("edits", dict), ("tensors", str), ("codings", dict))
            for name, value in head.get(key, {}).items()
            if not isinstance(value, kind)
        ][:5]
        faults += ["format 1 has no codings"] if head["format"] < 2 and "codings" in head else []
        newer = {str(e.get("coding")) for e in head.get("codings", {}).values() if isinstance(e, dict)} & {*SINCE_3}
        faults += [f"format 2 has no coding {', '.join(sorted(newer))}"] if head["format"] == 2 and newer else []
    if faults:
        raise IntarsiaError(f"{folder / HEAD} is damaged: {'; '.join(faults)}")
