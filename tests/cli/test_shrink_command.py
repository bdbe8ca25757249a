"""``intarsia shrink``: a folder that every command takes, ranks given or searched, and mistakes before anything is written."""

from __future__ import annotations

import pytest

from intarsia import pretrained
from intarsia.bases.thin import ranks


def test_what_is_written_is_a_model_like_any_other(intarsia, world, tmp_path):
    out = tmp_path / "thin"
    said = intarsia("shrink", world.base, out, "--data", world.rows, "--rank", 0.4, "--target", "*_proj", "--json").json
    again = pretrained.load(out)
    assert ranks(again.model) == {one["name"]: one["rank"] for one in said["layers"] if one["rank"]}
    assert ranks(again.model)
    assert said["numbers"]["after"] < said["numbers"]["before"]
    assert said["perplexity"].keys() == {"before", "after"}
    assert again.model.dtype == pretrained.load(world.base).model.dtype
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {out}\ndata: {world.rows}\nmethod: {{name: lora, rank: 1}}\noutput: {tmp_path / 'on it'}\ntrain: {{steps: 2}}\n"
    )
    assert intarsia("train", config, "--json").code == 0
    assert intarsia("shrink", world.base, out, "--data", world.rows, "--rank", 0.4, "--overwrite").code == 0


def test_ranks_are_searched_by_type(intarsia, world, tmp_path):
    out = tmp_path / "thin"
    ended = intarsia("shrink", world.base, out, "--data", world.rows, "--search", 0.5, "--json")
    said = ended.json
    kinds = {trial["kind"] for trial in said["trials"]}
    assert kinds == {one["name"].rpartition(".")[2] for one in said["layers"]}
    best = {kind: [t["share"] for t in said["trials"] if t["kind"] == kind and t["worse"] <= 0.5] for kind in kinds}
    thin = {one["name"].rpartition(".")[2] for one in said["layers"] if one["rank"]}
    assert thin
    assert thin <= {kind for kind, shares in best.items() if shares}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give either --rank, such as 0.7, or --search"),
        (["--rank", "0.5", "--search", "0.1"], "give either --rank, such as 0.7, or --search"),
        (["--rank", "0.5", "--target", "q_prj"], "target 'q_prj' matches none"),
        (["--rank", "0.5", "--by", "rows"], "by='rows': expected outputs or weight"),
        (["--rank", "0.99"], "no layer would take fewer numbers at these ranks"),
    ],
)
def test_mistakes(intarsia, world, tmp_path, words, said):
    ended = intarsia("shrink", world.base, tmp_path / "thin", "--data", world.rows, *words)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "thin").exists()
