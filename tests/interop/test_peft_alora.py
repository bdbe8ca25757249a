"""aLoRA there and back: what PEFT saved is computed as PEFT computes it, and what is written is loaded by PEFT as the same."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch

import intarsia as ia
from intarsia import interop as conversions
from intarsia.interop.convert import TARGETS
from intarsia.interop.peft import read_peft
from intarsia.methods import Alora
from interop.peft_oracle import convolutions, llama, loaded, saved
from small import stir

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)  # what PEFT asks for
INVOCATION, TARGETED = [7, 11], ["q_proj", "k_proj", "v_proj"]
IDS = torch.tensor([[1, 2, 7, 11, 5, 6, 7, 8], [7, 11, 3, 4, 9, 7, 11, 2], [1, 2, 3, 4, 5, 6, 7, 8]])


def _config(**more: Any) -> Any:
    return peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=TARGETED, task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION, **more
    )


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saved_is_the_same_here_and_trains_on(tmp_path, rslora):
    theirs = saved(llama(torch.float64), _config(use_rslora=rslora), tmp_path / "one")
    model = llama(torch.float64)
    adapter = read_peft(tmp_path / "one", model)
    deck = ia.Deck(model)
    deck.add(a=adapter)
    deck.use("a")
    expected = _logits(theirs)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-6, atol=1e-7)  # factors in float32 here
    assert not torch.allclose(expected[:2], _logits(llama(torch.float64))[:2], atol=1e-2)
    deck.off()
    ia.load(model, ia.store.write(adapter, tmp_path / "ours"), "a")
    torch.testing.assert_close(_logits(model), expected, rtol=1e-6, atol=1e-7)


def test_what_is_written_is_the_same_in_peft(tmp_path):
    model = llama()
    ia.attach(model, Alora(INVOCATION, rank=3, alpha=5.0), [f"*{name}" for name in TARGETED])
    stir(model, size=0.3)
    adapter = ia.export(model)
    conversions.write_peft_lora(adapter, llama(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == INVOCATION
    torch.testing.assert_close(_logits(loaded(llama(), tmp_path / "out")), _logits(model), rtol=1e-5, atol=1e-5)
    again = read_peft(tmp_path / "out", llama())
    for weight, edit in adapter.edits.items():
        other = again.edits[weight]
        assert edit.facts() == other.facts()
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in edit.tensors().items())
    assert TARGETS["peft-lora"].outcome(edit) == "exact"
    assert TARGETS["weight-patch"].outcome(edit) == "refused"


def test_convert_writes_it_too(tmp_path):
    model: Any = llama()
    ia.attach(model, Alora(INVOCATION, rank=3), "*q_proj")
    stir(model)
    ia.save(model, tmp_path / "ours")

    class Base:
        pass

    base: Any = Base()
    base.model = llama()
    conversions.convert(tmp_path / "ours", tmp_path / "out", "peft-lora", load=lambda _: base)
    assert read_peft(tmp_path / "out", llama()).method["name"] == "alora"
    with pytest.raises(ia.IntarsiaError, match="folds into no weight"):
        conversions.convert(tmp_path / "ours", tmp_path / "patch.safetensors", "weight-patch", load=lambda _: base)


@pytest.mark.parametrize("fields", [{"start_offset": 1}])
def test_what_peft_has_not_is_refused(tmp_path, fields):
    model = llama()
    ia.attach(model, Alora(INVOCATION, rank=3, **fields), "*q_proj")
    stir(model)
    with pytest.raises(ia.IntarsiaError, match="folds into no weight"):
        conversions.write_peft_lora(ia.export(model), llama(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_go_with_it_are_refused(tmp_path):
    saved(convolutions(), peft.LoraConfig(r=3, target_modules=["one", "two"]), tmp_path / "one")
    file = tmp_path / "one" / "adapter_config.json"
    plain = json.loads(file.read_text())
    for more, said in (({"use_dora": True}, "with use_dora"), ({}, "at a layer of the kind conv")):
        file.write_text(json.dumps(plain | {"alora_invocation_tokens": [1]} | more))
        with pytest.raises(ia.IntarsiaError, match=said):
            read_peft(tmp_path / "one", convolutions())
