"""The registry of adapters: each kept once and whole, versions that stay what they are, and an index that may be lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import hub as hubs
import intarsia as ia
from intarsia import store
from intarsia.store import HEAD, TENSORS, Registry
from intarsia.store import place as places
from intarsia.store import registry as registries
from small import adapted, small_net

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters: three of SHiRA, the last of LoRA, on another base."""
    home = tmp_path_factory.mktemp("saved")
    models = [adapted(ia.Shira(density=0.1), seed=seed) for seed in range(3)]
    other = small_net(seed=7)
    ia.attach(other, ia.Lora(2))
    return [
        ia.save(model, home / f"skill-{number}", note={"loss": number / 4})
        for number, model in enumerate([*models, other])
    ]


@pytest.fixture(params=["disk", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a registry may be: a folder of its own, or a file system of another kind."""
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))
    if request.param == "disk":
        yield str(tmp_path / "registry")
        return
    yield f"memory://{tmp_path.name}"
    system = fsspec.filesystem("memory")
    if system.exists(f"/{tmp_path.name}"):
        system.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def disk(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def _root(registry: Registry) -> Path:
    assert isinstance(registry.place, places.Disk)
    return registry.place.root


def _digest(folder: Path) -> str:
    return store.read(folder).digest


# ------------------------------------------------------------------ versions
def test_versions_count_up_and_give_their_very_adapter(url, saved):
    registry = Registry(url)
    numbers = [registry.add(folder, "skill").version.version for folder in saved[:3]]
    assert numbers == [1, 2, 3]
    for number, folder in enumerate(saved[:3], 1):
        got = registry.get("skill", number)
        for name in (TENSORS, HEAD, "README.md"):
            assert (got / name).read_bytes() == (folder / name).read_bytes()
    assert registry.get("skill") == registry.get("skill@3") == registry.get("skill", "latest")
    model = small_net()
    deck = ia.Deck(model)
    deck.add(skill=registry.get("skill@2"))
    assert deck["skill"].digest == _digest(saved[1])
    assert registry.verify() == registries.Checked(versions=3, objects=3)


def test_a_record_says_what_the_adapter_is(url, saved):
    registry, adapter = Registry(url), store.read(saved[1])
    parent = registry.add(saved[0]).version
    registry.add(saved[1], "skill", tags=["best"], parents=["skill-0@1", "f" * 64])
    found = Registry(url).show("skill")
    assert (found.reference, found.digest, found.base) == ("skill@1", adapter.digest, adapter.base)
    assert (found.method, found.note) == (dict(adapter.method), {"loss": 0.25})
    assert (found.parents, found.tags) == ((parent.digest, "f" * 64), ("best",))
    assert found.file_bytes == sum(file.stat().st_size for file in saved[1].iterdir())
    assert parent.reference == "skill-0@1", "a folder gives its name"


def test_the_same_content_is_kept_once_and_said_so(url, saved, tmp_path):
    registry = Registry(url)
    first = registry.add(saved[0], "skill")
    registry.add(saved[1], "skill")
    again = registry.add(saved[0], "skill", tags=["old"])
    assert (first.new, again.new, again.version.reference, again.version.tags) == (True, False, "skill@1", ("old",))
    other = registry.add(saved[0], "another")
    assert (other.new, other.version.reference) == (True, "another@1")
    assert registry.verify().objects == 2
    assert registry.named(_digest(saved[0])) == ("another@1", "skill@1")
    adapter = store.read(saved[0])
    noted = store.write(
        store.Adapter("a", adapter.edits, adapter.base, adapter.method, note={"loss": 9}), tmp_path / "a"
    )
    assert registry.add(noted, "skill").other_note
    assert not again.other_note
    assert registry.show("skill@1").note == {"loss": 0.0}


def test_numbers_are_not_given_again(url, saved):
    registry = Registry(url)
    for folder in saved[:2]:
        registry.add(folder, "skill")
    registry.tag("skill", "best")
    assert registry.remove("skill", "best").version == 2
    with pytest.raises(ia.IntarsiaError, match=r"skill@2 was removed on \d{4}-\d\d-\d\d; there are 1"):
        registry.show("skill", 2)
    with pytest.raises(ia.IntarsiaError, match="no tag 'best'"):
        registry.show("skill@best")
    assert registry.add(saved[1], "skill").version.version == 3
    assert registry.verify().faults == []


def test_tags_mark_one_version_and_move_only_when_told(url, saved):
    registry = Registry(url)
    for folder in saved[:2]:
        registry.add(folder, "skill")
    assert registry.tag("skill@1", "best").tags == ("best",)
    registry.tag("skill", "best", 1)
    with pytest.raises(ia.IntarsiaError, match="skill@1 has the tag 'best' already.*--move"):
        registry.tag("skill", "best")
    with pytest.raises(ia.IntarsiaError, match="skill@1 has the tag 'best' already"):
        registry.add(saved[2], "skill", tags=["best"])
    assert [v.reference for v in registry.list(tag="best")] == ["skill@1"]
    registry.tag("skill", "best", move=True)
    assert registry.show("skill@best").version == 2
    assert registry.show("skill@1").tags == ()
    with pytest.raises(ia.IntarsiaError, match="skill has no tag 'bst'; did you mean 'best'"):
        registry.untag("skill", "bst")
    registry.untag("skill", "best")
    assert registry.list(tag="best") == ()


def test_listing_by_name_base_method_and_tag(url, saved):
    registry = Registry(url)
    for folder in saved:
        registry.add(folder)
    registry.tag("skill-1", "good")

    def names(**wanted):
        return [v.name for v in registry.list(**wanted)]

    assert names() == ["skill-0", "skill-1", "skill-2", "skill-3"]
    assert names(method="lora") == ["skill-3"]
    assert names(base=store.read(saved[3]).base.digest[:9]) == ["skill-3"]
    assert names(base="%") == [], "no pattern"
    assert names(method="shira", tag="good") == ["skill-1"]
    assert names(name="skill-2") == ["skill-2"]


# ------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda r, s: r.show("skil"), "no adapter is named 'skil' in .*; did you mean 'skill'"),
        (lambda r, s: r.get("skill", 9), "skill@9 does not exist; there are 1, 2"),
        (lambda r, s: r.get("skill@bets"), "skill has no tag 'bets'; did you mean 'best'.*versions: 1, 2"),
        (lambda r, s: r.get("skill@1", 2), "given twice"),
        (lambda r, s: r.remove("skill"), "say which version of skill: skill@1, skill@2"),
        (lambda r, s: r.list("skill-9"), "no adapter is named 'skill-9'"),
        (lambda r, s: r.add(s[2], "a/b"), "'a/b' cannot name an adapter"),
        (lambda r, s: r.add(s[2], "../a"), "cannot name an adapter"),
        (lambda r, s: r.add(s[2], "a@b"), "cannot name an adapter"),
        (lambda r, s: r.add(s[2], "skill", tags=["7"]), "'7' cannot be a tag"),
        (lambda r, s: r.tag("skill", "latest"), "'latest' cannot be a tag"),
        (lambda r, s: r.add(s[2], "skill", parents=["skill@4"]), "skill@4 does not exist"),
        (lambda r, s: r.add(s[0], "skill", parents=["skill@2"]), "skill@1 holds this very adapter already, with other parents"),
        (lambda r, s: r.add(s[0].parent), "is not an adapter: it has no adapter.json"),
        (lambda r, s: r.add(s[0].parent / "nowhere"), "does not exist"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_and_changes_nothing(url, saved, act, message):
    registry = Registry(url)
    registry.add(saved[0], "skill", tags=["best"])
    registry.add(saved[1], "skill")
    before = registry.place.stamps("records"), registry.place.stamps("tags"), registry.place.stamps("objects")
    with pytest.raises(ia.IntarsiaError, match=message):
        act(registry, saved)
    assert before == tuple(registry.place.stamps(folder) for folder in ("records", "tags", "objects"))
    assert registry.place.unfinished() == []


def test_the_same_numbers_by_another_method_are_refused(disk, saved, tmp_path):
    disk.add(saved[0], "skill")
    adapter = store.read(saved[0])
    other = store.write(store.Adapter("a", adapter.edits, adapter.base, {"name": "mine"}), tmp_path / "other")
    with pytest.raises(ia.IntarsiaError, match="skill@1 holds these very numbers already, made by .*'mine'"):
        disk.add(other)


def test_where_there_is_no_registry(url, saved, tmp_path):
    for act in (Registry(url).list, Registry(url).verify, Registry(url).gc, Registry(url).reindex):
        with pytest.raises(
            ia.IntarsiaError, match="there is no registry at .*; intarsia registry add FOLDER makes one"
        ):
            act()
    with pytest.raises(
        ia.IntarsiaError,
        match=r"is no registry: it has no registry.json and holds other things .README.md, adapter.json",
    ):
        Registry(saved[0]).add(saved[1])
    assert len(list(saved[0].iterdir())) == 3
    with pytest.raises(ia.IntarsiaError, match="Not a directory"):
        Registry(saved[0] / HEAD).list()
    with pytest.raises(ia.IntarsiaError, match="Protocol not known: nonsense"):
        Registry("nonsense://a")


def test_a_registry_or_a_record_of_a_newer_format(disk, saved):
    disk.add(saved[0], "skill")
    record = _root(disk) / "records" / "skill" / "1.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 2}))
    assert disk.list() == ()
    assert re.search(r"records/skill/1.json is in format 2; this version reads up to 1. Upgrade", disk.unreadable()[0])
    (_root(disk) / "registry.json").write_text('{"format": 2}')
    with pytest.raises(ia.IntarsiaError, match=r"registry.json is in format 2; this version reads up to 1. Upgrade"):
        disk.list()


# ------------------------------------------------------------------ the index
def test_a_lost_or_broken_index_loses_nothing(url, saved):
    registry = Registry(url)
    for folder in saved:
        registry.add(folder, tags=["first"])
    before, file = registry.list(), registry.index.file
    assert file.exists()
    whole = file.read_bytes()
    for content in (None, b"", b"no database at all" * 500, whole[: len(whole) // 2], b"x" * 4096 + whole[4096:]):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        assert Registry(url).list() == before
    assert registry.reindex() == 4
    assert registry.list() == before


def test_the_index_follows_what_is_changed_elsewhere(disk, saved, tmp_path):
    disk.add(saved[0], "skill")
    copy = Registry(shutil.copytree(_root(disk), tmp_path / "copy"))
    copy.add(saved[1], "skill")
    copy.tag("skill@1", "old")
    shutil.copytree(tmp_path / "copy", _root(disk), dirs_exist_ok=True, ignore=shutil.ignore_patterns("index.sqlite"))
    assert [(v.reference, v.tags) for v in disk.list()] == [("skill@1", ("old",)), ("skill@2", ())]
    (_root(disk) / "records" / "skill" / "2.json").unlink()
    assert [v.reference for v in disk.list()] == ["skill@1"]


def test_the_index_can_be_asked_with_sql(disk, saved):
    for folder in saved:
        disk.add(folder)
    disk.list()
    db = sqlite3.connect(disk.index.file)
    rows = db.execute(
        "SELECT name FROM versions WHERE note ->> 'loss' < 0.3 AND method = 'shira' ORDER BY name"
    ).fetchall()
    db.close()
    assert rows == [("skill-0",), ("skill-1",)]


def test_a_registry_that_cannot_be_written_can_be_read(disk, saved, monkeypatch):
    disk.add(saved[0], "skill")
    disk.index.forget()
    real = sqlite3.connect

    def connect(path, **options):
        return real(path if path == ":memory:" else "/nowhere/at/all", **options)

    monkeypatch.setattr(sqlite3, "connect", connect)
    assert [v.reference for v in disk.list()] == ["skill@1"]
    assert disk.get("skill") == _root(disk) / "objects" / _digest(saved[0])


def test_a_damaged_record_is_named_and_keeps_its_object(disk, saved):
    for folder in saved[:2]:
        disk.add(folder, "skill")
    record = _root(disk) / "records" / "skill" / "1.json"
    record.write_text(record.read_text().replace('"loss": 0.0', '"loss": 0.1'))
    assert [v.reference for v in disk.list()] == ["skill@2"]
    (fault,) = disk.verify().faults
    assert fault.startswith("records/skill/1.json does not match its own checksum")
    with pytest.raises(ia.IntarsiaError, match=r"nothing is garbage while a record cannot be read.*\n.*skill/1.json"):
        disk.gc(delete=True, older_than=0)
    disk.remove("skill", 1)
    assert disk.gc(delete=True, older_than=0).found == (f"objects/{_digest(saved[0])}",)
    assert disk.verify() == registries.Checked(versions=1, objects=1)
    assert disk.add(saved[2], "skill").version.version == 3


# ------------------------------------------------------------------ verify and gc
def test_verify_tells_every_fault(url, saved):
    registry = Registry(url)
    for folder in saved[:3]:
        registry.add(folder)
    place, digests = registry.place, [_digest(folder) for folder in saved]
    content = bytearray(place.read(f"objects/{digests[0]}/{TENSORS}"))
    content[-3] ^= 1
    place.write(f"objects/{digests[0]}/{TENSORS}", bytes(content))
    place.discard(f"objects/{digests[1]}")
    for name in (TENSORS, HEAD):
        place.write(f"objects/{digests[2]}/{name}", place.read(f"objects/{digests[2]}/{name}"))
        place.write(f"objects/{'0' * 64}/{name}", (saved[3] / name).read_bytes())
    place.write("records/skill-9/1.json", place.read("records/skill-2/1.json"))
    place.write("tags/skill-2/best.json", b'{"format": 1, "version": 3}')
    place.write("tags/skill-2/cut.json", b'{"form')
    said = []
    faults = registry.verify(lambda done, all, what: said.append((done, all))).faults
    expected = [
        "records/skill-9/1.json is the record of skill-2@1; it was moved or copied there",
        "tags/skill-2/cut.json cannot be read",
        "tags/skill-2/best.json marks version 3, which is not there",
        f"objects/{'0' * 64}: its digest is {digests[3]}; expected 000",
        f"objects/{digests[0]}: .*: its bytes do not match its digest.*skill-0@1: add that adapter again",
        f"objects/{digests[1]} is not there, and skill-1@1 needs it; add that adapter again",
    ]
    assert len(faults) == len(expected), faults
    for pattern in expected:
        assert sum(re.search(pattern, fault, re.S) is not None for fault in faults) == 1, (pattern, faults)
    assert said[-1] == (4, 4)
    for broken in ("skill-0", "skill-1"):
        with pytest.raises(ia.IntarsiaError, match=f"{broken}@1 in "):
            registry.get(broken)


def test_verify_compares_the_base(disk, saved):
    disk.add(saved[0], "skill")
    found = disk.show("skill")
    lying = store.Version(**{**vars(found), "base": store.Base("f" * 64, "float32")})
    disk.place.write("records/skill/1.json", lying.record())
    (fault,) = disk.verify().faults
    assert f"belongs to the base {found.base.digest}; skill@1 says another" in fault


def test_adding_a_good_copy_mends_a_damaged_object(disk, saved):
    disk.add(saved[0], "skill")
    file = _root(disk) / "objects" / _digest(saved[0]) / TENSORS
    file.write_bytes(file.read_bytes()[:-1])
    assert len(disk.verify().faults) == 1
    assert not disk.add(saved[0], "skill").new
    assert disk.verify() == registries.Checked(versions=1, objects=1)


def test_gc_lists_first_and_takes_only_what_nobody_needs(url, saved):
    registry = Registry(url)
    for folder in saved[:2]:
        registry.add(folder, "skill")
    registry.add(saved[0], "another")
    registry.remove("skill", 1)
    assert registry.gc(older_than=0).found == (), "another version needs it"
    registry.remove("another", 1)
    path = f"objects/{_digest(saved[0])}"
    assert registry.gc(delete=True) == registries.Garbage((), 0, 1, True), "too young"
    listed = registry.gc(older_than=0)
    assert (listed.found, listed.deleted) == ((path,), False)
    assert listed.bytes == sum(file.stat().st_size for file in saved[0].iterdir())
    assert registry.place.whole(path)
    assert registry.gc(delete=True, older_than=0).found == (path,)
    assert not registry.place.whole(path)
    assert registry.verify() == registries.Checked(versions=1, objects=1)
    registry.add(saved[0], "skill")
    assert registry.get("skill").is_dir()


def test_gc_takes_what_killed_writers_left_and_spares_who_is_at_work(disk, saved):
    disk.add(saved[0], "skill")
    with disk.place.stage() as working:
        (working / HEAD).write_text("{}")
        dead = _root(disk) / "objects" / f"{places.PART}dead"
        dead.mkdir()
        (_root(disk) / "records" / "skill" / f"{places.PART}dead").write_text("{")
        long_ago = time.time() - 2 * registries.YOUNG
        for path in (dead, _root(disk) / "records" / "skill" / f"{places.PART}dead"):
            os.utime(path, (long_ago, long_ago))
        found = disk.gc(delete=True)
        assert found.found == (f"objects/{dead.name}", f"records/skill/{places.PART}dead")
        assert found.young == 1
        assert working.exists()
    assert disk.place.unfinished() == []
    assert disk.verify() == registries.Checked(versions=1, objects=1)


# ------------------------------------------------------------------ several writers, interruptions
def _add_all(url: str, folders: list[Path], start, said) -> None:
    registry = Registry(url)
    start.wait()
    said.put([registry.add(folder, "skill").version.version for folder in folders])


def test_two_processes_add_at_once_and_nothing_is_lost(disk, saved):
    spawn = multiprocessing.get_context("spawn")
    start, said = spawn.Barrier(2), spawn.Queue()
    orders = [saved[:3], [*reversed(saved[:3]), saved[3]]]
    workers = [spawn.Process(target=_add_all, args=(disk.url, order, start, said)) for order in orders]
    for worker in workers:
        worker.start()
    numbers = [said.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert disk.verify() == registries.Checked(versions=4, objects=4), "each content once, whoever came first"
    assert {number for each in numbers for number in each} == {1, 2, 3, 4}
    assert disk.place.unfinished() == []


def test_of_two_writers_without_a_lock_the_second_takes_the_next_number(saved, tmp_path, monkeypatch):
    registry = Registry(f"memory://{tmp_path.name}")
    registry.add(saved[0], "skill")
    real = registry.place.names

    def names(folder):
        found = real(folder)
        if folder == "records/skill" and registry.show("skill").version == 1:  # the other is quicker
            monkeypatch.setattr(registry.place, "names", real)
            registry.add(saved[1], "skill")
        return found

    monkeypatch.setattr(registry.place, "names", names)
    assert registry.add(saved[2], "skill").version.version == 3
    assert [v.digest for v in registry.list()] == [_digest(folder) for folder in saved[:3]]
    assert registry.verify().faults == []


@pytest.mark.parametrize("call", ["put", "create", "write"])
def test_an_interrupted_add_leaves_a_whole_registry(url, saved, monkeypatch, call):
    registry = Registry(url)
    registry.add(saved[0], "skill")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry.place, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            registry.add(saved[1], "skill", tags=["best"])
    assert registry.place.unfinished() == []
    assert registry.verify().faults == []
    added = registry.add(saved[1], "skill", tags=["best"])
    recorded = call == "write" and not registry.place.local  # there only the tag was still to write
    assert (added.new, added.version.version, added.version.tags) == (not recorded, 2, ("best",))
    assert registry.verify() == registries.Checked(versions=2, objects=2)


@pytest.mark.parametrize("name", [TENSORS, HEAD])
def test_half_an_object_is_never_taken_for_one(saved, tmp_path, monkeypatch, name):
    """On a file system where only single files are put in one step, the head comes last."""
    registry = Registry(f"memory://{tmp_path.name}")
    registry.add(saved[0], "skill")
    assert isinstance(registry.place, places.Remote)
    real = registry.place.system.mv

    def mv(source, target, **options):
        if target.endswith(name):
            raise KeyboardInterrupt
        real(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(registry.place.system, "mv", mv)
        with pytest.raises(KeyboardInterrupt):
            registry.add(saved[1], "skill")
    assert not registry.place.whole(f"objects/{_digest(saved[1])}")
    assert registry.verify().faults == []
    assert registry.add(saved[1], "skill").new
    assert registry.verify() == registries.Checked(versions=2, objects=2)


def test_a_write_that_fails_leaves_the_old_file(disk, saved, monkeypatch):
    disk.add(saved[0], "skill", tags=["best"])
    disk.add(saved[1], "skill")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ia.IntarsiaError, match="No space left on device"):
            disk.tag("skill", "best", move=True)
    assert disk.show("skill@best").version == 1
    assert disk.place.unfinished() == []


def test_killed_writers_leave_a_whole_registry():
    """A few kills of the script that does fifty."""
    ended = subprocess.run(
        [sys.executable, ROOT / "bench" / "kill_registry.py", "--kills", "5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 promises broken" in ended.stdout


def test_another_writer_that_never_ends_is_told_of(disk, saved, monkeypatch):
    disk.add(saved[0], "skill")
    monkeypatch.setattr(places, "PATIENCE", 0.05)
    with (
        Registry(disk.url).place.lock(),
        pytest.raises(ia.IntarsiaError, match="another process has been writing to it for"),
    ):
        disk.tag("skill", "best")


# ------------------------------------------------------------------ elsewhere
def test_what_lies_elsewhere_is_fetched_once_and_a_damaged_copy_again(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))
    registry = Registry(f"memory://{tmp_path.name}")
    registry.add(saved[0], "skill")
    folder = registry.get("skill")
    assert folder.is_relative_to(tmp_path / "cache")
    fetches = []
    real = registry.place.fetch

    def fetch(*given):
        fetches.append(given)
        real(*given)

    monkeypatch.setattr(registry.place, "fetch", fetch)
    assert registry.get("skill") == folder
    assert fetches == []
    (folder / TENSORS).write_bytes(b"")
    assert registry.get("skill") == folder
    assert len(fetches) == 1
    assert _digest(folder) == _digest(saved[0])


SCRIPT = """
import sys
from intarsia.errors import IntarsiaError
from intarsia.store import Registry
registry = Registry(sys.argv[1])
for line in sys.argv[2:]:
    try: print(eval(line))
    except IntarsiaError as error: print(str(error).replace(chr(10), " "))
"""


def test_push_and_pull(disk, saved, tmp_path):
    disk.add(saved[0], "skill")
    disk.add(saved[1], "skill")
    broken = shutil.copytree(saved[2], tmp_path / "broken")
    (broken / TENSORS).write_bytes((broken / TENSORS).read_bytes()[:-2])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with hubs.serve(tmp_path / "hub", broken=broken, model=tmp_path / "model") as (address, shared):
        lines = [
            "registry.push('skill@1', 'organisation/one')",
            "registry.push('skill', 'organisation/one', revision='next')",
            "(lambda added: (added.new, added.version.reference, added.version.origin))(registry.pull('organisation/one'))",
            "registry.pull('organisation/one', 'two', revision='next', tags=['best']).version.digest",
            "registry.pull('organisation/one').new",
            "registry.push('skill', 'somebody-else/one')",
            "registry.push('skill', 'a/b/c')",
            "registry.pull('organisation/none')",
            "registry.pull('organisation/gated')",
            "registry.pull('organisation/one', revision='nowhere')",
            "registry.pull('organisation/broken')",
            "registry.pull('organisation/model')",
        ]
        environment = os.environ | hubs.settings(address, tmp_path / "home")
        command = [sys.executable, "-c", SCRIPT, disk.url]
        ended = subprocess.run([*command, *lines], env=environment, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")
        said = ended.stdout.splitlines()
        main, branch = shared.repositories["organisation/one"]["main"], shared.repositories["organisation/one"]["next"]
    assert sorted(hubs.content_of(main)) == sorted(hubs.content_of(saved[0]))
    assert hubs.content_of(branch) == hubs.content_of(saved[1])
    assert (tmp_path / "hub" / "organisation" / "one" / "private").read_text() in ("True", "private")
    assert said[:2] == [hubs.commit_of(main), hubs.commit_of(branch)]
    assert said[2] == str((True, "one@1", f"organisation/one@{hubs.commit_of(main)}"))
    assert said[3:5] == [_digest(saved[1]), "False"]
    expected = [
        "somebody-else/one could not be pushed to the hub: .*403.*token that may write there",
        "'a/b/c' is no repository of the hub",
        "organisation/none: no such repository on the hub, or a private one",
        "organisation/gated: gated on the hub; accept its terms there",
        "organisation/one: no such revision on the hub",
        f"organisation/broken at {hubs.commit_of(broken)[:12]}: .*is not a whole adapter|adapter.safetensors cannot be read",
        "organisation/model holds no adapter of intarsia: it has no adapter.json .found config.json",
    ]
    assert len(said) == 5 + len(expected), said
    for pattern, line in zip(expected, said[5:], strict=True):
        assert re.search(pattern, line), line
    assert [v.reference for v in disk.list()] == ["one@1", "skill@1", "skill@2", "two@1"]
    assert disk.verify().faults == []
    offline = os.environ | hubs.settings(address, tmp_path / "home", offline=True)
    ended = subprocess.run([*command, lines[0], lines[2]], env=offline, capture_output=True, text=True, check=False)
    assert all("HF_HUB_OFFLINE is set" in line for line in ended.stdout.splitlines()), ended.stdout
