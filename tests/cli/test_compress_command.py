"""``intarsia compress`` and ``intarsia show --sizes``: sizes and losses, and mistakes before anything is written."""

from __future__ import annotations

import pytest

import intarsia as ia
from intarsia import compress, store


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--to", "ternary", "--density", "0.3", "--alpha", "2"], lambda a: compress.ternary(a, 0.3, 2.0)),
        (["--to", "ternary", "--density", "0.3"], lambda a: compress.ternary(a, 0.3, 1.0)),
        (["--to", "stc", "--density", "0.3", "--masks"], lambda a: compress.stc(a, 0.3)),
        (["--to", "prune", "--budget", "20%"], lambda a: compress.prune(a, 0.2)),
        (["--to", "stc", "--density", "0.3", "--balanced"], lambda a: compress.stc(compress.balanced(a), 0.3)),
        (["--to", "bits", "--bits", "2"], lambda a: compress.in_bits(a, 2)),
        (["--to", "low-rank", "--rank", "3"], lambda a: compress.to_low_rank(a, 3)),
        (["--to", "sparse", "--density", "0.02"], lambda a: compress.to_sparse(a, 0.02)),
    ],
    ids=lambda words: words[1] if isinstance(words, list) else "",
)
def test_every_rule_writes_what_its_function_makes(intarsia, world, tmp_path, words, expected):
    which = "counts" if "--balanced" in words else "spells"
    before = store.read(world.adapters[which])
    out = tmp_path / "small"
    said = intarsia("compress", world.adapters[which], out, *words, "--json").json
    made = store.read(out)
    assert made.digest == expected(before).digest == said["digest"]
    assert made.name == "small"
    assert said["bytes"] == folder_bytes(out)
    assert said["error"] == pytest.approx(compress.change_error(before, made))
    assert said["steps"][0]["from"] == before.digest
    assert said["ratio_32"] == said["before"]["float32"] / said["bytes"]
    assert (said["loss"], said["trials"]) == ({}, [])


def test_losses_before_and_after_are_those_of_eval(intarsia, world, tmp_path):
    out = tmp_path / "small"
    said = intarsia(
        "compress", world.adapters["counts"], out, "--to", "bits", "--bits", 1, "--data", f"a={world.rows}", "--data", world.other_rows,
        "--json",
    ).json  # fmt: skip
    evaluated = intarsia(
        "eval", f"before={world.adapters['counts']}", f"after={out}", "--data", world.rows, "--json"
    ).json
    assert said["loss"].keys() == {"base", "before", "after"}
    assert said["loss"]["base"].keys() == {"a", "other"}
    for what in said["loss"]:
        assert said["loss"][what]["a"] == pytest.approx(evaluated["loss"][what]["rows"], abs=1e-5)
    assert said["loss"]["before"]["a"] != said["loss"]["after"]["a"]
    assert store.read(out).note["held-out loss, a"] == said["loss"]["after"]["a"]


def test_a_search_chooses_on_every_other_row_and_judges_on_the_rest(intarsia, world, tmp_path):
    out = tmp_path / "small"
    words = [
        "--to",
        "ternary",
        "--search",
        "--density",
        0.2,
        "--density",
        0.6,
        "--alpha",
        1,
        "--alpha",
        4,
        "--data",
        f"a={world.rows}",
    ]
    said = intarsia("compress", world.adapters["spells"], out, *words, "--json").json
    assert [(t["density"], t["alpha"]) for t in said["trials"]] == [(0.2, 1.0), (0.2, 4.0), (0.6, 1.0), (0.6, 4.0)]
    best = min(said["trials"], key=lambda t: t["loss"])
    assert (said["steps"][0]["density"], said["steps"][0]["alpha"]) == (best["density"], best["alpha"])
    assert said["loss"]["after"]["a"] != best["loss"], "other rows"
    shown = intarsia("compress", world.adapters["spells"], tmp_path / "b", *words)
    assert "the best of 4 densities and alphas" in shown.out


def test_what_is_printed(intarsia, world, tmp_path):
    ended = intarsia(
        "compress",
        world.adapters["spells"],
        tmp_path / "a",
        "--to",
        "stc",
        "--density",
        0.2,
        "--data",
        f"a={world.rows}",
    )
    assert ended.code == 0
    assert "smaller than in 32 bits" in ended.out
    assert "of the change lost" in ended.out
    assert ended.out.splitlines()[-2].split()[:4] == ["held-out", "loss", "base", "before"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "ternray", "--density", "0.1"], "no rule 'ternray' to compress by; did you mean 'ternary'?"),
        (["--to", "ternary"], "ternary needs a density (--density), or a budget of bytes (--budget)"),
        (["--to", "bits", "--bits", "3"], "bits=3; expected one of 1, 2, 4, 8"),
        (["--to", "stc", "--density", "2"], "density=2.0; expected a share above 0, up to 1"),
        (["--to", "stc", "--density", "0.1", "--density", "0.2"], "--search with --data NAME=FILE chooses among them"),
        (["--to", "stc", "--density", "0.1", "--budget", "9kB"], "a density and a budget are given"),
        (["--to", "prune", "--budget", "many"], "--budget many: expected bytes (20000, 300kB, 1.5MB) or a share"),
        (["--to", "prune", "--budget", "0"], "--budget 0: expected bytes"),
        (["--to", "prune", "--budget", "500"], "a budget of 500 bytes is too small"),
        (["--to", "stc", "--search", "--density", "0.1"], "--search chooses the density and alpha of --to ternary on rows of --data"),
        (["--to", "stc", "--density", "0.1", "--data", "a=gone.jsonl"], "no data file gone.jsonl; expected --data NAME=FILE"),
        (["--to", "low-rank", "--rank", "0"], "rank=0; expected a whole number above 0"),
    ],
)  # fmt: skip
def test_a_mistake_writes_nothing(intarsia, world, tmp_path, words, said):
    ended = intarsia("compress", world.adapters["spells"], tmp_path / "small", *words)
    assert ended.code == 2
    assert said in ended.err
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_kept(intarsia, world, tmp_path):
    words = ["--to", "bits", "--bits", 2]
    same = intarsia("compress", world.adapters["spells"], world.adapters["spells"], *words, "--overwrite")
    assert "is what is compressed; choose another place" in same.err
    out = ia.store.write(store.read(world.adapters["counts"]), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "exists already" in intarsia("compress", world.adapters["spells"], out, *words).err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert intarsia("compress", world.adapters["spells"], out, *words, "--overwrite").code == 0
    assert store.read(out).codes


def test_an_adapter_of_lengths_keeps_them_and_says_that_the_error_needs_the_base(intarsia, world, tmp_path):
    said = intarsia(
        "compress", world.adapters["lengths"], tmp_path / "a", "--to", "stc", "--density", 0.9, "--json"
    ).json
    assert said["error"] is None
    ended = intarsia("compress", world.adapters["lengths"], tmp_path / "b", "--to", "low-rank", "--rank", 2)
    assert "depends on the weight" in ended.err


def test_show_lists_the_sizes(intarsia, world):
    found = intarsia("show", world.adapters["spells"], "--sizes", "--json").json["sizes"]
    for size, expected in zip(found, compress.sizes(store.read(world.adapters["spells"])), strict=True):
        assert (size["name"], size["numbers"], size["error"]) == (expected.name, expected.numbers, expected.error)
        assert size["bytes"] == folder_bytes(world.adapters["spells"]) or size["name"] != "float32"
    shown = intarsia("show", world.adapters["spells"], "--sizes")
    assert "stored as" in shown.out
    assert "ternary 10%" in shown.out
    assert "sizes" not in intarsia("show", world.adapters["spells"], "--json").json
