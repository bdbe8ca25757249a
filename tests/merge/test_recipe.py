"""A merge as a YAML file: what it may say, overrides, and every mistake at once."""

from __future__ import annotations

import pytest
import yaml

from intarsia import store
from intarsia.errors import IntarsiaError
from intarsia.merge import load_recipe, make_recipe, merge, schema
from merge.test_making import _pair

WHOLE = """
merge_method: ties
adapters:
  - adapter: out/pirate
    parameters: {weight: 0.6, density: 2e-1}
  - adapter: out/json
    name: other
    parameters:
      weight:
        - filter: self_attn
          value: [0.2, 0.8]
        - value: 1
  - out/plain
parameters: {normalize: true, lambda: 1.0}
seed: 3
output: out/both
values: bfloat16
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "merge.yaml"
    file.write_text(WHOLE)
    return file


def test_a_whole_recipe(config):
    found = load_recipe(config)
    assert [part.called for part in found.adapters] == ["pirate", "other", "plain"]
    assert (found.merge_method, found.seed, found.output, found.values, found.overwrite) == (
        "ties",
        3,
        "out/both",
        "bfloat16",
        False,
    )
    wanted = found.wanted()
    assert wanted.own["pirate"]["density"].plain == 0.2
    assert wanted.own["other"]["weight"].at("layers.1.self_attn.q", range(3)) == 0.5
    assert wanted.own["other"]["weight"].where == "adapters.1.parameters.weight"
    assert {key: value.plain for key, value in wanted.shared.items()} == {"normalize": True, "lambda": 1.0}
    assert wanted.own["plain"] == {}


def test_overrides_name_an_adapter_or_its_place(config):
    found = load_recipe(
        config,
        [
            "adapters.pirate.parameters.weight=[0, 1]",
            "adapters.other.parameters.density=0.1",
            "adapters.2.name=third",
            "parameters.lambda=2",
            "merge_method=dare",
        ],
    )
    assert found.adapters[0].parameters == {"weight": [0, 1], "density": 0.2}
    assert found.adapters[1].parameters["density"] == 0.1
    assert [part.called for part in found.adapters] == ["pirate", "other", "third"]
    assert (found.parameters["lambda"], found.merge_method) == (2, "dare")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("adapters.4.name=x", "override 'adapters.4.name=x': 4 is no place in a list; expected 0 to 2"),
        ("adapters.nobody.name=x", "no adapter .nobody. is merged"),
        ("adapters.0.adapter.x=1", "adapters.0.adapter is a value, not a section"),
    ],
)
def test_overrides_that_lead_nowhere(config, change, said):
    with pytest.raises(IntarsiaError, match=said):
        load_recipe(config, [change])


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"adapters": ["a"]}, "key 'merge_method' is missing"),
        ({"merge_method": "sum"}, "key 'adapters' is missing"),
        ({"merge_method": "sum", "adapters": []}, "adapters: expected list should have at least 1 item"),
        ({"merge_method": "sum", "adapters": ["a"], "sed": 1}, "unknown key 'sed'; did you mean 'seed'"),
        ({"merge_method": "sum", "adapters": [{"adapter": "a", "paramters": {}}]}, "unknown key 'adapters.0.paramters'; did you mean 'adapters.0.parameters'"),
        ({"merge_method": "sum", "adapters": [{"parameters": {}}]}, "key 'adapters.0.adapter' is missing"),
        ({"merge_method": "sum", "models": ["a"]}, "models: mergekit's models are adapters here"),
        ({"merge_method": "sum", "adapters": ["x/a", "y/a"]}, "two adapters are named 'a'; give one of them another name"),
        ({"merge_method": "sum", "adapters": ["a"], "parameters": [1]}, "parameters: expected a mapping of keys"),
        ({"merge_method": "sum", "adapters": ["a"], "values": "int8"}, "values: expected 'exact', 'bfloat16' or 'float16'"),
        ({"merge_method": "sum", "adapters": ["a"], "seed": -1}, "seed: expected greater than or equal to 0"),
    ],
)  # fmt: skip
def test_mistakes(tree, said):
    with pytest.raises(IntarsiaError, match=said):
        make_recipe(tree)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(IntarsiaError, match=r"(?s)3 mistake\(s\).*'merge_method' is missing.*'adapters.0.nme'.*'sed'"):
        make_recipe({"adapters": [{"adapter": "a", "nme": "b"}], "sed": 1})


def test_folders_that_are_no_adapters_are_all_named(tmp_path):
    recipe = make_recipe({"merge_method": "sum", "adapters": [str(tmp_path / "one"), str(tmp_path / "two")]})
    with pytest.raises(IntarsiaError, match="(?s)one does not exist.*two does not exist"):
        recipe.open()


def test_a_recipe_is_what_the_arguments_are(tmp_path):
    pair = _pair()
    for name, one in pair.items():
        store.write(one, tmp_path / name)
    tree = {
        "merge_method": "ties",
        "adapters": [{"adapter": str(tmp_path / name), "parameters": {"density": 0.5}} for name in pair],
        "parameters": {"lambda": 0.5},
    }
    recipe = make_recipe(tree)
    found = merge(recipe.open(), recipe)
    assert (
        found.digest
        == merge(pair, rule="ties", parameters={"lambda": 0.5}, own={n: {"density": 0.5} for n in pair}).digest
    )
    again = merge(recipe.open(), recipe, weights={"pirate": 3.0})
    assert again.about["merged"]["pirate"]["weight"] == 3.0
    assert again.digest != found.digest


def test_names_of_the_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("INTARSIA_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.chdir(tmp_path)
    pair = _pair()
    store.write(pair["pirate"], tmp_path / "pirate")
    store.Registry().add(tmp_path / "pirate", "captain", tags=["good"])
    recipe = make_recipe({"merge_method": "sum", "adapters": ["captain@good"]})
    assert {name: one.digest for name, one in recipe.open().items()} == {"captain": pair["pirate"].digest}
    with pytest.raises(IntarsiaError, match="captain@bad: there is no such folder, and in the registry"):
        make_recipe({"merge_method": "sum", "adapters": ["captain@bad"]}).open()


def test_the_schema_is_one():
    assert set(schema()["properties"]) >= {
        "merge_method",
        "adapters",
        "parameters",
        "seed",
        "output",
        "values",
        "model",
    }
    assert set(yaml.safe_load(WHOLE)) <= set(schema()["properties"])
