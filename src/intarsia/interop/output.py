"""What is written: a file or a folder, checked first, made aside, and put in its place by one rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from intarsia.errors import IntarsiaError


@dataclass(frozen=True)
class Written:
    """What a conversion made.

    Attributes:
        path: the folder or the file.
        bytes: of all that is in it.
        loss: how much of the change was lost: ||change - written|| / ||change|| over the weights that had to be
            approximated; 0.0 where all is exact.
        facts: what else is worth knowing, as plain JSON values.
    """

    path: Path
    bytes: int
    loss: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


def check_output(path: Path, overwrite: bool, what: str, suffix: str = "", marks: tuple[str, ...] = ()) -> None:
    """Raise IntarsiaError where nothing can be written to ``path``: before any work is done.

    Args:
        what: such as "a PEFT adapter".
        suffix: of a file; a folder has none.
        marks: a folder that has none of these files is not one of ours to replace.
    """
    if suffix and path.suffix != suffix:
        raise IntarsiaError(f"{what} is one file, and {path} does not end in {suffix}; name it {path.name}{suffix}")
    if not suffix and path.suffix in (".safetensors", ".gguf"):
        raise IntarsiaError(f"{what} is a folder, and {path} is named like a file; leave out {path.suffix}")
    if not path.exists():
        return
    if bool(suffix) != path.is_file():
        raise IntarsiaError(
            f"{path} is a {'file' if path.is_file() else 'folder'}, {what} is none; choose another name"
        )
    if not overwrite:
        raise IntarsiaError(f"{path} exists already; choose another name, or replace it: overwrite=True (--overwrite)")
    if not suffix and any(path.iterdir()) and not any((path / mark).exists() for mark in marks):
        raise IntarsiaError(f"{path} is not {what}, so it is not overwritten; choose another folder")


@contextmanager
def made_aside(path: Path, suffix: str = "") -> Iterator[Path]:
    """A new folder to fill, or the name of a file to write, which takes the name ``path`` in one step at the end.

    What stood there before is gone only then; whatever fails leaves it as it was.
    """
    hidden: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        work = hidden / (path.name if suffix else "new")
        if not suffix:
            work.mkdir()
        yield work
        for file in [work] if suffix else [file for file in work.rglob("*") if file.is_file()]:
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        if suffix:
            os.replace(work, path)
        elif not path.exists():
            work.rename(path)
        else:
            path.rename(hidden / "old")
            try:
                work.rename(path)
            except BaseException:
                (hidden / "old").rename(path)
                raise
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise IntarsiaError(f"could not write {path}: {why}; nothing there was changed") from error
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)


def measured(path: Path, loss: float = 0.0, **facts: Any) -> Written:
    """What stands there now."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Written(path, sum(file.stat().st_size for file in files), loss, facts)
