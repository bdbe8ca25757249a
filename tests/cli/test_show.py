"""``intarsia show``: what an adapter changes."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import intarsia as ia
from intarsia import pretrained
from intarsia.edits import Sparse
from intarsia.methods import Sora
from toy import save_toy, toy_model, toy_tokenizer


def test_facts_of_an_adapter(intarsia, world):
    folder = world.adapters["spells"]
    adapter = ia.read(folder)
    shown = intarsia("show", folder, "--json").json
    assert shown["digest"] == adapter.digest
    assert shown["method"] == dict(adapter.method)
    assert shown["base"]["digest"] == adapter.base.digest
    assert (shown["weights"], shown["touched"], shown["bytes"]) == (len(adapter.edits), adapter.touched, adapter.bytes)
    assert shown["files"]["adapter.safetensors"] == (folder / "adapter.safetensors").stat().st_size
    assert [row["name"] for row in shown["changes"]] == list(adapter.edits)
    values = torch.cat([edit.values.double() for edit in adapter.edits.values() if isinstance(edit, Sparse)])
    assert shown["norm"] == pytest.approx(values.norm().item())
    assert shown["invisible_share"] is None, "nothing is known of rounding without the base"
    assert {row["name"] for row in shown["modules"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert [row["name"] for row in shown["layers"]] == ["0", "1"]
    assert sum(row["touched"] for row in shown["layers"]) == adapter.touched


def test_with_the_base_it_measures_what_rounding_loses(intarsia, world):
    folder = world.adapters["spells"]
    shown = intarsia("show", folder, "--model", world.base, "--json").json
    weights = dict(pretrained.load(world.base).model.named_parameters())
    vanished = changed = 0
    for name, edit in ia.read(folder).edits.items():
        assert isinstance(edit, Sparse)
        dense = torch.zeros(edit.shape).flatten().index_copy_(0, edit.index, edit.values).view(edit.shape)
        after = (weights[name].detach().float() + dense).to(torch.bfloat16)
        changed += int((dense != 0).sum())
        vanished += int(((after == weights[name]) & (dense != 0)).sum())
    assert 0 < vanished < changed
    assert shown["invisible_share"] == pytest.approx(vanished / changed)
    assert shown["relative"] > 0


def test_weights_that_are_stored_transposed(intarsia, tmp_path):
    torch.manual_seed(0)
    config = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 260, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    model = pretrained.load(tmp_path / "base").model
    ia.attach(model, ia.Lora(rank=2))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.adapters["default"].B.fill_(1.0)
    ia.save(model, tmp_path / "one")
    (found,) = (
        row
        for row in intarsia("show", tmp_path / "one", "--model", tmp_path / "base", "--json").json["changes"]
        if "c_attn" in row["name"]
    )
    assert found["shape"] == [48, 16]
    assert found["weight_norm"] == pytest.approx(model.transformer.h[0].attn.c_attn.weight.norm().item())


def test_the_report_for_people(intarsia, world):
    said = intarsia("show", world.adapters["counts"]).out
    adapter = ia.read(world.adapters["counts"])
    for text in ("counts", adapter.digest, "lora  rank=2", "q_proj", "effective rank", "layers 0 to 1", "low_rank"):
        assert text in said
    assert f"needs the base's weights: --model {adapter.base.source}" in " ".join(said.split())
    ended = intarsia("show", world.adapters["counts"], "--model", world.base)
    assert ended.code == 0, ended.err
    based = ended.out
    assert "of the changed entries vanish when set into the bfloat16 base" in " ".join(based.split())


def test_the_ranks_that_a_method_has_dealt_out(intarsia, tmp_path):
    """SoRA's edit has the ranks whose gate is not 0, in one weight none at all."""
    model = toy_model()
    ia.attach(model, Sora(rank=4), targets=["q_proj", "down_proj"])
    with torch.no_grad():
        for number, state in enumerate(ia.model.states(model, "default").values()):
            state.get_parameter("B").add_(0.1)
            state.get_parameter("gate")[number + 1 :] = 0
        next(iter(ia.model.states(model, "default").values())).get_parameter("gate").zero_()
    folder = ia.save(model, tmp_path / "a")
    shown = intarsia("show", folder, "--json").json
    assert sorted(shown["ranks"].values()) == [0, 2, 3, 4]
    assert shown["ranks"]["model.layers.0.self_attn.q_proj.weight"] == 0
    said = intarsia("show", folder).out
    assert "0 to 4 a weight, 9 in all, most in model.layers.1.mlp.down_proj" in said


def test_spectra_of_the_most_changed_weights(intarsia, world):
    folder = world.adapters["counts"]
    shown = intarsia("show", folder, "--spectrum", 2, "--json").json
    norms = {row["name"]: row["norm"] for row in shown["changes"]}
    assert [row["name"] for row in shown["spectra"]] == sorted(norms, key=lambda name: -norms[name])[:2]
    assert all(row["effective_rank"] <= 2 + 1e-6 for row in shown["spectra"]), "rank 2 was trained"
    assert intarsia("show", folder, "--spectrum", 0, "--json").json["spectra"] == []


def test_a_change_that_depends_on_the_base_is_not_guessed(intarsia, world):
    folder = world.adapters["lengths"]
    shown = intarsia("show", folder, "--json").json
    assert shown["norm"] is None
    assert shown["spectra"] == []
    assert "needs --model" in intarsia("show", folder).out
    based = intarsia("show", folder, "--model", world.base, "--json").json
    assert based["norm"] > 0
    assert len(based["spectra"]) == 3


@pytest.mark.parametrize("name", ["spells", "counts"])
def test_plot(intarsia, world, tmp_path, name):
    ended = intarsia("show", world.adapters[name], "--plot", tmp_path / "new" / "picture.png")
    assert ended.code == 0
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("spells", "picture.txt", "should end in .png, .svg or .pdf"),
        ("lengths", "picture.png", "name the base: --model"),
        ("spells", "file/picture.png", "could not write the picture"),
    ],
)
def test_a_plot_that_cannot_be(intarsia, world, tmp_path, name, file, said):
    (tmp_path / "file").write_text("")
    ended = intarsia("show", world.adapters[name], "--plot", tmp_path / file)
    assert ended.code == 2
    assert said in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_base_that_is_not_its_own(intarsia, world, tmp_path):
    toy_model(seed=1).save_pretrained(tmp_path / "other")
    toy_tokenizer().save_pretrained(tmp_path / "other")
    ended = intarsia("show", world.adapters["spells"], "--model", tmp_path / "other")
    assert ended.code == 2
    assert "belongs to another base (its weights differ)" in ended.err


def test_the_base_is_loaded_in_the_dtype_that_the_adapter_was_made_on(intarsia, world, tmp_path):
    # The same numbers in a file of another dtype: what training with load: {dtype: bfloat16} starts from.
    shown = intarsia("show", world.adapters["spells"], "--model", save_toy(tmp_path / "wide"), "--json").json
    assert shown["relative"] > 0
