"""The index of a registry: an SQLite file that answers questions. The records are the truth, the index follows them.

Every question is asked within one transaction that first compares a listing of the records with what the index has
read, and reads those that are new or changed. So nothing can be lost with the index, and nothing needs to be kept in
step: not after a kill, not with writers elsewhere, not after copying files by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from intarsia.errors import IntarsiaError
from intarsia.folders import cache_folder
from intarsia.store.adapter import Base
from intarsia.store.digest import json_digest
from intarsia.store.place import PATIENCE, Disk, Place

FORMAT = 1  # of a registry, its records and its tags
SCHEMA = 1  # of the index, which is made anew when this changes
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
UNWRITABLE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
DIGEST = re.compile(r"[0-9a-f]{64}")

TABLES = f"""
CREATE TABLE files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, fault TEXT);
CREATE TABLE versions (
    path TEXT PRIMARY KEY REFERENCES files ON DELETE CASCADE,
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL,
    base TEXT NOT NULL, base_dtype TEXT NOT NULL, base_source TEXT NOT NULL,
    method TEXT NOT NULL, config TEXT NOT NULL, note TEXT NOT NULL, parents TEXT NOT NULL,
    bytes INTEGER NOT NULL, created TEXT NOT NULL, origin TEXT NOT NULL, removed TEXT
);
CREATE INDEX by_name ON versions (name, version);
CREATE INDEX by_digest ON versions (digest);
CREATE TABLE tags (
    path TEXT PRIMARY KEY REFERENCES files ON DELETE CASCADE,
    name TEXT NOT NULL, tag TEXT NOT NULL, version INTEGER NOT NULL
);
CREATE INDEX of_version ON tags (name, version);
PRAGMA user_version = {SCHEMA};
"""

T = TypeVar("T")


@dataclass(frozen=True)
class Version:
    """One version of a name: what its record says, and its tags.

    Attributes:
        digest: of the adapter, and the name of its object.
        method: config of the method that trained it.
        note: the remarks that were saved with it, such as losses.
        parents: digests of the adapters that it was made from.
        file_bytes: of its files.
        origin: where it was pulled from, if it was.
    """

    name: str
    version: int
    digest: str
    base: Base
    method: Mapping[str, Any]
    note: Mapping[str, Any]
    parents: tuple[str, ...]
    file_bytes: int
    created: str
    origin: str = ""
    removed: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """``name@3``."""
        return f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return self._record() | {"tags": list(self.tags)}

    def _record(self) -> dict[str, Any]:
        base = {"digest": self.base.digest, "dtype": self.base.dtype, "source": self.base.source}
        return {
            "name": self.name, "version": self.version, "digest": self.digest, "base": base, "method": dict(self.method),
            "note": dict(self.note), "parents": list(self.parents), "bytes": self.file_bytes, "created": self.created,
            "origin": self.origin, "removed": self.removed,
        }  # fmt: skip

    def record(self) -> bytes:
        """The file that is the truth about it."""
        head = {"format": FORMAT} | self._record()
        return (json.dumps(head | {"checksum": _checksum(head)}, indent=2) + "\n").encode()


def _checksum(head: Mapping[str, Any]) -> str:
    return json_digest(json.loads(json.dumps({k: v for k, v in head.items() if k != "checksum"})))


def record_path(name: str, version: int) -> str:
    """Where the record of a version stands."""
    return f"records/{name}/{version}.json"


def tag_path(name: str, tag: str) -> str:
    """Where a tag stands."""
    return f"tags/{name}/{tag}.json"


def parse(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object of a record, a tag or the registry itself. Raises IntarsiaError."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IntarsiaError(f"{what} cannot be read: {error}; it is cut off or damaged") from error
    form = found.get("format") if isinstance(found, dict) else None
    if not isinstance(form, int) or isinstance(form, bool) or form < 1:
        raise IntarsiaError(f"{what} does not say which format it is in; it is damaged")
    if form > FORMAT:
        raise IntarsiaError(
            f"{what} is in format {form}; this version reads up to {FORMAT}. Upgrade: pip install -U intarsia"
        )
    assert isinstance(found, dict)
    return found


def _version(content: bytes, path: str) -> Version:
    """What a record says. Raises IntarsiaError for one that is damaged or stands at the wrong place."""
    head = parse(content, path)
    try:
        base, parents = head["base"], head["parents"]
        found = Version(
            head["name"], head["version"], head["digest"], Base(base["digest"], base["dtype"], base["source"]),
            dict(head["method"]), dict(head["note"]), tuple(parents), head["bytes"], head["created"],
            head["origin"], head["removed"],
        )  # fmt: skip
        texts = (
            found.name,
            found.digest,
            found.base.digest,
            found.base.dtype,
            found.base.source,
            found.created,
            found.origin,
        )
        fits = all(isinstance(text, str) for text in (*texts, *parents, found.removed or ""))
        fits = fits and type(found.version) is int and type(found.file_bytes) is int and found.file_bytes < 1 << 63
        fits = fits and DIGEST.fullmatch(found.digest) is not None
    except (KeyError, TypeError, ValueError):
        raise IntarsiaError(f"{path} lacks what a record needs; it is damaged") from None
    if not fits or _checksum(head) != head.get("checksum"):
        raise IntarsiaError(f"{path} does not match its own checksum; it was edited or damaged")
    if record_path(found.name, found.version) != path:
        raise IntarsiaError(f"{path} is the record of {found.reference}; it was moved or copied there")
    return found


class Index:
    """Answers questions about a place's records and tags, always from what stands there now."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._memory: sqlite3.Connection | None = None
        self._turn = threading.Lock()

    @property
    def file(self) -> Path:
        """Beside the records on a local disk, in the cache folder for a registry that lies elsewhere."""
        if isinstance(self.place, Disk):
            return self.place.root / "index.sqlite"
        return cache_folder() / "registry" / f"{hashlib.sha256(self.place.url.encode()).hexdigest()[:16]}.sqlite"

    def ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Bring the index up to date and put a question to it. A damaged index is made anew."""
        try:
            return self._ask(question)
        except sqlite3.DatabaseError as error:
            if _code(error) not in DAMAGED:
                raise self._told(error) from error
        self.forget()
        try:
            return self._ask(question)
        except sqlite3.DatabaseError as error:
            raise self._told(error) from error

    def _told(self, error: sqlite3.DatabaseError) -> IntarsiaError:
        return IntarsiaError(f"{self.file}: {error}; the index is only a copy: it may be deleted when nobody uses it")

    def forget(self) -> None:
        """Delete the index: the next question reads every record again."""
        self._memory = None
        for ending in ("", "-journal"):
            self.file.with_name(self.file.name + ending).unlink(missing_ok=True)

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        with self._turn, contextlib.ExitStack() as stack:
            db = self._open()
            if db is not self._memory:
                stack.callback(db.close)
            db.execute("BEGIN IMMEDIATE")
            try:
                self._follow(db)
                answer = question(db)
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise
            return answer

    def _open(self) -> sqlite3.Connection:
        """The file, or memory where it cannot be written: a registry can be read from a disk that is read-only."""
        if self._memory is not None:
            return self._memory
        try:
            with contextlib.suppress(OSError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
            return _prepared(sqlite3.connect(self.file, timeout=PATIENCE, isolation_level=None))
        except sqlite3.OperationalError as error:
            if _code(error) not in UNWRITABLE:
                raise
        self._memory = _prepared(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False))
        return self._memory

    def _follow(self, db: sqlite3.Connection) -> None:
        """Read the records and tags that are new or changed, and forget those that are gone."""
        now = self.place.stamps("records") | self.place.stamps("tags")
        known = dict(db.execute("SELECT path, stamp FROM files"))
        for path in [path for path in known if now.get(path) != known[path]]:
            db.execute("DELETE FROM files WHERE path = ?", (path,))
        for path in sorted(path for path in now if now[path] != known.get(path)):
            with contextlib.suppress(FileNotFoundError):  # taken away meanwhile
                _enter(db, path, now[path], self.place.read(path))


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _prepared(db: sqlite3.Connection) -> sqlite3.Connection:
    try:
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA user_version").fetchone()[0] != SCHEMA:
            for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                db.execute(f"DROP TABLE {table}")
            for statement in TABLES.split(";\n"):
                db.execute(statement)
        db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db


def _enter(db: sqlite3.Connection, path: str, stamp: str, content: bytes) -> None:
    try:
        record = _version(content, path) if path.startswith("records/") else None
        number = 0 if record else _tagged(content, path)
    except IntarsiaError as error:
        db.execute("INSERT INTO files VALUES (?, ?, ?)", (path, stamp, str(error)))
        return
    db.execute("INSERT INTO files VALUES (?, ?, NULL)", (path, stamp))
    if record is None:
        _, name, file = path.split("/")
        db.execute("INSERT INTO tags VALUES (?, ?, ?, ?)", (path, name, file.removesuffix(".json"), number))
        return
    values = (
        path, record.name, record.version, record.digest, record.base.digest, record.base.dtype, record.base.source,
        str(record.method.get("name", "")), json.dumps(dict(record.method)), json.dumps(dict(record.note)),
        json.dumps(record.parents), record.file_bytes, record.created, record.origin, record.removed,
    )  # fmt: skip
    db.execute(f"INSERT INTO versions VALUES ({', '.join('?' * len(values))})", values)


def _tagged(content: bytes, path: str) -> int:
    number = parse(content, path).get("version")
    if type(number) is not int or path.count("/") != 2:
        raise IntarsiaError(f"{path} does not say which version it marks; it is damaged")
    return number


def versions(db: sqlite3.Connection, where: str = "1", *values: object, removed: bool = False) -> list[Version]:
    """The versions that meet a condition, by name and number; those that were removed only where asked for."""
    live = "" if removed else " AND removed IS NULL"
    rows = db.execute(f"SELECT * FROM versions WHERE ({where}){live} ORDER BY name, version", values).fetchall()
    tags: dict[tuple[str, int], list[str]] = {}
    for name, tag, version in db.execute("SELECT name, tag, version FROM tags ORDER BY tag"):
        tags.setdefault((name, version), []).append(tag)
    return [
        Version(
            row["name"], row["version"], row["digest"], Base(row["base"], row["base_dtype"], row["base_source"]),
            json.loads(row["config"]), json.loads(row["note"]), tuple(json.loads(row["parents"])), row["bytes"],
            row["created"], row["origin"], row["removed"], tuple(tags.get((row["name"], row["version"]), ())),
        )
        for row in rows
    ]  # fmt: skip


def faults(db: sqlite3.Connection, folder: str = "") -> dict[str, str]:
    """The files that cannot be read, and why."""
    rows = db.execute("SELECT path, fault FROM files WHERE fault IS NOT NULL ORDER BY path").fetchall()
    return {path: fault for path, fault in rows if path.startswith(folder)}
