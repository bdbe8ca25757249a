"""``intarsia convert``: adapters in and out of other formats, from the command line."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import intarsia as ia
from intarsia import pretrained
from intarsia.interop import TARGETS, apply_patch
from interop.peft_oracle import loaded, merged, saved
from toy import save_toy


def bits(folder):
    return pretrained.load(folder).model.state_dict()


def set_in(world, name):
    model = pretrained.load(world.base).model
    deck = ia.Deck(model)
    deck.add(world.adapters[name])
    deck.use(name)
    return model.state_dict()


def test_out_to_peft_and_back(intarsia, world, tmp_path):
    """counts is a LoRA, lengths a DoRA, spells a SHiRA."""
    for name, to in (("counts", "peft-lora"), ("lengths", "peft-lora"), ("spells", "peft-shira")):
        there, back = tmp_path / "peft" / name, tmp_path / "back" / name
        told = intarsia("convert", world.adapters[name], there, "--to", to, "--json").json
        assert (told["output"], told["to"], told["loss"]) == (str(there), to, 0.0)
        assert told["bytes"] == sum(file.stat().st_size for file in there.iterdir())
        intarsia("convert", there, back, "--to", "intarsia", "--base", world.base, "--json").json
        model = pretrained.load(world.base).model
        deck = ia.Deck(model)
        deck.add(back)
        deck.use(name)
        expected = set_in(world, name)
        for weight, here in model.state_dict().items():
            assert torch.equal(here, expected[weight]), (name, weight)


def test_from_peft_straight_to_a_whole_model(intarsia, world, tmp_path):
    model = pretrained.load(world.base, dtype="float32").model
    theirs = saved(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), tmp_path / "theirs")
    ended = intarsia(
        "convert",
        tmp_path / "theirs",
        tmp_path / "whole",
        "--to",
        "full-model",
        "--base",
        world.base,
        "--dtype",
        "float32",
    )
    assert ended.code == 0, ended.err
    found, expected = bits(tmp_path / "whole"), merged(theirs)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6)


def test_a_whole_model_and_a_patch(intarsia, world, tmp_path):
    expected = set_in(world, "spells")
    ended = intarsia("convert", world.adapters["spells"], tmp_path / "whole", "--to", "full-model")
    assert ended.code == 0
    assert "shards" not in ended.err, "a bar of transformers' own"
    told = intarsia(
        "convert", world.adapters["spells"], tmp_path / "one.safetensors", "--to", "weight-patch", "--json"
    ).json
    assert told["changed"] == sum(
        len(t) for k, t in load_file(tmp_path / "one.safetensors").items() if k.endswith("values")
    )
    model = pretrained.load(world.base).model
    assert apply_patch(model, tmp_path / "one.safetensors") == told["new_digest"]
    whole = bits(tmp_path / "whole")
    for name, weight in expected.items():
        assert torch.equal(whole[name], weight)
        assert torch.equal(model.state_dict()[name], weight)


def test_an_approximation_has_to_be_asked_for(intarsia, world, tmp_path):
    ended = intarsia("convert", world.adapters["spells"], tmp_path / "lora", "--to", "peft-lora")
    assert ended.code == 2
    assert "elements are not of low rank" in ended.err
    assert "--rank R" in ended.err
    assert list(tmp_path.iterdir()) == []
    ended = intarsia("convert", world.adapters["spells"], tmp_path / "lora", "--to", "peft-lora", "--rank", 8)
    assert ended.code == 0, ended.err
    assert "of the change is lost" in ended.out
    loaded(pretrained.load(world.base).model, tmp_path / "lora")
    told = intarsia(
        "convert",
        world.adapters["spells"],
        tmp_path / "lora",
        "--to",
        "peft-lora",
        "--rank",
        8,
        "--overwrite",
        "--json",
    ).json
    assert 0 < told["loss"] < 1
    dense = intarsia("convert", world.adapters["counts"], tmp_path / "one.safetensors", "--to", "weight-patch")
    assert dense.code == 2
    assert "--dense" in dense.err
    assert (
        intarsia(
            "convert", world.adapters["counts"], tmp_path / "one.safetensors", "--to", "weight-patch", "--dense"
        ).code
        == 0
    )


def test_an_adapter_of_ours_is_written_anew_without_its_base(intarsia, world, tmp_path):
    assert (
        intarsia("convert", world.adapters["spells"], tmp_path / "copy", "--to", "intarsia", "--base", "no/such").code
        == 0
    )
    assert ia.read(tmp_path / "copy").digest == ia.read(world.adapters["spells"]).digest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{spells}", "{out}", "--to", "peft-lroa"], "no format 'peft-lroa' to convert to; did you mean 'peft-lora'"),
        (["{spells}", "{out}"], "missing option '--to'"),
        (["nowhere", "{out}", "--to", "peft-lora"], "nowhere does not exist; expected the folder of an adapter"),
        (["{base}", "{out}", "--to", "peft-lora"], "holds no adapter: neither adapter.json nor adapter_config.json"),
        (["{spells}", "{spells}", "--to", "intarsia", "--overwrite"], "is what is converted; choose another place"),
        (["{spells}", "{counts}", "--to", "intarsia"], "exists already"),
        (["{spells}", "{base}", "--to", "peft-shira", "--overwrite"], "is not a PEFT adapter, so it is not overwritten"),
        (["{spells}", "{out}", "--to", "weight-patch"], "does not end in .safetensors"),
        (["{spells}", "{out}.gguf", "--to", "full-model"], "a model is a folder"),
        (["{spells}", "{out}", "--to", "peft-shira", "--rank", "4"], "peft-shira takes no rank (--rank); that is for peft-lora"),
        (["{spells}", "{out}", "--to", "peft-lora", "--dense"], "that is for weight-patch"),
        (["{spells}", "{out}", "--to", "full-model", "--dtype", "float8"], "dtype 'float8' is none that a model is written in"),
        (["{spells}", "{out}.gguf", "--to", "gguf"], "name the base's .gguf file"),
        (["{spells}", "{out}", "--to", "peft-shira", "--base", "{other}"], "belongs to another base (it was made on bfloat16"),
        (["{spells}", "{out}", "--to", "peft-shira", "--base", "{out}/none"], "there is nothing at that path"),
        (["{theirs}", "{out}", "--to", "intarsia"], "does not say which weights it belongs to; name the model: --base"),
        (["{pickle}", "{out}", "--to", "intarsia", "--base", "{base}"], "a pickle, which runs code when it is opened"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_nothing_is_written(intarsia, world, tmp_path, words, said):
    places = {"out": tmp_path / "out", "base": world.base, **world.adapters, "theirs": tmp_path / "theirs"}
    if "{other}" in words:
        places["other"] = save_toy(tmp_path / "other")
    for name, file in (("theirs", "adapter_model.safetensors"), ("pickle", "adapter_model.bin")):
        places[name] = tmp_path / name
        places[name].mkdir()
        (places[name] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        save_file({"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}, places[name] / file)
    before = {
        path: path.stat().st_mtime_ns for folder in (tmp_path, *world.adapters.values()) for path in folder.rglob("*")
    }
    ended = intarsia("convert", *(word.format(**places) for word in words))
    assert ended.code == 2
    assert [line for line in ended.err.splitlines() if line.startswith("error: ")], ended.err
    assert said in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert ended.out == ""
    after = {
        path: path.stat().st_mtime_ns for folder in (tmp_path, *world.adapters.values()) for path in folder.rglob("*")
    }
    assert after == before


def test_the_help_names_every_format(intarsia):
    said = " ".join(intarsia("convert", "--help").out.split())
    assert all(name in said for name in TARGETS)
