"""PEFT folders are read as what PEFT itself makes of them, and whatever is not computed here is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import intarsia as ia
from intarsia.edits import LowRank, Rescaled, Sparse, Sum
from intarsia.interop import read_peft
from intarsia.interop.peft_folder import CONFIG, TENSORS
from interop import peft_oracle as oracle
from interop.peft_oracle import convolutions, gpt2, llama, merged, plain_net, saved
from small import SITES

NET = {"target_modules": list(SITES)}
# PEFT forms W + dW and, for DoRA, the norms in the dtype of the model: a few roundings apart from ours.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}

KINDS: dict[str, tuple[Any, Any]] = {
    "lora": (plain_net, peft.LoraConfig(r=3, lora_alpha=5, **NET)),
    "rslora": (plain_net, peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, **NET)),
    "dora": (plain_net, peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, **NET)),
    "rslora-dora": (plain_net, peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True, **NET)),
    "patterns": (
        plain_net,
        peft.LoraConfig(r=2, lora_alpha=4, rank_pattern={"d.*n": 5, "up": 1}, alpha_pattern={"^up": 7}, **NET),
    ),
    "patterns-rslora": (
        plain_net,
        peft.LoraConfig(r=2, lora_alpha=4, use_rslora=True, rank_pattern={"down": 5}, alpha_pattern={"down": 3}, **NET),
    ),
    "conv1d": (gpt2, peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "conv1d-dora": (gpt2, peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, use_dora=True)),
    "embedding": (gpt2, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["wte", "c_attn"], fan_in_fan_out=True)),
    "convolution": (convolutions, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["one", "two"])),
    "convolution-dora": (convolutions, peft.LoraConfig(r=2, target_modules=["one", "two"], use_dora=True)),
    "orthogonal": (plain_net, peft.LoraConfig(r=2, init_lora_weights="orthogonal", **NET)),
    "shira": (plain_net, peft.ShiraConfig(r=2, random_seed=5, **NET)),
    "super": (plain_net, peft.SupertuningConfig(sparsity=0.9, **NET)),
    "supra": (plain_net, peft.SupertuningConfig(sparsity=0.9, r=2, lora_alpha=3, **NET)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weights_are_those_of_peft(kind, dtype, tmp_path):
    make, config = KINDS[kind]
    model = make(dtype)
    expected = merged(saved(model, config, tmp_path / "theirs"))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    adapter = read_peft(tmp_path / "theirs", model)
    assert adapter.name == "theirs"
    deck = ia.Deck(model)
    deck.add(adapter)
    deck.use("theirs")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=CLOSE[dtype], atol=CLOSE[dtype])
        assert (name in adapter.edits) == (not torch.equal(weight, before[name]))
    deck.off()
    ia.store.write(adapter, tmp_path / "ours")
    assert ia.read(tmp_path / "ours").digest == adapter.digest


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "conv1d", "embedding", "shira", "super"])
def test_what_was_read_can_be_trained_on(kind, tmp_path):
    make, config = KINDS[kind]
    model = make()
    saved(model, config, tmp_path / "theirs")
    adapter = read_peft(tmp_path / "theirs", model)
    ia.store.write(adapter, tmp_path / "ours")
    ia.load(model, tmp_path / "ours")
    assert ia.export(model).facts() == adapter.facts()
    torch.testing.assert_close(dict(ia.export(model).tensors()), dict(adapter.tensors()))


def test_the_kinds_of_edit(tmp_path):
    found = {}
    for kind in ("lora", "dora", "shira", "super", "supra"):
        make, config = KINDS[kind]
        saved(make(), config, tmp_path / kind)
        found[kind] = {type(edit) for edit in read_peft(tmp_path / kind, make()).edits.values()}
    assert found == {"lora": {LowRank}, "dora": {Rescaled}, "shira": {Sparse}, "super": {Sparse}, "supra": {Sum}}


def test_a_head_that_is_tied_in_peft_too_is_read_once(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    theirs = saved(llama(), config, tmp_path / "tied")
    model: Any = llama()
    adapter = read_peft(tmp_path / "tied", model)
    assert set(adapter.edits) == {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"}
    ids = torch.arange(12).view(2, 6)
    deck = ia.Deck(model)
    deck.add(adapter)
    deck.use("tied")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_embedding_that_was_trained_without_its_tied_head_is_refused(tmp_path):
    saved(llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path / "half")
    with pytest.raises(
        ia.IntarsiaError, match=r"model.embed_tokens: it shares its weight with lm_head, and PEFT trained"
    ):
        read_peft(tmp_path / "half", llama())


def test_bfloat16_factors_are_widened(tmp_path):
    saved(plain_net(), KINDS["lora"][1], tmp_path / "one")
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tmp_path / "one" / TENSORS).items()}
    save_file(narrow, tmp_path / "one" / TENSORS)
    edit = read_peft(tmp_path / "one", plain_net()).edits["up.weight"]
    assert isinstance(edit, LowRank)
    assert edit.A.dtype == torch.float32
    assert torch.equal(edit.A, narrow["base_model.model.up.lora_A.weight"].float())


def test_weights_that_peft_saves_beside_an_embedding_are_let_pass_only_if_they_are_the_base(tmp_path):
    saved(gpt2(), KINDS["embedding"][1], tmp_path / "one")
    model: Any = gpt2()
    tensors = load_file(tmp_path / "one" / TENSORS)
    tensors["base_model.model.transformer.wte.base_layer.weight"] = model.transformer.wte.weight.detach().clone()
    save_file(tensors, tmp_path / "one" / TENSORS)
    assert "transformer.wte.weight" in read_peft(tmp_path / "one", model).edits
    tensors["base_model.model.transformer.wte.base_layer.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "one" / TENSORS)
    with pytest.raises(ia.IntarsiaError, match=r"transformer.wte: a whole weight \(40, 16\) is saved"):
        read_peft(tmp_path / "one", model)


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("lora", {"bias": "all"}, 'bias="all" is not computed here'),
        ("lora", {"modules_to_save": ["again"]}, r'modules_to_save=\["again"\] is not computed here'),
        ("lora", {"lora_bias": True}, "lora_bias=true is not computed here"),
        ("lora", {"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not computed"),
        ("lora", {"layer_replication": [[0, 2]]}, "layer_replication"),
        ("lora", {"target_parameters": ["experts.w"]}, "target_parameters"),
        ("lora", {"kasa_config": {"beta": 1}}, "kasa_config"),
        ("lora", {"alora_invocation_tokens": ["x"]}, "expected one or more numbers of tokens"),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ("lora", {"init_lora_weights": "loftq"}, "init_lora_weights='loftq' moves part of the base"),
        ("lora", {"use_spiral": True}, "use_spiral=true is a field that this version does not know"),
        ("lora", {"r": 2}, "lora_A.weight is .* its rank is 2"),
        ("lora", {"r": "3"}, "r is '3'; expected a whole number"),
        ("lora", {"lora_alpha": None}, "lora_alpha is None; expected a number"),
        ("lora", {"rank_pattern": {"up": 0}}, "rank_pattern is"),
        ("lora", {"use_dora": True}, "a linear needs .*lora_magnitude_vector"),
        ("dora", {"use_dora": False}, "found .*lora_magnitude_vector"),
        ("lora", {"peft_type": "IA3"}, "of the kind 'IA3'; these can be read: LORA, SHIRA, SUPERTUNING"),
        ("shira", {"modules_to_save": ["up"]}, "modules_to_save"),
        ("shira", {"r": 3}, "80 values; r=3 of adapter_config.json asks for 120"),
        ("super", {"save_precomputed_indices": False}, "choosing them anew may break ties"),
        ("supra", {"r": 3}, "its rank is 3"),
    ],
)
def test_a_setting_that_changes_the_math_is_refused_by_its_name(kind, given, said, tmp_path):
    make, config = KINDS[kind]
    saved(make(), config, tmp_path / "one")
    settings = json.loads((tmp_path / "one" / CONFIG).read_text()) | given
    (tmp_path / "one" / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(ia.IntarsiaError, match=said):
        read_peft(tmp_path / "one", make())


def _cut(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


def _pickled(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")


def _changed(key: str, make: Any) -> Any:
    def change(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        found = make(tensors.pop(f"base_model.model.{key}"))
        tensors |= {f"base_model.model.{name}": tensor for name, tensor in found.items()}
        save_file(tensors, folder / TENSORS)

    return change


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("lora", lambda f: (f / CONFIG).unlink(), f"it has no {CONFIG}"),
        ("lora", lambda f: (f / CONFIG).write_text("{"), "cut off or damaged"),
        ("lora", lambda f: (f / CONFIG).write_text("[]"), "holds no JSON object"),
        ("lora", _cut, "cut off or not a safetensors file"),
        ("lora", _pickled, "a pickle, which runs code when it is opened"),
        ("lora", lambda f: (f / TENSORS).unlink(), f"has no {TENSORS}"),
        ("lora", lambda f: save_file({}, f / TENSORS), "holds no tensors"),
        ("lora", _changed("up.lora_A.weight", lambda t: {}), "up: found lora_B.weight; a linear needs lora_A.weight"),
        (
            "lora",
            _changed("up.lora_A.weight", lambda t: {"upp.lora_A.weight": t}),
            "upp: the model has no such layer; did you mean 'up'",
        ),
        (
            "lora",
            _changed("up.lora_A.weight", lambda t: {"up.lora_C.weight": t}),
            "up.lora_C.weight: it is no factor of an adapter",
        ),
        (
            "lora",
            _changed("up.lora_A.weight", lambda t: {"up.lora_A.weight": t[:, :3].contiguous()}),
            "do not multiply to",
        ),
        ("lora", _changed("up.lora_A.weight", lambda t: {"up.lora_A.weight": t * float("nan")}), "not finite"),
        (
            "dora",
            _changed("up.lora_magnitude_vector", lambda t: {"up.lora_magnitude_vector": t[:3].clone()}),
            "magnitude is",
        ),
        (
            "shira",
            _changed("up.shira_indices", lambda t: {"up.shira_indices": t + 20}),
            "reach beyond the 24 x 16 weight",
        ),
        ("shira", _changed("up.shira_indices", lambda t: {"up.shira_indices": t[0].clone()}), r"expected \(2, k\)"),
        (
            "super",
            _changed("up.supertuning_indices", lambda t: {"up.supertuning_indices": t - 400}),
            "indices reach from",
        ),
    ],
)
def test_a_folder_that_is_not_whole(kind, damage, said, tmp_path):
    make, config = KINDS[kind]
    saved(make(), config, tmp_path / "one")
    damage(tmp_path / "one")
    with pytest.raises(ia.IntarsiaError, match=said):
        read_peft(tmp_path / "one", make())


def test_all_faults_are_told_at_once(tmp_path):
    saved(plain_net(), KINDS["lora"][1], tmp_path / "one")
    settings = json.loads((tmp_path / "one" / CONFIG).read_text()) | {"bias": "all", "use_bdlora": {"nblocks": 2}}
    (tmp_path / "one" / CONFIG).write_text(json.dumps(settings))
    _changed("up.lora_A.weight", lambda t: {"upp.lora_A.weight": t})(tmp_path / "one")
    with pytest.raises(ia.IntarsiaError, match=r"(?s)bias=.*use_bdlora=.*upp: the model has no such layer"):
        read_peft(tmp_path / "one", plain_net())


def test_nothing_but_a_folder_is_read(tmp_path):
    with pytest.raises(ia.IntarsiaError, match="does not exist; a PEFT adapter is a folder"):
        read_peft(tmp_path / "none", plain_net())
    (tmp_path / "file").write_text("")
    with pytest.raises(ia.IntarsiaError, match="is a file"):
        read_peft(tmp_path / "file", plain_net())


def test_grouped_convolutions_and_repeated_places(tmp_path):
    saved(convolutions(), peft.LoraConfig(r=2, target_modules=["grouped"]), tmp_path / "grouped")
    with pytest.raises(ia.IntarsiaError, match="grouped convolution"):
        read_peft(tmp_path / "grouped", convolutions())
    theirs = saved(plain_net(), KINDS["shira"][1], tmp_path / "twice")
    for name in SITES:  # PEFT sums what stands at one place, and so do we
        theirs.get_submodule(f"base_model.model.{name}").shira_indices["default"][:, 1] = 0
        theirs.get_submodule(f"base_model.model.{name}").shira_indices["default"][:, 0] = 0
    oracle.quietly(theirs.save_pretrained, tmp_path / "twice")
    expected, model = merged(theirs), plain_net()
    deck = ia.Deck(model)
    deck.add(read_peft(tmp_path / "twice", model))
    deck.use("twice")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)
