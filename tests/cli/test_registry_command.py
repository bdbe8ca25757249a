"""``intarsia registry``: what is kept is found again by name, and a version stands where a folder would."""

from __future__ import annotations

import json

import pytest

from intarsia import folders, store
from intarsia.store import HEAD


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A registry of one's own, where the user's data lie."""
    monkeypatch.delenv("INTARSIA_REGISTRY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "intarsia" / "registry"


def test_from_adding_to_chatting(intarsia, world, home):
    adapter = store.read(world.adapters["spells"])
    assert intarsia("registry", "add", world.adapters["spells"], "--tag", "best").out == "added spells@1  best\n"
    assert (home / "objects" / adapter.digest / HEAD).exists()
    again = intarsia("registry", "add", world.adapters["spells"])
    assert again.out == "nothing new: spells@1 holds this very adapter already  best\n"
    added = intarsia(
        "registry", "add", world.adapters["counts"], "--name", "spells", "--parent", "spells@best", "--json"
    ).json
    assert (added["version"], added["new"], added["parents"]) == (2, True, [adapter.digest])
    listed = intarsia("registry", "list", "--json").json
    assert [(v["name"], v["version"], v["tags"]) for v in listed] == [("spells", 1, ["best"]), ("spells", 2, [])]
    table = intarsia("registry", "list").out
    assert all(word in table for word in ("spells@1", "best", "shira", "lora", adapter.digest[:12]))
    shown = intarsia("registry", "show", "spells@best", "--json").json
    assert (shown["digest"], shown["children"], shown["note"]) == (adapter.digest, ["spells@2"], dict(adapter.note))
    said = intarsia("registry", "show", "spells").out
    assert all(word in said for word in ("spells@2", "lora  rank=2", f"made from    spells@1 {adapter.digest[:12]}"))
    folder = intarsia("registry", "get", "spells@1").out.strip()
    assert store.read(folder).digest == adapter.digest
    lines = "/use spells\n/list\n"
    heard = intarsia("chat", world.base, "spells@best", "counted=spells@2", "--json", stdin=lines)
    events = [json.loads(line) for line in heard.out.splitlines()]
    assert events[0]["active"] == {"spells": 1.0}
    assert set(events[1]["adapters"]) == {"spells", "counted"}
    assert intarsia("show", "spells@1", "--json").json["digest"] == adapter.digest


def test_tags_removing_and_collecting(intarsia, world, home):
    for name in ("spells", "counts"):
        intarsia("registry", "add", world.adapters[name], "--name", "skill")
    assert intarsia("registry", "tag", "skill@1", "best").out == "best marks skill@1\n"
    taken = intarsia("registry", "tag", "skill", "best")
    assert (taken.code, taken.out) == (2, "")
    assert (
        "skill@1 has the tag 'best' already; let it go over: intarsia registry tag skill@VERSION best --move"
        in taken.err
    )
    assert intarsia("registry", "tag", "skill", "best", "--move", "--json").json["version"] == 2
    assert intarsia("registry", "tag", "skill", "best", "--delete").out == "skill has no tag best any more\n"
    assert intarsia("registry", "tag", "skill@1", "best", "--delete").code == 2
    assert intarsia("registry", "remove", "skill@1").out == "removed skill@1\n"
    path = f"objects/{store.read(world.adapters['spells']).digest}"
    assert intarsia("registry", "gc").out == "0 to delete, 0 B; 1 too young to judge\n"
    listed = intarsia("registry", "gc", "--older-than", 0)
    assert listed.out.startswith(f"{path}\n1 to delete, ")
    assert (home / path).exists()
    assert intarsia("registry", "gc", "--older-than", 0, "--delete", "--json").json["found"] == [path]
    assert not (home / path).exists()


def test_verify_ends_with_1_where_something_is_wrong(intarsia, world, tmp_path):
    where = ("--registry", tmp_path / "elsewhere")
    intarsia("registry", "add", world.adapters["spells"], *where)
    ended = intarsia("registry", "verify", *where)
    assert (ended.code, ended.out) == (0, "whole: 1 versions of 1 adapters\n")
    for file in (tmp_path / "elsewhere" / "objects").glob(f"*/{HEAD}"):
        file.write_text("{")
    ended = intarsia("registry", "verify", *where)
    assert ended.code == 1
    assert "adapter.json cannot be read" in ended.out
    assert "spells@1: add that adapter again" in ended.out
    assert "1 wrong: 1 versions of 1 adapters" in ended.out
    ended = intarsia("registry", "verify", "--json", *where)
    assert ended.code == 1
    assert len(json.loads(ended.out)["faults"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["registry", "show", "spels"], "no adapter is named 'spels' in "),
        (["registry", "show", "spels"], "did you mean 'spells'?"),
        (["registry", "get", "spells@7"], "spells@7 does not exist; there are 1"),
        (["registry", "add", "nowhere"], "nowhere does not exist; an adapter is a folder"),
        (["registry", "list", "--registry", "nowhere"], "there is no registry at"),
        (["registry", "list", "--registry", "nonsense://a"], "Protocol not known: nonsense"),
        (["chat", "m", "spells@7"], "spells@7: there is no such folder, and in the registry: spells@7 does not exist"),
        (["show", "spels@1"], "no adapter is named 'spels'"),
        (["registry", "pull", "organisation/none"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(intarsia, world, words, said):
    intarsia("registry", "add", world.adapters["spells"])
    ended = intarsia(*words)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("error: ") == 1


@pytest.mark.parametrize(
    ("own", "shared", "expected"), [("s3://b/c", "/d", "s3://b/c"), (None, "/d", "/d/intarsia/registry"), (None, None, "~/.local/share/intarsia/registry")]
)  # fmt: skip
def test_where_the_registry_is(monkeypatch, own, shared, expected):
    from pathlib import Path

    from intarsia.store.registry import default_url

    for name, value in (("INTARSIA_REGISTRY", own), ("XDG_DATA_HOME", shared)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert default_url() == expected.replace("~", str(Path.home()))
    assert folders.data_folder().name == "intarsia"
