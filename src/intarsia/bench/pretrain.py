"""A small pre-training: a Llama of bytes from scratch on the documentation that every Python brings along, by several optimizers.

What is compared is the loss on the text's last tenth after a number of steps, against the bytes of optimizer state. The rate of
each contender is the best of a coarse grid on the same run (``bench/pretrain.py --rates``), and the state is that of all tensors,
embeddings and norms too, which every contender trains by Adam.
"""

from __future__ import annotations

import functools
import math
import pydoc_data.topics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.bench.models import Size, random_llama
from intarsia.methods import Lora
from intarsia.optim import build, parts, state_bytes

SMALL = Size(hidden=64, layers=2, heads=4, kv_heads=4, mlp=172, vocabulary=256)

REST_LR = 1e-2  # of what no contender treats otherwise than Adam


@dataclass(frozen=True)
class Contender:
    """An optimizer by its config, at a learning rate; ``lora`` > 0: the weights stay as they fell, and LoRA of that rank is trained."""

    name: str
    optimizer: Mapping[str, Any] | None  # None: torch's AdamW
    lr: float
    lora: int = 0


# Ranks and densities for about one size of state: 2 r max + r min numbers of a matrix, and 2 rho m n.
CONTENDERS = (
    Contender("AdamW", None, 3e-3),
    Contender("GaLore r=8", {"name": "galore", "rank": 8, "gap": 50}, 4e-2),
    Contender("Fira r=8", {"name": "fira", "rank": 8, "gap": 50}, 1e-2),
    Contender("FRUGAL rho=0.25", {"name": "frugal", "density": 0.25, "gap": 50}, 3e-3),
    Contender("FRUGAL rho=0", {"name": "frugal", "density": 0.0}, 3e-3),
    Contender(
        "BAdam rho=0.25", {"name": "frugal", "density": 0.25, "gap": 50, "selector": "block", "rest": "none"}, 3e-3
    ),
    Contender("LoRA r=8", None, 1e-2, lora=8),
)


@dataclass(frozen=True)
class Outcome:
    """What a run came to. Losses are nats a byte."""

    name: str
    lr: float
    loss: float  # on the held-out tenth, at the end
    curve: tuple[tuple[int, float], ...]  # (step, held-out loss)
    state: int  # bytes of optimizer state
    seconds: float


def text() -> tuple[Tensor, Tensor]:
    """(nine tenths, the last tenth) of the topics of Python's own help, as bytes."""
    whole = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)).encode()
    ids = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def batches(ids: Tensor, steps: int, rows: int, length: int, seed: int = 0) -> Iterator[Tensor]:
    """Rows of bytes from places that the seed decides. (rows, length)"""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        places = torch.randint(0, len(ids) - length, (rows, 1), generator=generator)
        yield ids[places + torch.arange(length)]


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over all bytes but the first of each row."""
    found: Tensor = model(input_ids=ids, labels=ids).loss
    return found


def optimizer_of(contender: Contender, model: nn.Module) -> torch.optim.Optimizer:
    """Embeddings, norms and the head learn at one rate under all of them, so that what differs is how the matrices do."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for part in parts(model):
        matrix = not part.embedding and part.role in ("matrix", "up", "down")
        (matrices if matrix else others).append(part.parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "lr": REST_LR}]
    if contender.optimizer is None:
        return torch.optim.AdamW(groups, lr=contender.lr, weight_decay=0.0)
    groups[1]["project"] = False
    return build(contender.optimizer).build(groups, contender.lr)


def start(contender: Contender, size: Size = SMALL) -> nn.Module:
    """The model of random weights, the same for all; with LoRA on its matrices where the contender has it, the rest trained too."""
    model: nn.Module = random_llama(size, torch.float32, torch.device("cpu"))
    if contender.lora:
        matrices = {
            part.name.removesuffix(".weight") for part in parts(model) if part.role == "matrix" and not part.embedding
        }
        models.attach(model, Lora(contender.lora), sorted(matrices))
        for name, parameter in model.named_parameters():
            if "norm" in name or "embed" in name or "lm_head" in name:
                parameter.requires_grad_(True)
    return model


@functools.cache
def run(
    contender_name: str,
    lr: float | None = None,
    steps: int = 150,
    rows: int = 16,
    length: int = 64,
    every: int = 50,
    seed: int = 0,
) -> Outcome:
    """Train one contender. The rate rises over a tenth of the steps and falls as a cosine to a tenth. Deterministic on one machine."""
    contender = next(each for each in CONTENDERS if each.name == contender_name)
    contender = contender if lr is None else Contender(contender.name, contender.optimizer, lr, contender.lora)
    train, held_out = text()
    model, curve = start(contender), []
    optimizer = optimizer_of(contender, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_rate, steps=steps))
    begun = time.monotonic()
    for step, ids in enumerate(batches(train, steps, rows, length, seed), 1):
        optimizer.zero_grad()
        loss(model, ids).backward()
        torch.nn.utils.clip_grad_norm_([part.parameter for part in parts(model)], 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            curve.append((step, _held_out(model, held_out, length)))
    seconds = time.monotonic() - begun
    return Outcome(contender.name, contender.lr, curve[-1][1], tuple(curve), state_bytes(optimizer), seconds)


def _rate(step: int, steps: int) -> float:
    rising = max(1, steps // 10)
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@torch.no_grad()
def _held_out(model: nn.Module, ids: Tensor, length: int) -> float:
    rows = next(batches(ids, 1, 128, length, seed=1))
    return float(loss(model, rows))
