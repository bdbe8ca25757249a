"""HF PEFT as the judge: adapters that it saves, and what it makes of folders."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from small import small_net

SEED = 3


def plain_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Three Linear layers."""
    return small_net(dtype)


def gpt2(dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    """Conv1D layers, and an embedding that has its weight for itself unless ``tied``."""
    torch.manual_seed(SEED)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    model: nn.Module = GPT2LMHeadModel(config).to(dtype).eval()
    return model


def llama(dtype: torch.dtype = torch.float32, tied: bool = True) -> nn.Module:
    """A Llama whose head shares the embedding's weight."""
    torch.manual_seed(SEED)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).to(dtype).eval()
    return model


class Convolutions(nn.Module):
    """One of each plain kind, and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(4, 6, (3, 2), stride=2)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(x)
        return y


def convolutions(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Convolutions of one and two dimensions."""
    torch.manual_seed(SEED)
    return Convolutions().to(dtype)


def quietly(call: Any, *given: Any, **named: Any) -> Any:
    """PEFT warns of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*given, **named)


def saved(model: nn.Module, config: Any, folder: Path) -> Any:
    """An adapter with random numbers in every tensor, saved by PEFT. -> the PEFT model."""
    theirs = quietly(peft.get_peft_model, copy.deepcopy(model), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if parameter.ndim == 1 or parameter.shape[0] == 1:  # a magnitude or values, far from 0
                parameter.add_(1.0)
    quietly(theirs.save_pretrained, folder)
    return theirs


def merged(theirs: Any) -> dict[str, Tensor]:
    """What PEFT's own merge makes of the weights, by their names in the base."""
    with torch.sparse.check_sparse_tensor_invariants(False):
        whole = quietly(theirs.merge_and_unload)
    return {name: weight.detach() for name, weight in whole.named_parameters()}


def loaded(model: nn.Module, folder: Path) -> Any:
    """A folder as PEFT loads it; anything missing or unexpected in it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|nexpected|not found).*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder, autocast_adapter_dtype=False)
