"""Bytes kept for backward on a 12-layer Llama-style model, all linears: ours, HF PEFT, full fine-tuning, the frozen floor.

    python bench/kept.py [--json bench/results/kept.json]

Counted are the storages that autograd saves in one forward pass, each once, without those of parameters and buffers.
The floor is a frozen base whose gradient still flows to the bottom: no method can keep less.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from runs import machine
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import intarsia as ia

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    """47 M weights in the shape of SmolLM2: hidden 576, 12 layers, 9 heads, 3 of them for keys, MLP 1536."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config)


def kept_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """What one forward pass keeps for its backward pass, in bytes."""
    resident = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}  # the storage itself too, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        dense = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        for storage in (t.untyped_storage() for t in dense):
            if storage.data_ptr() not in resident:
                kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(size for size, _ in kept.values())
    loss.backward()
    return total


def frozen(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # type: ignore[operator, union-attr]
    return model


def subjects() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Name -> what makes the model of it."""

    def ours(method: ia.Method) -> Callable[[nn.Module], nn.Module]:
        def make(model: nn.Module) -> nn.Module:
            batch = torch.randint(0, 8192, (2, 32), generator=torch.Generator().manual_seed(1))
            ia.attach(model, method, data=[{"input_ids": batch, "labels": batch}])
            return model

        return make

    def theirs(config: peft.PeftConfig) -> Callable[[nn.Module], nn.Module]:
        return lambda model: peft.get_peft_model(model, config)

    return {
        "floor": frozen,
        "full fine-tuning": lambda model: model,
        "PEFT LoRA r16": theirs(peft.LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS)),
        "PEFT SHiRA r16": theirs(peft.ShiraConfig(r=16, target_modules=LAYERS)),
        "LoRA r16": ours(ia.Lora(16, 32.0)),
        "SHiRA 4.6 % random": ours(ia.Shira(density=0.046)),
        "SHiRA 4.6 % snip": ours(ia.Shira(density=0.046, scorer="snip")),
        "SHiRA 1 % random": ours(ia.Shira(density=0.01)),
        "PaCA r29": ours(ia.Paca(29)),
        "DoRA of LoRA r16": ours(ia.Dora(ia.Lora(16, 32.0))),
        "PEFT DoRA r16": theirs(peft.LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, use_dora=True)),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="write the rows to this file as well")
    given = arguments.parse_args()
    rows = []
    base = llama()
    ids = torch.randint(0, 8192, (2, 256), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        found = {}
        for name, make in subjects().items():
            model = make(copy.deepcopy(base).to(dtype))
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            found[name] = (kept_bytes(model, ids), trained)
        reference = found["PEFT LoRA r16"][0]
        print(f"\n{dtype}   {'kept':>12} {'vs PEFT LoRA':>13} {'trained':>12}")
        for name, (size, trained) in found.items():
            print(f"{name:22} {size / 2**20:8.1f} MiB {size / reference:12.3f}x {trained:12,}")
            row = {"subject": name, "against": "PEFT LoRA r16", "dtype": str(dtype).removeprefix("torch.")}
            rows.append(
                row | {"model": "llama-47m, 2 x 256", "trained": trained, "bytes": size, "ratio": size / reference}
            )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(machine() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
