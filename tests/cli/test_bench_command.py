"""``intarsia bench``: the figures go to a file, the table to the terminal, and a mistake is one line."""

from __future__ import annotations

import json

import pytest

from intarsia.bench import train

TINY = ["bench", "train", "--size", "tiny", "--dtype", "float32", "--device", "cpu", "--length", "8", "--rounds", "2", "--steps", "1", "--threads", "1"]  # fmt: skip


def test_a_small_benchmark_of_training(intarsia, tmp_path):
    file, picture = tmp_path / "new" / "train.json", tmp_path / "train.png"
    ended = intarsia(
        *TINY, "--only", "floor,column", "--method", "shira density=0.05", "--json", file, "--plot", picture
    )
    assert ended.code == 0, ended.err
    assert all(name in ended.out for name in ("floor", "column@equal", "shira density=0.05", "kept"))
    plain = json.loads(file.read_text())
    assert {"machine", "versions", "rows", "settings"} <= set(plain)
    assert [row["subject"] for row in plain["rows"]] == ["floor", "column@equal", "shira density=0.05"]
    assert plain["rows"][1]["ratio"] > 0
    assert picture.stat().st_size > 10_000


def test_the_contenders_are_listed(intarsia):
    said = intarsia("bench", "train", "--list").out
    assert all(contender.name in said for contender in train.known())


def test_bench_alone_shows_its_commands(intarsia):
    ended = intarsia("bench")
    assert ended.code == 0
    assert "train" in ended.out


def test_ctrl_c_prints_and_writes_what_was_measured(intarsia, tmp_path, monkeypatch):
    real, count = train._Run._visit, []

    def visit(self, subject):
        count.append(1)
        if len(count) > 3:
            raise KeyboardInterrupt
        return real(self, subject)

    monkeypatch.setattr(train._Run, "_visit", visit)
    ended = intarsia(*TINY, "--only", "floor,lora", "--json", tmp_path / "t.json")
    assert ended.code == 130
    assert "interrupted; this is what had been measured" in ended.err
    assert "floor" in ended.out
    assert json.loads((tmp_path / "t.json").read_text())["interrupted"] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "colum"], "no contender 'colum'; did you mean 'column'"),
        (["--size", "46m"], "no size '46m'; did you mean '47m'"),
        (["--json", "figures.txt"], "figures.txt: expected a name that ends in .json"),
        (["--json", "."], ". is a folder; name a file in it"),
        (["--method", "lora rnk=2"], "lora has no field 'rnk'; did you mean 'rank'"),
    ],
)
def test_a_mistake_is_told_before_the_work(intarsia, words, said):
    ended = intarsia("bench", "train", *words)
    assert ended.code == 2
    assert said in ended.err
