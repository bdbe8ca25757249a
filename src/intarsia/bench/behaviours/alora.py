"""aLoRA and the base's cache: what is computed upon it must be what a forward over everything gives. Time: bench/first_token.py."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.method import Method
from intarsia.methods.alora import Alora
from intarsia.methods.lora import Lora

PREFIX, INVOCATION, REST = 200, (3, 5), 20


def _llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip
        return LlamaForCausalLM(config).eval()


def _off(method: Method) -> float:
    """The largest difference of a logit after the invocation: on the base's cache, against a forward over all tokens."""
    base, model, generator = _llama(), _llama(), torch.Generator().manual_seed(1)
    models.attach(model, method, ["*q_proj", "*k_proj", "*v_proj"])
    ids = torch.randint(10, 512, (1, PREFIX + len(INVOCATION) + REST), generator=generator)
    ids[0, PREFIX : PREFIX + len(INVOCATION)] = torch.tensor(INVOCATION)
    with torch.no_grad():
        for state in models.states(model, "default").values():
            for tensor in state.parameters():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        cache = base(ids[:, :PREFIX], past_key_values=DynamicCache()).past_key_values
        upon = model(ids[:, PREFIX:], past_key_values=cache).logits
        return float((upon - model(ids).logits[:, PREFIX:]).abs().max())


@behaviour("alora", "goes on upon a cache that the base has filled, where LoRA's answers change")
def cache() -> list[Seen]:
    what = "largest difference of a logit, base's cache against all anew"
    found, lora = _off(Alora(INVOCATION, rank=8)), _off(Lora(8))
    return [Seen(what, "alora", found, "rounding", 1e-4, "lower"), Seen(what, "alora", found, "lora", lora, "lower")]
