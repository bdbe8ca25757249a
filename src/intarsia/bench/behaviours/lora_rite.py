"""LoRA-RITE and a pair that is badly split, and one whose inputs are badly scaled: steps to a thousandth of the loss, each at its best rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.optim import LoraRite

STEPS = 600


def steps(start: tuple[Tensor, Tensor], target: Tensor, scales: Tensor, rite: bool, lr: float) -> float:
    """Steps until ||(B A - target) scales||^2 is a thousandth of what it was; at most :data:`STEPS`."""
    B, A = (nn.Parameter(t.clone()) for t in start)
    optimizer: torch.optim.Optimizer = torch.optim.Adam([B, A], lr=lr)
    if rite:
        optimizer = LoraRite([{"params": [B, A], "paired": True}], lr=lr)
    first = 0.0
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = ((B @ A - target) * scales).square().sum()
        first = first or loss.item()
        if loss.item() < 1e-3 * first:
            return step
        loss.backward()
        optimizer.step()
    return STEPS


def best(start: tuple[Tensor, Tensor], target: Tensor, scales: Tensor, rite: bool, rates: Sequence[float]) -> float:
    return min(steps(start, target, scales, rite, lr) for lr in rates)


@behaviour(
    "lora-rite", "needs fewer steps than Adam where a pair is badly split or its inputs are badly scaled, condition 1e3"
)
def conditioning() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target, B, A = normal(24, 4) @ normal(4, 24) / 10, normal(24, 4) / 24**0.5, normal(4, 24) / 24**0.5
    split = torch.logspace(-1.5, 1.5, 4, dtype=torch.float64)
    even, uneven = torch.ones(24, dtype=torch.float64), torch.logspace(0, -1.5, 24, dtype=torch.float64)
    problems = {
        "well split, even inputs": ((B, A), even),
        "badly split, even inputs": ((B * split, A / split[:, None]), even),
        "well split, uneven inputs": ((B, A), uneven),
    }
    rates = {True: (0.03, 0.1, 0.3), False: (3e-3, 0.01, 0.03, 0.1)}
    return [
        Seen(
            f"steps to 1e-3, {name}",
            "lora-rite",
            best(start, target, scales, True, rates[True]),
            "adam",
            best(start, target, scales, False, rates[False]),
            "lower",
        )
        for name, (start, scales) in problems.items()
    ]
