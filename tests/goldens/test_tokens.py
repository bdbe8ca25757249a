"""Trainable tokens and LoRA on layers that are no Linear: the same weights in HF PEFT give the same numbers."""

from __future__ import annotations

import functools
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import intarsia as ia
from intarsia.methods import Tokens
from small import state_of, stir, trained

# PEFT 0.21 asks transformers models in a way that transformers 5 warns of; to go with a PEFT that does not.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_tokens_equal_peft(tied, tiny_llama):
    """Output, gradient and the weight after steps of SGD, also where the head shares the embedding."""
    chosen, x = [7, 300, 319], torch.tensor([[5, 300, 7, 7, 11], [319, 1, 2, 300, 0]])
    model, theirs = tiny_llama(tie_word_embeddings=tied), tiny_llama(tie_word_embeddings=tied)
    ia.attach(model, Tokens(chosen), "embed_tokens")
    other: Any = peft.get_peft_model(
        theirs, peft.TrainableTokensConfig(token_indices=chosen, target_modules=["embed_tokens"])
    )
    assert sum(p.numel() for p in trained(model)) == sum(p.numel() for p in trained(other)) == 3 * 64
    pair = [(m, torch.optim.SGD(trained(m), lr=0.5)) for m in (model, other)]
    for _ in range(3):
        losses = []
        for each, optimizer in pair:
            optimizer.zero_grad()
            losses.append(each(input_ids=x, labels=x).loss)
            losses[-1].backward()
            optimizer.step()
        close(losses[0], losses[1])
    merged = other.merge_and_unload()
    close(model.model.embed_tokens.weight, merged.model.embed_tokens.weight)
    assert not torch.equal(
        model.model.embed_tokens.weight, tiny_llama(tie_word_embeddings=tied).model.embed_tokens.weight
    )


def test_new_tokens_of_a_resized_vocabulary_train_alone(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    model.resize_token_embeddings(322, mean_resizing=False)
    before = model.model.embed_tokens.weight.detach().clone()
    ia.attach(model, Tokens([320, 321]), "embed_tokens")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    x = torch.tensor([[320, 5, 321, 9]])
    first = model(input_ids=x, labels=x).loss
    for _ in range(10):
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    assert model(input_ids=x, labels=x).loss < first
    assert torch.equal(model.model.embed_tokens.weight[:320], before[:320])
    with pytest.raises(ia.IntarsiaError, match="there is no token 322 among its 322 inputs; resize"):
        ia.attach(model, Tokens([322]), "embed_tokens", name="b")


def test_a_head_of_its_own_is_a_second_adapter(tiny_llama):
    model, x = tiny_llama(), torch.tensor([[5, 300, 7]])
    base = tiny_llama().state_dict()
    ia.attach(model, Tokens([300]), "embed_tokens", name="in")
    ia.attach(model, Tokens([300], side="outputs"), "lm_head", name="out")
    ia.activate(model, "in", "out")
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (model.get_parameter(name) - base[name]).abs().sum(1).nonzero().squeeze(1)
        assert moved.tolist() == [300]


def _lora_peft(model: nn.Module, target: str) -> Any:
    return peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=[target], init_lora_weights=False)
    )


def _compare(model: Any, other: Any, site: str, names: tuple[str, str], x: Any) -> None:
    state = state_of(model, site)
    theirs = dict(other.named_parameters())
    prefix = f"base_model.model.{site}."
    pairs = [(state.A, theirs[prefix + names[0]]), (state.B, theirs[prefix + names[1]])]
    with torch.no_grad():
        for ours, their in pairs:
            their.copy_(ours.view(their.shape))

    def loss(m: nn.Module) -> Any:
        y: Any = m(x)
        y = getattr(y, "logits", y)
        return (y - 0.3).square().mean(), y

    (ours_loss, ours_y), (their_loss, their_y) = loss(model), loss(other)
    close(ours_y, their_y)
    ours_loss.backward()
    their_loss.backward()
    for ours, their in pairs:
        close(ours.grad, their.grad.view(ours.shape))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_lora_on_conv1d_of_transformers_equals_peft():
    def gpt2() -> Any:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=48, n_positions=32, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()

    model = gpt2()
    ia.attach(model, ia.Lora(3, alpha=5.0), "c_attn")
    stir(model)
    names = ("lora_A.default.weight", "lora_B.default.weight")
    _compare(model, _lora_peft(gpt2(), "c_attn"), "transformer.h.0.attn.c_attn", names, torch.tensor([[5, 9, 2]]))


@pytest.mark.parametrize(
    "layer", [lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), lambda: nn.Conv1d(4, 8, 2, stride=2)], ids=["2d", "1d"]
)
def test_lora_on_convolutions_equals_peft(layer):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(layer(), nn.Tanh())

    model = net()
    ia.attach(model, ia.Lora(3, alpha=5.0), "0")
    stir(model)
    x = torch.randn(2, 4, 6, 6) if isinstance(net()[0], nn.Conv2d) else torch.randn(2, 4, 9)  # type: ignore[index]
    _compare(model, _lora_peft(net(), "0"), "0", ("lora_A.default.weight", "lora_B.default.weight"), x)


def test_lora_on_an_embedding_equals_peft():
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 8), nn.Tanh())

    model = net()
    ia.attach(model, ia.Lora(3, alpha=5.0), "0")
    stir(model)
    x = torch.tensor([[1, 4, 1], [19, 0, 4]])
    _compare(model, _lora_peft(net(), "0"), "0", ("lora_embedding_A.default", "lora_embedding_B.default"), x)
