"""Where a registry lies: a folder of a local disk, or a folder of any file system that fsspec knows.

Both offer the same few operations, and each of them happens whole or leaves what it began to be recognised: names that
begin with a dot are unfinished or given up. An object is a folder; it is whole where its ``adapter.json`` stands, which
is put last and taken first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from intarsia.errors import IntarsiaError
from intarsia.store.adapter import HEAD

PATIENCE = 60.0  # seconds to wait for another writer
PART = ".part-"  # what a writer is at work on, or a writer that was killed


class Place(Protocol):
    """A folder, somewhere. Paths are relative, with "/" between their parts."""

    url: str
    local: bool

    def names(self, folder: str) -> list[str]:
        """What is in a folder, unfinished things too; nothing where there is no such folder."""

    def stamps(self, folder: str) -> dict[str, str]:
        """Every finished file below a folder, with a text that changes whenever its content does."""

    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""

    def write(self, path: str, content: bytes) -> None:
        """Put a file, whole or not at all, in place of what stood there."""

    def create(self, path: str, content: bytes) -> None:
        """Put a file that must not be there yet. Raises FileExistsError."""

    def delete(self, path: str) -> None:
        """Take a file away, if it is there."""

    def whole(self, folder: str) -> bool:
        """Whether an object stands there."""

    def bytes_of(self, folder: str) -> int:
        """Bytes of the files below a folder."""

    def age(self, folder: str) -> float | None:
        """Seconds since a file below it was last written; None where the file system does not say."""

    def stage(self) -> contextlib.AbstractContextManager[Path]:
        """A new local folder to fill with an object; afterwards it is gone, put or not."""

    def put(self, staged: Path, folder: str) -> None:
        """Make an object of a staged folder, in place of one that stood there."""

    def fetch(self, folder: str, target: Path) -> None:
        """Copy an object's files into a local folder. Raises FileNotFoundError."""

    def unfinished(self) -> list[str]:
        """What writers are at work on, or what killed writers left."""

    def discard(self, path: str) -> None:
        """Take a folder or file away; what is left of it by a process that was killed is no whole object."""

    def lock(self) -> contextlib.AbstractContextManager[object]:
        """One writer at a time, where the file system can promise that."""


def place_at(url: str | Path) -> Place:
    """The place of a path or an fsspec URL (``s3://...``, ``memory://...``).

    Raises:
        IntarsiaError: for a protocol that is unknown or whose package is not installed.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    text = os.path.expanduser(os.fspath(url))
    if not text.strip():
        raise IntarsiaError("no registry is named; expected a folder or a URL such as s3://bucket/registry")
    try:
        system, root = url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise IntarsiaError(f"registry {text!r}: {error}; expected a folder, or a URL that fsspec can open") from error
    return Disk(Path(root)) if isinstance(system, LocalFileSystem) else Remote(text, system, root)


class Disk:
    """A folder of a local disk: renames are atomic there, and a file lock keeps writers apart."""

    local = True

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, str(root)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / folder))
        except FileNotFoundError:
            return []

    def stamps(self, folder: str) -> dict[str, str]:
        found: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    found |= self.stamps(path)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    about = os.stat(entry.path)
                    found[path] = f"{about.st_ino}-{about.st_size}-{about.st_mtime_ns}"
        return found

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{PART}{uuid.uuid4().hex}")
        try:
            with open(aside, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        _keep(target.parent)

    def create(self, path: str, content: bytes) -> None:
        if (self.root / path).exists():  # under the lock, so nothing comes in between
            raise FileExistsError(path)
        self.write(path, content)

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def whole(self, folder: str) -> bool:
        return (self.root / folder / HEAD).exists()

    def bytes_of(self, folder: str) -> int:
        top, total = self.root / folder, 0
        for path in (top, *top.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # finished or given up meanwhile
                total += path.stat().st_size if path.is_file() else 0
        return total

    def age(self, folder: str) -> float | None:
        top, times = self.root / folder, []
        for path in (top, *top.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # finished or given up meanwhile
                times.append(path.stat().st_mtime)
        return time.time() - max(times) if times else None

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        aside = self.root / "objects" / f"{PART}{uuid.uuid4().hex}"
        aside.mkdir(parents=True)
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def put(self, staged: Path, folder: str) -> None:
        for path in staged.iterdir():
            _keep(path)
        target = self.root / folder
        if target.exists():
            self.discard(folder)
        staged.rename(target)
        _keep(target.parent)

    def fetch(self, folder: str, target: Path) -> None:
        shutil.copytree(self.root / folder, target, dirs_exist_ok=True)

    def unfinished(self) -> list[str]:
        found = []
        for top, folders, files in os.walk(self.root):
            found += [os.path.join(top, name) for name in (*folders, *files) if name.startswith(PART)]
            folders[:] = [name for name in folders if not name.startswith(PART) and os.path.basename(top) != "objects"]
        return sorted(os.path.relpath(path, self.root) for path in found)

    def discard(self, path: str) -> None:
        # Under another name first: what a kill leaves of it must not pass for an object.
        dead = (self.root / path).with_name(f"{PART}{uuid.uuid4().hex}")
        try:
            (self.root / path).rename(dead)
        except FileNotFoundError:
            return
        if dead.is_dir():
            shutil.rmtree(dead, ignore_errors=True)
        else:
            dead.unlink()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        import filelock

        self.root.mkdir(parents=True, exist_ok=True)
        waiting = filelock.FileLock(self.root / ".lock", timeout=PATIENCE)
        try:
            waiting.acquire()
        except filelock.Timeout as error:
            raise IntarsiaError(
                f"registry {self.url}: another process has been writing to it for {PATIENCE:.0f} s; try again later"
            ) from error
        try:
            yield
        finally:
            waiting.release()


def _keep(path: Path) -> None:
    """See a file's content, or a folder's names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Remote:
    """A folder of another file system, by fsspec. No lock: creating a file decides between two writers."""

    local = False

    def __init__(self, url: str, system: Any, root: str) -> None:
        self.url, self.system, self.root = url.rstrip("/"), system, root.rstrip("/")

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _files(self, folder: str) -> dict[str, dict[str, Any]]:
        self.system.invalidate_cache()  # or it may tell what stood there before
        try:
            found = self.system.find(self._at(folder), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self.system._strip_protocol(self.root)) + 1
        return {name[start:]: about for name, about in found.items()}

    def names(self, folder: str) -> list[str]:
        top = f"{folder}/" if folder else ""
        return sorted({path.removeprefix(top).partition("/")[0] for path in self._files(folder)})

    def stamps(self, folder: str) -> dict[str, str]:
        files = self._files(folder)
        return {
            path: repr(sorted((key, str(value)) for key, value in about.items()))
            for path, about in files.items()
            if not path.rpartition("/")[2].startswith(".")
        }

    def read(self, path: str) -> bytes:
        content: bytes = self.system.cat_file(self._at(path))
        return content

    def write(self, path: str, content: bytes) -> None:
        aside = f"{path.rpartition('/')[0]}/{PART}{uuid.uuid4().hex}".lstrip("/")
        self._make(path)
        try:
            self.system.pipe_file(self._at(aside), content)
            self.system.mv(self._at(aside), self._at(path))
        finally:
            self.delete(aside)

    def create(self, path: str, content: bytes) -> None:
        self._make(path)
        if self.system.exists(self._at(path)):
            raise FileExistsError(path)
        try:
            self.system.pipe_file(self._at(path), content, mode="create")
        except (ValueError, NotImplementedError, TypeError):  # it cannot tell creating from overwriting
            self.write(path, content)

    def _make(self, path: str) -> None:
        self.system.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._at(path))

    def whole(self, folder: str) -> bool:
        self.system.invalidate_cache()
        return bool(self.system.exists(self._at(f"{folder}/{HEAD}")))

    def bytes_of(self, folder: str) -> int:
        return sum(int(about.get("size") or 0) for about in self._files(folder).values())

    def age(self, folder: str) -> float | None:
        try:
            times = [float(self.system.modified(self._at(path)).timestamp()) for path in self._files(folder)]
        except (NotImplementedError, AttributeError, FileNotFoundError):
            return None
        return time.time() - max(times) if times else None

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="intarsia-") as folder:
            yield Path(folder)

    def put(self, staged: Path, folder: str) -> None:
        aside = f"{folder.rpartition('/')[0]}/{PART}{uuid.uuid4().hex}"
        files = _mark_last([path.name for path in staged.iterdir()])
        self._make(f"{aside}/{HEAD}")
        try:
            for name in files:
                self.system.put_file(str(staged / name), self._at(f"{aside}/{name}"))
            self._make(f"{folder}/{HEAD}")
            for name in files:
                self.system.mv(self._at(f"{aside}/{name}"), self._at(f"{folder}/{name}"))
        finally:
            self._remove(aside)

    def fetch(self, folder: str, target: Path) -> None:
        files = self._files(folder)
        if f"{folder}/{HEAD}" not in files:
            raise FileNotFoundError(folder)
        for path in files:
            self.system.get_file(self._at(path), str(target / path.rpartition("/")[2]))

    def unfinished(self) -> list[str]:
        found = set()
        for path in self._files(""):
            parts = path.split("/")
            found |= {"/".join(parts[: i + 1]) for i, part in enumerate(parts) if part.startswith(PART)}
        return sorted(found)

    def discard(self, path: str) -> None:
        self.delete(f"{path}/{HEAD}")
        self._remove(path)

    def _remove(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm(self._at(folder), recursive=True)

    def lock(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


def _mark_last(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == HEAD, name))
