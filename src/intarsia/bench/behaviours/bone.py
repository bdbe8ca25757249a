"""Bone and BAT: what they can fit, and how quickly they begin.

The claim of the paper is a lower loss early in training at as many numbers as LoRA. It is looked at on a small net of two layers that is to
become another one: dense changes of both layers, a hundred steps of Adam, each method at the best of four rates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.edits import BlockAffine
from intarsia.method import Method
from intarsia.methods.bone import Bone
from intarsia.methods.lora import Lora

WIDTH = 64
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@behaviour(
    "bone", "BAT passes its side in rank, and Bone fits in a quarter of LoRA's numbers what repeats along the inputs"
)
def structure() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(32, 32, generator=generator) / 32**0.5
    tile = torch.randn(32, 4, generator=generator).repeat(1, 8) / 32**0.5
    blocks = BlockAffine((32, 32), 0.3 * torch.randn(8, 4, 4, generator=generator)).delta(W)
    return [
        Seen("relative error, a tile along the inputs", "bone r=4", fit(Bone(4), tile, W=W), "0.05", 0.05, "lower"),
        Seen(
            "relative error, BAT's own kind of change", "bat r=4", fit(Bone(4, variant="bat"), blocks, W=W),
            "lora r=4, twice the numbers", fit(Lora(4), blocks, W=W), "lower",
        ),
    ]  # fmt: skip


@behaviour("bone", "has a lower loss early in training than LoRA of as many numbers")
def early() -> list[Seen]:
    lora, bone, bat = (_best(method) for method in (Lora(4), Bone(8), Bone(8, variant="bat")))
    return [
        Seen(
            f"loss after {steps} steps, best of {len(RATES)} rates", who, found[steps], "lora r=4", lora[steps], "lower"
        )
        for steps in (10, 30, 100)
        for who, found in (("bone r=8", bone), ("bat r=8", bat))
    ]


def _best(method: Method) -> dict[int, float]:
    runs = [_run(method, rate) for rate in RATES]
    return {steps: min(run[steps] for run in runs) for steps in (10, 30, 100)}


def _run(method: Method, rate: float) -> dict[int, float]:
    generator = torch.Generator().manual_seed(1)
    net, other = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
    with torch.no_grad():
        for mine, its in zip(net.parameters(), other.parameters(), strict=True):
            mine.copy_(torch.randn(mine.shape, generator=generator) / WIDTH**0.5)
            its.copy_(mine + 0.3 * torch.randn(mine.shape, generator=generator) / WIDTH**0.5 * (mine.ndim > 1))
    models.attach(net, method, ["0", "2"])
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=rate)
    test, found = torch.randn(1024, WIDTH, generator=generator), {}
    for step in range(1, 101):
        x = torch.randn(64, WIDTH, generator=generator)
        optimizer.zero_grad()
        _loss(net, other, x).backward()
        optimizer.step()
        if step in (10, 30, 100):
            with torch.no_grad():
                found[step] = float(_loss(net, other, test))
    return found


def _loss(net: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = other(x)
    loss: Tensor = (net(x) - wanted).square().mean()
    return loss
