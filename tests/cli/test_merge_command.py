"""``intarsia merge``: one adapter of several, from the command line."""

from __future__ import annotations

import shutil

import pytest

import intarsia as ia
from intarsia import pretrained


@pytest.fixture
def config(world, tmp_path):
    """A merge of a SHiRA and a LoRA."""
    file = tmp_path / "merge.yaml"
    file.write_text(
        "merge_method: sum\n"
        f"adapters: [{{adapter: {world.adapters['spells']}, parameters: {{weight: 0.5}}}}, {world.adapters['counts']}]\n"
        f"output: {tmp_path / 'both'}\n"
    )
    return file


def test_a_merge_is_an_adapter_that_a_deck_switches(intarsia, world, config, tmp_path):
    told = intarsia("merge", config, "--json").json
    found = ia.read(tmp_path / "both")
    assert (told["output"], told["digest"]) == (str(tmp_path / "both"), found.digest)
    assert told["method"] == found.method == {"name": "merge", "rule": "sum", "normalize": False, "lambda": 1.0}
    assert {name: facts["weight"] for name, facts in told["adapters"].items()} == {"spells": 0.5, "counts": 1.0}
    assert told["bytes"] == sum(file.stat().st_size for file in (tmp_path / "both").iterdir())
    model = pretrained.load(world.base, dtype="float32").model
    deck = ia.Deck(model)
    deck.add(tmp_path / "both", world.adapters["spells"], world.adapters["counts"], any_base=True)
    deck.use("both")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    deck.fuse(spells=0.5, counts=1.0)
    assert all((weight - before[name]).abs().max() < 1e-6 for name, weight in model.state_dict().items())


def test_it_says_what_was_made_of_what(intarsia, config, tmp_path):
    ended = intarsia("merge", config, "adapters.counts.parameters.weight=[0, 1]", "parameters.lambda=2")
    assert ended.code == 0, ended.err
    assert "sum  normalize=false  lambda=2" in ended.out
    assert [line.split()[:3] for line in ended.out.splitlines()[2:4]] == [
        ["spells", "shira", "14"],
        ["counts", "lora", "14"],
    ]
    assert "[0, 1]" in ended.out
    assert f"{tmp_path / 'both'}  7 elements, 7 sum" in ended.out, "a weight of 0 leaves an adapter out of a layer"
    shown = intarsia("show", tmp_path / "both").out
    assert "made of spells" in shown
    assert "weight=0.5" in shown


def test_a_dry_run_writes_nothing(intarsia, config, tmp_path):
    told = intarsia("merge", config, "--dry-run", "--json").json
    assert (told["weights"], told["adapters"]["counts"]["weight"]) == (14, 1.0)
    assert "sha256" in intarsia("merge", config, "--dry-run").out
    assert intarsia("merge", config, "--dry-run", "--json", "output=null").json["output"] is None
    assert not (tmp_path / "both").exists()


def test_what_stands_there_is_replaced_only_when_asked_for(intarsia, config, tmp_path):
    first = intarsia("merge", config, "--json").json["digest"]
    ended = intarsia("merge", config, "parameters.lambda=2")
    assert ended.code == 2
    assert "exists already" in ended.err
    assert ia.read(tmp_path / "both").digest == first
    second = intarsia("merge", config, "parameters.lambda=2", "--overwrite", "--json").json["digest"]
    assert ia.read(tmp_path / "both").digest == second != first


def test_values_are_rounded_when_asked_for(intarsia, config, tmp_path):
    intarsia("merge", config, "values=bfloat16", "--json").json
    assert ia.read(tmp_path / "both").about["rounded"] == "bfloat16"


def test_a_low_rank_approximation_tells_its_loss(intarsia, config):
    ended = intarsia("merge", config, "merge_method=svd", "parameters.rank=4")
    assert ended.code == 0, ended.err
    assert "lost in the approximation: " in ended.out


def test_dora_needs_the_base_which_is_then_loaded(intarsia, world, config, tmp_path):
    words = ["merge", config, "merge_method=ties", f"adapters=[{world.adapters['lengths']}]"]
    ended = intarsia(*words)
    assert ended.code == 2
    assert "depends on the base's weight" in ended.err
    assert not (tmp_path / "both").exists()
    told = intarsia(*words, f"model={world.base}", "--json").json
    assert told["edits"] == {"dense": 14}


def test_the_schema(intarsia):
    assert "merge_method" in intarsia("merge", "--schema").json["properties"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a config file is needed: intarsia merge CONFIG.yaml"),
        (["nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["{config}", "merge_metod=ties"], "unknown key 'merge_metod'; did you mean 'merge_method'"),
        (["{config}", "merge_method=tise"], "unknown merge method 'tise'; did you mean 'ties'"),
        (["{config}", "parameters.lamda=1"], "parameters.lamda: sum has no parameter 'lamda'; did you mean 'lambda'"),
        (
            ["{config}", "adapters.spels.parameters.weight=1"],
            "no adapter 'spels' is merged; did you mean 'spells'?",
        ),
        (["{config}", "adapters.spells.parameters.weight=.nan"], "the weight of 'spells' is nan"),
        (
            ["{config}", "adapters.spells.parameters.weight=heavy"],
            "the weight of 'spells' is 'heavy'; expected a finite number",
        ),
        (["{config}", "merge_method=lego"], "lego takes edits that are low rank, and this one (elements) is sparse"),
        (["{config}", "output=null"], "key 'output' is missing"),
        (["{config}", "output={spells}"], "is one of the adapters that are merged"),
        (["{config}", "output={base}", "--overwrite"], "is not an adapter, so it is not overwritten"),
        (["{config}", "adapters=[nobody@3]"], "nobody@3: there is no such folder, and in the registry"),
        (["{config}", "--dry-rn"], "no option --dry-rn; did you mean --dry-run"),
    ],
)
def test_mistakes_are_one_message_and_nothing_is_written(intarsia, world, config, tmp_path, words, said):
    places = {"config": config, "base": world.base} | world.adapters
    ended = intarsia("merge", *(word.format(**places) for word in words))
    assert ended.code == 2
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def test_a_broken_adapter_is_found_before_anything_is_written(intarsia, config, world, tmp_path):
    broken = tmp_path / "counts"
    shutil.copytree(world.adapters["counts"], broken)
    tensors = broken / "adapter.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)
    ended = intarsia("merge", config, f"adapters=[{world.adapters['spells']}, {broken}]")
    assert ended.code == 2
    assert "its bytes do not match its digest" in ended.err
    assert not (tmp_path / "both").exists()
