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


@pytest.fixture
def grid(world, tmp_path):
    """A comparison of two methods as a file."""
    file = tmp_path / "grid.yaml"
    file.write_text(
        f"model: {world.base}\ndata: {{train: {world.rows}, eval: {world.other_rows}}}\nother: {world.rows}\n"
        "methods: [shira density=0.05, lora rank=2]\nlr: [1e-3, 1e-2]\nseeds: 1\n"
        f"output: {tmp_path / 'out'}\ntrain: {{steps: 1, batch_size: 2}}\n"
    )
    return file


def test_a_small_comparison_of_methods(intarsia, grid, tmp_path):
    ended = intarsia("bench", "methods", grid, "--json", tmp_path / "r.json", "--plot", tmp_path / "p.png")
    assert ended.code == 0, ended.err
    assert all(text in ended.out for text in ("shira density=0.05", "lora rank=2", "forgotten", "at its best"))
    plain = json.loads((tmp_path / "r.json").read_text())
    assert {"machine", "versions", "rows", "best", "base"} <= set(plain)
    assert len(plain["rows"]) == 4
    assert (tmp_path / "p.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == plain
    again = intarsia("bench", "methods", grid, "seeds=2", "--method", "lora rank=2", "--lr", "1e-3")
    assert "1 methods, 2 runs of them, 1 done already" in again.err


def test_the_runs_are_listed(intarsia, grid):
    ended = intarsia("bench", "methods", grid, "--list", "--seeds", "2")
    assert ended.code == 0, ended.err
    assert ended.out.count("seed 1") == 4
    assert "8 runs" in ended.out


def test_a_comparison_without_a_file(intarsia, world, tmp_path):
    ended = intarsia(
        "bench", "methods", "--model", world.base, "--data", world.rows, "--eval", world.other_rows, "--method", "lora",
        "--count", "shira density=0.05", "--lr", "1x", "--seeds", "1", "--steps", "1", "--output", tmp_path / "o",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "lora" in ended.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "fast"], "lr: 'fast' is no learning rate"),
        (["sedes=3"], "unknown key 'sedes'; did you mean 'seeds'"),
        (["--method", "lorra"], "unknown method 'lorra'; did you mean 'lora'"),
        (["--plot", "p.gif"], "p.gif: expected a name that ends in"),
    ],
)
def test_a_mistake_in_a_comparison_is_told_at_once(intarsia, grid, words, said):
    ended = intarsia("bench", "methods", grid, *words)
    assert ended.code == 2
    assert said in ended.err


def test_a_stopped_comparison_says_how_to_go_on(intarsia, grid, monkeypatch):
    from intarsia.bench import methods

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "train", stopped)
    ended = intarsia("bench", "methods", grid)
    assert ended.code == 130
    assert "stopped after 0 of 4 runs; the same command goes on from there" in ended.err


def test_a_small_benchmark_of_switches(intarsia, tmp_path):
    file, picture = tmp_path / "switch.json", tmp_path / "switch.png"
    tiny = (
        "--shape",
        "64x96",
        "--density",
        "0.05",
        "--granularity",
        "line",
        "--model",
        "none",
        "--rounds",
        "2",
        "--threads",
        "1",
    )
    ended = intarsia("bench", "switch", *tiny, "--json", file, "--plot", picture)
    assert ended.code == 0, ended.err
    assert all(name in ended.out for name in ("lines", "lora-fuse", "limit takes"))
    assert {row["subject"] for row in json.loads(file.read_text())["rows"]} >= {"lines", "limit: lines", "dense-copy"}
    assert picture.stat().st_size > 10_000


def test_what_switches_are_compared_with_is_listed(intarsia):
    said = intarsia("bench", "switch", "--list").out
    assert all(name in said for name in ("lora-fuse", "peft", "limit"))


def test_a_shape_that_is_none_is_one_line(intarsia):
    ended = intarsia("bench", "switch", "--shape", "4096", "--model", "none")
    assert ended.code == 2
    assert "expected ROWSxCOLUMNS" in ended.err
