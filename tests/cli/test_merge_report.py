"""``intarsia merge``: the report before, what is measured after, and their mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import intarsia as ia
from intarsia import pretrained, store
from intarsia.analyze import interference
from intarsia.cli import reporting
from intarsia.evaluate import Task
from intarsia.merge import measure
from intarsia.train.data import load_examples


@pytest.fixture
def config(world: Any, tmp_path: Path) -> Any:
    """A config of some of the world's adapters, written to a file."""

    def write(*names: str, **more: Any) -> Path:
        weights = {"spells": 0.5, "counts": -2.0, "lengths": 1.0}
        adapters = [{"adapter": str(world.adapters[n]), "parameters": {"weight": weights[n]}} for n in names]
        file = tmp_path / "merge.json"
        file.write_text(
            json.dumps({"merge_method": "sum", "adapters": adapters, "output": str(tmp_path / "both")} | more)
        )
        return file

    return write


def test_the_report_comes_before_the_merge_and_alone_in_a_dry_run(intarsia, world, config, tmp_path):
    file = config("spells", "counts")
    plot = tmp_path / "report.png"
    dry = intarsia("merge", file, "--dry-run", "--json", "--plot", plot).json
    assert not (tmp_path / "both").exists()
    assert plot.read_bytes()[:4] == b"\x89PNG"
    given = {name: store.read(world.adapters[name]) for name in ("spells", "counts")}
    expected = interference(given, shares={"spells": 0.5, "counts": -2.0}).to_dict()
    assert dry["interference"] == json.loads(json.dumps(expected)), "the weights of the merge count"
    made = intarsia("merge", file, "--json").json
    assert made["interference"] == dry["interference"]
    assert (tmp_path / "both" / "adapter.json").exists()
    said = intarsia("merge", file, "--dry-run", "--overwrite")
    assert "spells -> counts" in said.out
    assert "opposite: of the shared entries" in said.out


def test_reports_say_more_for_more_work(intarsia, config):
    file = config("spells", "counts")
    found = {
        kind: intarsia("merge", file, "--dry-run", "--json", "--report", kind).json
        for kind in ("none", "overlap", "products", "spectral")
    }
    assert "interference" not in found["none"]
    pairs = {kind: plain["interference"]["pairs"][0] for kind, plain in found.items() if kind != "none"}
    known = {
        kind: {key for key in ("overlap", "awom", "alignment") if pair[key] is not None} for kind, pair in pairs.items()
    }
    assert known == {
        "overlap": {"overlap"},
        "products": {"overlap", "awom"},
        "spectral": {"overlap", "awom", "alignment"},
    }


def test_what_depends_on_the_weights_is_reported_where_the_base_is_named(intarsia, world, config):
    said = intarsia("merge", config("spells", "lengths"), "--dry-run")
    assert said.code == 0
    assert "no report: what lengths changes depends on the base's weights; name it in the config" in said.err
    assert "spells -> lengths" not in said.out
    named = intarsia("merge", config("spells", "lengths", model=str(world.base)), "--dry-run", "--json").json
    given = {name: store.read(world.adapters[name]) for name in ("spells", "lengths")}
    base = pretrained.load(world.base).model
    weights = {weight: base.get_parameter(weight).detach() for weight in given["lengths"].edits}
    expected = interference(given, shares={"spells": 0.5}, weights=weights).totals[0]
    assert named["interference"]["pairs"][0]["cosine"] == pytest.approx(expected.cosine)


def test_one_adapter_alone_has_no_report(intarsia, config):
    assert "interference" not in intarsia("merge", config("spells"), "--dry-run", "--json").json


def test_after_a_merge_each_skill_is_measured(intarsia, world, config, tmp_path):
    plot = tmp_path / "plots" / "report.svg"
    words = ["--data", f"spells={world.rows}", "--other", world.other_rows, "--rows", 3, "--plot", plot]
    found = intarsia("merge", config("spells", "counts"), *words, "--json").json["measured"]
    loaded = pretrained.load(world.base)
    tasks = [
        Task(name, load_examples(file, loaded.tokenizer)[0][:3])
        for name, file in (("spells", world.rows), ("other", world.other_rows))
    ]
    given = {name: store.read(world.adapters[name]) for name in ("spells", "counts")}
    expected = measure(
        loaded.model, loaded.tokenizer, given, ia.read(tmp_path / "both"), {"spells": tasks[0]}, tasks[1:]
    ).to_dict()
    assert found["skills"] == {"spells": "spells"}
    assert found["others"] == ["other"]
    for row in ("base", "spells", "fused"):
        assert found["loss"][row] == pytest.approx(expected["loss"][row])
    assert found["forgetting"]["fused"]["other"] == pytest.approx(expected["forgetting"]["fused"]["other"])
    assert plot.exists()
    assert plot.with_stem("report-retained").exists()
    said = intarsia("merge", config("spells", "counts"), *words, "--overwrite").out
    assert "loss on" in said
    assert "spells -> counts" in said


def test_what_is_measured_is_what_was_written(intarsia, world, config, tmp_path, monkeypatch):
    measured = []
    after = reporting.after

    def heard(*given):
        measured.append(given[2])
        return after(*given)

    monkeypatch.setattr(reporting, "after", heard)
    intarsia("merge", config("spells", "counts", values="bfloat16"), "--data", f"spells={world.rows}", "--rows", 1)
    written = store.read(tmp_path / "both")
    assert written.about["rounded"] == "bfloat16"
    assert [adapter.digest for adapter in measured] == [written.digest]


def test_mistakes_are_one_message_and_nothing_is_written(intarsia, world, config, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    file, rows = config("spells", "counts"), world.rows
    for words, said in {
        ("--data", f"spelz={rows}"): "data is given for 'spelz', and no adapter has that name; did you mean 'spells'?",
        ("--data", str(rows)): "expected NAME=FILE, rows of the skill that the adapter NAME was trained for",
        ("--data", "spells="): "expected NAME=FILE",
        ("--data", f"spells={rows}", "--data", f"spells={rows}"): "--data: spells is given twice",
        ("--data", "spells=nowhere.jsonl"): "no data file nowhere.jsonl",
        ("--data", f"spells={rows}", "--other", rows, "--other", rows): "--other: a data file is given twice",
        ("--data", f"spells={bad}"): "bad.jsonl",
        ("--other", str(rows)): "give their rows too: --data NAME=FILE",
        ("--report", "overlaps"): "--report overlaps: did you mean 'overlap'?",
        ("--plot", "report.txt"): "should end in .png, .svg or .pdf",
        ("--report", "none", "--plot", "report.png"): "there is nothing to draw",
    }.items():
        ended = intarsia("merge", file, *words)
        assert ended.code == 2, words
        assert said in ended.err
        assert "Traceback" not in ended.err
        assert not (tmp_path / "both").exists(), words
