"""The registry of adapters: named versions of them, each kept once, by its digest.

    registry.json                     which format the registry is in
    objects/<digest>/                 an adapter's folder, as it was written
    records/<name>/<version>.json     what a version is: digest, base, method, note, parents
    tags/<name>/<tag>.json            which version a tag marks
    index.sqlite                      a copy of the records to put questions to; may be deleted at any time

An object is put first and its record last, each in one step, so that a version is there whole or not at all. A version's
number is never given twice: what is removed leaves its record behind, marked so. Python has the same operations as
``intarsia registry``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from intarsia.errors import IntarsiaError, nearest
from intarsia.folders import cache_folder, data_folder
from intarsia.store import hub
from intarsia.store.adapter import Adapter, Base
from intarsia.store.index import DIGEST, FORMAT, Index, Version, faults, parse, record_path, tag_path, versions
from intarsia.store.place import PART, Disk, place_at
from intarsia.store.reading import read

MARK = "registry.json"
VARIABLE = "INTARSIA_REGISTRY"
OURS = {MARK, "objects", "records", "tags", "index.sqlite", "index.sqlite-journal"}
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
NEWEST = "latest"  # marks the newest version by itself
YOUNG = 3600.0  # seconds for which what no record names may belong to somebody who is still adding

T = TypeVar("T")
Work = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Added:
    """A version, and whether it is new: the same content under the same name is kept once.

    Attributes:
        other_note: it is not new, and its note, which stays, is not the one that was now given.
    """

    version: Version
    new: bool
    other_note: bool = False


@dataclass(frozen=True)
class Garbage:
    """What no record needs: objects, and what killed writers left.

    Attributes:
        young: how many more there are that may belong to somebody who is still adding.
    """

    found: tuple[str, ...]
    bytes: int
    young: int
    deleted: bool


@dataclass
class Checked:
    """What :meth:`Registry.verify` found."""

    versions: int = 0
    objects: int = 0
    unused: int = 0
    faults: list[str] = field(default_factory=list)


def default_url() -> str:
    """``$INTARSIA_REGISTRY``, else a folder among the user's data."""
    return os.environ.get(VARIABLE) or str(data_folder() / "registry")


def split(reference: str) -> tuple[str, int | str | None]:
    """``name``, ``name@3`` or ``name@tag`` -> the name, and the number, the tag or None."""
    name, sign, version = reference.partition("@")
    if not sign:
        return name, None
    return name, int(version) if version.isascii() and version.isdigit() else version


def folder_of(text: str) -> Path:
    """The folder of an adapter: a path, or NAME@VERSION (a number, a tag or ``latest``) in the registry.

    Raises:
        IntarsiaError: for a version that the registry has not.
    """
    path = Path(text)
    if path.exists() or "@" not in path.name:
        return path
    try:
        return Registry().get(text)
    except IntarsiaError as error:
        raise IntarsiaError(f"{text}: there is no such folder, and in the registry: {error}") from error


class Registry:
    """Adapters by name and version, in a folder or at any URL that fsspec can open.

    A version is given as ``"name"`` (the newest), ``"name@3"``, ``"name@tag"``, or in two words. Every mistake is an
    :class:`~intarsia.errors.IntarsiaError`, raised before anything is changed.
    """

    def __init__(self, url: str | Path | None = None) -> None:
        self.place = place_at(default_url() if url is None else url)
        self.index = Index(self.place)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.place.url

    # -------------------------------------------------------------- asking
    def list(
        self, name: str | None = None, *, base: str | None = None, method: str | None = None, tag: str | None = None
    ) -> Sequence[Version]:
        """The versions, by name and number: all, or those of a name, a base (its source or the start of its digest), a
        method, or with a tag."""

        def chosen(db: sqlite3.Connection) -> Sequence[Version]:
            if name is not None:
                self._versions(db, name)
            conditions = {
                "name = ?": name, "method = ?": method, "(base_source = ?1 OR substr(base, 1, length(?1)) = ?1)": base,
                "EXISTS (SELECT * FROM tags WHERE tags.name = versions.name AND tags.version = versions.version AND tag = ?)": tag,
            }  # fmt: skip
            found = {v.reference: v for v in versions(db)}
            for condition, value in conditions.items():
                if value is not None:
                    fits = {v.reference for v in versions(db, condition, value)}
                    found = {reference: v for reference, v in found.items() if reference in fits}
            return tuple(found.values())

        return self._ask(chosen)

    def show(self, name: str, version: int | str | None = None) -> Version:
        """One version: the newest of the name unless told otherwise."""
        return self._ask(lambda db: self._find(db, name, version))

    def unreadable(self) -> Sequence[str]:
        """Records and tags that cannot be read, and why."""
        return tuple(self._ask(faults).values())

    def named(self, digest: str) -> Sequence[str]:
        """The versions, of whatever name, that hold the adapter of this digest."""
        return tuple(v.reference for v in self._ask(lambda db: versions(db, "digest = ?", digest)))

    def get(self, name: str, version: int | str | None = None) -> Path:
        """A local folder with the adapter, checked whole: for ``deck.add(pirate=folder)`` and ``ia.load``.

        It belongs to the registry, or to a cache of it: read it, and leave it as it is.
        """
        found = self.show(name, version)
        with self._told():
            return self._fetch(found)

    def _fetch(self, found: Version) -> Path:
        what = f"{found.reference} in {self.url}"
        if isinstance(self.place, Disk):
            folder = self.place.root / "objects" / found.digest
            _checked(folder, found.digest, what)
            return folder
        kept = cache_folder() / "registry" / "objects" / found.digest
        with contextlib.suppress(IntarsiaError):  # not there yet, or damaged
            _checked(kept, found.digest, what)
            return kept
        aside = kept.with_name(f"{PART}{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            try:
                self.place.fetch(f"objects/{found.digest}", aside)
            except FileNotFoundError as error:
                raise IntarsiaError(f"{what}: its object is not there; intarsia registry verify tells more") from error
            _checked(aside, found.digest, what)
            shutil.rmtree(kept, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else was quicker
                aside.rename(kept)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        _checked(kept, found.digest, what)
        return kept

    # -------------------------------------------------------------- writing
    def add(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        tags: Sequence[str] = (),
        parents: Sequence[str] = (),
        origin: str = "",
    ) -> Added:
        """Keep a copy of an adapter's folder as the next version of a name (the folder's, by default).

        ``parents``: what it was made from, as versions of this registry or as digests; of a merged adapter, those that it was
        merged of, unless told otherwise. Content that the name has already
        makes no new version; tags are set all the same. An object that was damaged is replaced by the good copy.
        """
        source = Path(folder)
        adapter = read(source)
        parents = tuple(parents) or tuple(d for d in adapter.made_of.values() if DIGEST.fullmatch(d))
        name = _check_name(source.resolve().name if name is None else name)
        for tag in tags:
            _check_tag(tag)
        self._begin(create=True)
        with self._told(), self.place.stage() as staged:
            _copy(source, staged)
            _checked(staged, adapter.digest, f"{folder} changed while it was being added")
            with self.place.lock():
                if MARK not in self.place.names(""):
                    self.place.write(MARK, _json({"format": FORMAT}))
                return self._add(staged, adapter, name, tuple(tags), tuple(parents), origin)

    def _add(
        self, staged: Path, adapter: Adapter, name: str, tags: Sequence[str], parents: Sequence[str], origin: str
    ) -> Added:
        digest = adapter.digest

        def look(db: sqlite3.Connection) -> tuple[Version | None, tuple[str, ...]]:
            alike = versions(db, "digest = ?", digest)
            known = next((v for v in alike if v.name == name), None)
            for other in alike:
                if dict(other.method) != dict(adapter.method):
                    raise IntarsiaError(
                        f"{other.reference} holds these very numbers already, made by {dict(other.method)}; "
                        f"these were made by {dict(adapter.method)}, and one object cannot say both"
                    )
            lineage = tuple(self._parent(db, parent) for parent in parents)
            if known and lineage and lineage != known.parents:
                raise IntarsiaError(
                    f"{known.reference} holds this very adapter already, with other parents "
                    f"({', '.join(known.parents) or 'none'}); a record is not rewritten: remove it first"
                )
            for tag in tags:
                self._check_free(db, name, tag, known.version if known else None)
            return known, lineage

        known, lineage = self.index.ask(look)
        if not self._holds(digest):
            self.place.put(staged, f"objects/{digest}")
        version = known or self._create(adapter, name, lineage, origin)
        for tag in tags:
            self.place.write(tag_path(name, tag), _json({"format": FORMAT, "version": version.version}))
        tagged = dataclasses.replace(version, tags=tuple(sorted({*version.tags, *tags})))
        return Added(tagged, known is None, dict(version.note) != dict(adapter.note))

    def _holds(self, digest: str) -> bool:
        """Whether the object is there; on a local disk, also whether it is whole, so that adding it again mends it."""
        if not self.place.whole(f"objects/{digest}"):
            return False
        if isinstance(self.place, Disk):
            with contextlib.suppress(IntarsiaError):
                return read(self.place.root / "objects" / digest).digest == digest
            return False
        return True

    def _create(self, adapter: Adapter, name: str, parents: tuple[str, ...], origin: str) -> Version:
        size = self.place.bytes_of(f"objects/{adapter.digest}")
        while True:
            files = self.place.names(f"records/{name}")
            number = 1 + max((int(f[:-5]) for f in files if re.fullmatch(r"[0-9]+\.json", f)), default=0)
            version = Version(
                name, number, adapter.digest, adapter.base, adapter.method, adapter.note, parents, size, _now(), origin
            )
            with contextlib.suppress(FileExistsError):  # another writer was quicker: the next number
                self.place.create(record_path(name, number), version.record())
                return version

    def tag(self, name: str, tag: str, version: int | str | None = None, *, move: bool = False) -> Version:
        """Mark a version, the newest unless told otherwise. A tag marks one version of a name; ``move`` lets it go over."""
        _check_tag(tag)
        self._begin()
        with self._told(), self.place.lock():

            def look(db: sqlite3.Connection) -> Version:
                found = self._find(db, name, version)
                if not move:
                    self._check_free(db, found.name, tag, found.version)
                return found

            found = self.index.ask(look)
            self.place.write(tag_path(found.name, tag), _json({"format": FORMAT, "version": found.version}))
        return dataclasses.replace(found, tags=tuple(sorted({*found.tags, tag})))

    def untag(self, name: str, tag: str) -> None:
        """Take a tag away; the version that it marked stays."""
        self._begin()
        with self._told(), self.place.lock():
            known = {tag for v in self.index.ask(lambda db: self._versions(db, name)) for tag in v.tags}
            if tag not in known:
                raise IntarsiaError(f"{name} has no tag {tag!r}; {nearest(tag, known)}")
            self.place.delete(tag_path(name, tag))

    def remove(self, name: str, version: int | str | None = None) -> Version:
        """Take a version and its tags away; its object stays until :meth:`gc`. -> what was removed.

        The number is not given again. A record that cannot be read is removed by its number.
        """
        name, version = _words(name, version)
        self._begin()
        with self._told(), self.place.lock():
            if version is None:
                there = [v.reference for v in self.index.ask(lambda db: self._versions(db, name))]
                raise IntarsiaError(f"say which version of {name}: {', '.join(there)}")
            broken = isinstance(version, int) and record_path(name, version) in self.index.ask(faults)
            if broken:
                assert isinstance(version, int)
                found = Version(name, version, "0" * 64, Base("", ""), {}, {}, (), 0, _now())
            else:
                found = self.index.ask(lambda db: self._find(db, name, version))
            for tag in found.tags:
                self.place.delete(tag_path(name, tag))
            gone = dataclasses.replace(found, removed=_now(), tags=())
            self.place.write(record_path(name, found.version), gone.record())
        return gone

    # -------------------------------------------------------------- keeping it whole
    def gc(self, *, delete: bool = False, older_than: float = YOUNG) -> Garbage:
        """Objects that no version needs, and what killed writers left: listed, or with ``delete`` taken away.

        What was written within the last ``older_than`` seconds is left alone, as somebody may be adding it. While a record
        cannot be read nothing is deleted, for nobody knows which object it needs.
        """
        self._begin()
        with self._told(), self.place.lock():
            used, broken = self.index.ask(lambda db: ({v.digest for v in versions(db)}, faults(db, "records/")))
            if broken:
                raise IntarsiaError(
                    "nothing is garbage while a record cannot be read; restore it from a copy, or remove that version:\n  "
                    + "\n  ".join(broken.values())
                )
            paths = [f"objects/{n}" for n in self.place.names("objects") if DIGEST.fullmatch(n) and n not in used]
            paths += self.place.unfinished()
            ages = {path: self.place.age(path) for path in paths}
            old = [
                path for path in paths if (-1.0 if (age := ages[path]) is None else age) >= older_than or not older_than
            ]
            found = Garbage(tuple(old), sum(map(self.place.bytes_of, old)), len(paths) - len(old), delete)
            for path in old if delete else ():
                self.place.discard(path)
        return found

    def verify(self, work: Work | None = None) -> Checked:
        """Read every record, tag and object whole, and tell all that is wrong. Changes nothing."""

        def look(db: sqlite3.Connection) -> tuple[Sequence[Version], dict[str, str], Sequence[tuple[str, str, int]]]:
            tags = db.execute("SELECT name, tag, version FROM tags").fetchall()
            return versions(db), faults(db), [tuple(row) for row in tags]

        live, broken, tags = self._ask(look)
        there = {(v.name, v.version) for v in live}
        found = Checked(len(live), faults=list(broken.values()))
        found.faults += [
            f"{tag_path(name, tag)} marks version {number}, which is not there"
            for name, tag, number in tags
            if (name, number) not in there and record_path(name, number) not in broken
        ]
        needed: dict[str, list[Version]] = {}
        for version in live:
            needed.setdefault(version.digest, []).append(version)
        with self._told():
            objects = sorted({*needed, *(n for n in self.place.names("objects") if DIGEST.fullmatch(n))})
            for done, digest in enumerate(objects, 1):
                if work:
                    work(done, len(objects), "checking adapters:")
                whole = self.place.whole(f"objects/{digest}")
                found.objects += whole
                found.unused += digest not in needed
                fault = self._fault(digest, needed.get(digest, []), whole)
                # Once more, as it may have been removed and collected meanwhile.
                if fault and (self.named(digest) if digest in needed else self.place.whole(f"objects/{digest}")):
                    found.faults.append(fault)
        return found

    def _fault(self, digest: str, needed_by: Sequence[Version], whole: bool) -> str:
        path, names = f"objects/{digest}", ", ".join(v.reference for v in needed_by)
        if not whole:
            return f"{path} is not there, and {names} needs it; add that adapter again" if needed_by else ""
        try:
            with self._local(digest) as folder:
                adapter = _checked(folder, digest, path)
        except FileNotFoundError:  # gc came in between
            return ""
        except IntarsiaError as error:
            return f"{error} ({f'{names}: add that adapter again' if names else 'needed by no version'})"
        wrong = [v.reference for v in needed_by if v.base != adapter.base]
        return f"{path} belongs to the base {adapter.base.digest}; {', '.join(wrong)} says another" if wrong else ""

    @contextlib.contextmanager
    def _local(self, digest: str) -> Iterator[Path]:
        if isinstance(self.place, Disk):
            yield self.place.root / "objects" / digest
            return
        with tempfile.TemporaryDirectory(prefix="intarsia-") as folder:
            self.place.fetch(f"objects/{digest}", Path(folder))
            yield Path(folder)

    def reindex(self) -> int:
        """Make the index anew from the records. -> how many versions there are."""
        self._begin()
        self.index.forget()
        return len(self._ask(versions))

    # -------------------------------------------------------------- the hub
    def push(
        self,
        name: str,
        repository: str,
        version: int | str | None = None,
        *,
        revision: str | None = None,
        private: bool = True,
    ) -> str:
        """Commit a version's files to a repository of the hub, made if there is none. -> the commit."""
        found = self.show(name, version)
        message = f"{found.reference}, {found.digest[:12]}"
        return hub.push(self.get(found.reference), repository, revision=revision, private=private, message=message)

    def pull(
        self, repository: str, name: str | None = None, *, revision: str | None = None, tags: Sequence[str] = ()
    ) -> Added:
        """Add the adapter of a repository of the hub, checked whole, under its last name unless told otherwise."""
        if name is not None:
            _check_name(name)
        self._begin(create=True)
        with hub.pulled(repository, revision) as (folder, commit):
            try:
                return self.add(folder, name, tags=tags, origin=f"{repository}@{commit}")
            except IntarsiaError as error:
                raise IntarsiaError(f"{repository} at {commit[:12]}: {error}") from error

    # -------------------------------------------------------------- within
    def _begin(self, create: bool = False) -> None:
        """See that this is a registry that can be read, or a place where one can be made."""
        with self._told():
            try:
                parse(self.place.read(MARK), f"{self.url}/{MARK}")
                return
            except FileNotFoundError:
                found = [name for name in self.place.names("") if not name.startswith(".") and name not in OURS]
        if found:
            raise IntarsiaError(
                f"{self.url} is no registry: it has no {MARK} and holds other things ({', '.join(found[:5])}); "
                "name an empty folder"
            )
        if not create:
            raise IntarsiaError(f"there is no registry at {self.url}; intarsia registry add FOLDER makes one")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise IntarsiaError(f"registry {self.url}: {error.strerror or error}{where}") from error

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        self._begin()
        with self._told():
            return self.index.ask(question)

    def _versions(self, db: sqlite3.Connection, name: str) -> Sequence[Version]:
        found = versions(db, "name = ?", name)
        if not found:
            names = {v.name for v in versions(db)}
            gone = versions(db, "name = ?", name, removed=True)
            what = "every version of it was removed" if gone else nearest(name, names)
            raise IntarsiaError(f"no adapter is named {name!r} in {self.url}; {what}")
        return found

    def _find(self, db: sqlite3.Connection, name: str, version: int | str | None = None) -> Version:
        name, version = _words(name, version)
        found = self._versions(db, name)
        if version is None or version == NEWEST:
            return found[-1]
        for one in found:
            if one.version == version or version in one.tags:
                return one
        numbers = [v.version for v in found]
        if isinstance(version, int):
            gone = versions(db, "name = ? AND version = ?", name, version, removed=True)
            what = f"was removed on {str(gone[0].removed)[:10]}" if gone else "does not exist"
            raise IntarsiaError(f"{name}@{version} {what}; there are {', '.join(map(str, numbers))}")
        tags = {tag for v in found for tag in v.tags}
        raise IntarsiaError(
            f"{name} has no tag {version!r}; {nearest(version, tags)}; versions: {', '.join(map(str, numbers))}"
        )

    def _parent(self, db: sqlite3.Connection, parent: str) -> str:
        return parent if DIGEST.fullmatch(parent) else self._find(db, parent).digest

    def _check_free(self, db: sqlite3.Connection, name: str, tag: str, version: int | None) -> None:
        for other in versions(db, "name = ?", name):
            if tag in other.tags and other.version != version:
                raise IntarsiaError(
                    f"{other.reference} has the tag {tag!r} already; let it go over: "
                    f"intarsia registry tag {name}@VERSION {tag} --move"
                )


def _words(name: str, version: int | str | None) -> tuple[str, int | str | None]:
    """A version in one word or two, as a name and a number or a tag."""
    name, written = split(name)
    if written is not None and version is not None:
        raise IntarsiaError(f"{name}@{written}: the version is given twice, and again as {version!r}")
    if isinstance(version, str):
        version = split(f"{name}@{version}")[1]
    return name, written if version is None else version


def _checked(folder: Path, digest: str, what: str) -> Adapter:
    """The adapter in a folder, which must have this digest."""
    try:
        adapter = read(folder)
    except IntarsiaError as error:
        raise IntarsiaError(f"{what}: {error}") from error
    if adapter.digest != digest:
        raise IntarsiaError(f"{what}: its digest is {adapter.digest}; expected {digest}")
    return adapter


def _copy(source: Path, target: Path) -> None:
    for name in hub.FILES:  # what else lies there, such as a training log, is no part of the adapter
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _json(value: dict[str, int]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name) or len(name) > 100:
        raise IntarsiaError(
            f"{name!r} cannot name an adapter: letters, digits, '.', '_' and '-', beginning with a letter or digit, "
            "at most 100; give another one: --name"
        )
    return name


def _check_tag(tag: str) -> None:
    if not NAME.fullmatch(tag) or len(tag) > 100 or tag.isdigit() or tag == NEWEST:
        raise IntarsiaError(
            f"{tag!r} cannot be a tag: letters, digits, '.', '_' and '-', not digits alone (a version), "
            f"and not {NEWEST!r} (always the newest version)"
        )
