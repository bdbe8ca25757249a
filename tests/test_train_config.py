"""The YAML config: what it accepts, and what it says about mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from intarsia import registry
from intarsia.errors import IntarsiaError
from intarsia.train.config import DataConfig, load_config, make_config, schema
from intarsia.train.data import SHAPES, load_examples
from toy import toy_tokenizer

WHOLE = """
model: smollm2-135m
data: phonemes.jsonl                  # or {train: ..., eval: ..., format: alpaca}
method: {name: shira, density: 0.01, scorer: snip}
targets: all-linear
output: out/phonemes
train: {steps: 200, lr: 2e-3, batch_size: 16}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(WHOLE)
    return path


def test_the_config_of_the_documentation(file):
    config = load_config(file)
    assert config.model == "smollm2-135m"
    assert config.data.train == "phonemes.jsonl"
    assert config.method == {"name": "shira", "density": 0.01, "scorer": "snip"}
    assert (config.train.steps, config.train.lr, config.train.batch_size) == (200, 0.002, 16)
    assert (config.train.accumulate, config.train.weight_decay, config.seed) == (1, 0.0, 0)


def test_overrides_win_and_reach_into_short_forms(file):
    config = load_config(file, ["train.lr=1e-3", "data.format=alpaca", "method.density=.02", "targets=['*q*', '*k*']"])
    assert config.train.lr == 0.001
    assert (config.data.train, config.data.format) == ("phonemes.jsonl", "alpaca")
    assert config.method == {"name": "shira", "density": 0.02, "scorer": "snip"}
    assert config.targets == ["*q*", "*k*"]
    assert load_config(file, ["method=lora", "method.rank=4"]).method == {"name": "lora", "rank": 4}
    assert load_config(file, ["train.steps=null", "train.epochs=2"]).train.epochs == 2


@pytest.mark.parametrize(
    ("written", "read"),
    [("2e-3", 0.002), ("2E+1", 20.0), (".5", 0.5), ("1.", 1.0), ("7", 7.0), ("0.001", 0.001)],
)
def test_numbers_are_numbers(file, written, read):
    assert load_config(file, [f"train.lr={written}"]).train.lr == read


@pytest.mark.parametrize("word", ["no", "off", "on", "yes", "1:30", "2026-11-22", "0x10", "e3"])
def test_words_stay_words(file, word):
    assert load_config(file, [f"output={word}"]).output == word


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'"),
        ("train.btach_size=1", "unknown key 'train.btach_size'; did you mean 'train.batch_size'"),
        ("data.trian=x", "unknown key 'data.trian'; did you mean 'data.train'"),
        ("lr=3", "unknown key 'lr'; it is train.lr"),
        ("train.seed=3", "unknown key 'train.seed'; it is seed"),
        ("train.steps=2.5", "train.steps: expected integer, found 2.5"),
        ("train.steps=true", "train.steps: expected integer, found True"),
        ("train.lr=fast", "train.lr: expected number, found 'fast'"),
        ("train.lr=0", "train.lr: expected greater than 0, found 0"),
        ("train.lr=.nan", "train.lr: expected a finite number"),
        ("train.lr=.inf", "train.lr: expected a finite number"),
        ("train.epochs=3", "train: give steps or epochs, not both"),
        ("output=2024", "output: expected text, found 2024; write it in quotes"),
        ("output=''", "output: expected text that is not empty"),
        ("overwrite=yes", "overwrite: expected boolean, found 'yes'"),
        ("data.format=alpacca", "data.format: expected .*'alpaca'.*found 'alpacca'"),
        ("data=3", "data: expected a mapping of keys, found 3"),
        ("targets=[3]", r"targets: expected text or a list of texts, found \[3\]"),
        ("method.name=3", "method needs a name"),
        ("model.x=3", "model is a value, not a section"),
        ("lr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train.lr={", "override .* not valid YAML"),
        ("seed=-1", "seed: expected greater than or equal to 0"),
    ],
)
def test_a_mistake_is_named_in_full(file, override, message):
    with pytest.raises(IntarsiaError, match=message):
        load_config(file, [override])


def test_all_mistakes_are_reported_at_once_with_the_file(file):
    with pytest.raises(IntarsiaError, match=r"run\.yaml: 3 mistake") as caught:
        load_config(file, ["train.steps=x", "colour=red", "model=null"])
    assert "unknown key 'colour'" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a config is a mapping"),
        ("- a", "a config is a mapping"),
        ("model: [", "line 1, column 9: not valid YAML"),
        ("model: a\nseed: 1\nseed: 2\n", "line 3, column 1: not valid YAML: key 'seed' twice"),
        ("model: a", "key 'output' is missing"),
        ("model: !!python/object:os.system a", "not valid YAML"),
    ],
)
def test_a_broken_file_is_a_clear_error(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(IntarsiaError, match=message):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file_names_the_nearest(file):
    with pytest.raises(IntarsiaError, match=r"no config file .*did you mean 'run.yaml'"):
        load_config(file.parent / "runn.yaml")


def test_a_config_goes_through_json_and_back(file):
    config = load_config(file)
    assert make_config(json.loads(config.model_dump_json())) == config


def test_paths_are_taken_from_objects_too():
    config = make_config({"model": Path("m"), "data": Path("d.csv"), "method": "lora", "output": Path("o")})
    assert (config.model, config.data.train, config.output) == ("m", "d.csv", "o")


def test_the_schema_names_every_key_and_default():
    tree = schema()
    assert set(tree["properties"]) >= {"model", "data", "method", "targets", "output", "train"}
    assert tree["$defs"]["TrainConfig"]["properties"]["batch_size"]["default"] == 16
    assert tree["additionalProperties"] is False


def test_the_example_is_a_config_and_its_data_can_be_read():
    root = Path(__file__).parent.parent
    config = load_config(root / "examples/roman.yaml")
    examples, report = load_examples(root / config.data.train, toy_tokenizer())
    assert (report.format, len(examples), report.cut) == ("prompt", 64, 0)
    assert registry.build(config.method).needs() == {"gradient"}


def test_the_config_knows_exactly_the_shapes_there_are():
    assert {*SHAPES, "auto"} == set(get_args(DataConfig.model_fields["format"].annotation))
