"""The models that training is timed on: Llama-style ones of random weights, by size, or any model by name."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from intarsia.errors import IntarsiaError, nearest


@dataclass(frozen=True)
class Size:
    """The shape of a Llama-style model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int = 8192

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, {self.layers} layers, {self.heads} heads, {self.kv_heads} of them for keys, "
            f"MLP {self.mlp}, {self.vocabulary} tokens"
        )


SIZES = {
    "tiny": Size(64, 2, 4, 2, 128, 320),
    "47m": Size(576, 12, 9, 3, 1536),
    "135m": Size(576, 30, 9, 3, 1536, 49152),  # SmolLM2-135M
    "360m": Size(960, 32, 15, 5, 2560, 49152),  # SmolLM2-360M
    "1b": Size(2048, 16, 32, 8, 8192, 128256),  # Llama 3.2 1B
    "3b": Size(3072, 28, 24, 8, 8192, 128256),  # Llama 3.2 3B
    "8b": Size(4096, 32, 32, 8, 14336, 128256),  # Llama 3.1 8B
}


def size_of(name: str) -> Size:
    """A size by name. Raises IntarsiaError for an unknown one, with the nearest."""
    if name.lower() not in SIZES:
        raise IntarsiaError(f"no size {name!r}; {nearest(name.lower(), SIZES)}")
    return SIZES[name.lower()]


def random_llama(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A Llama of random weights, made on the device; the same seed gives the same weights there."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=131072,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return ready(model)


def ready(model: Any) -> Any:
    """In training mode, without the cache that only generation needs."""
    model.config.use_cache = False
    return model.train()


def twin(model: nn.Module) -> nn.Module:
    """The same model once more, in modules of its own around the very same parameters and buffers."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)
