"""LoRA+ on a wide layer between two fixed ones: steps to a loss with B faster than A, and with one rate, each at its best rate."""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour

WIDTH, RANK, INPUTS, ROWS, STEPS, LOSS = 1024, 4, 5, 256, 120, 0.1


def steps(ratio: float, lr: float) -> float:
    """Of Adam on the pair of a hidden layer of random weights, until it fits a small random net to LOSS of its variance."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, teacher, out = normal(ROWS, INPUTS), normal(64, INPUTS) / INPUTS**0.5, normal(64) / 8
    y = (x @ teacher.T).relu() @ out
    y = (y - y.mean()) / y.std()
    V, W, a = normal(WIDTH, INPUTS) / INPUTS**0.5, normal(WIDTH, WIDTH) / WIDTH**0.5, normal(WIDTH) / WIDTH**0.5
    u = (x @ V.T).relu()
    base = u @ W.T
    A, B = (normal(RANK, WIDTH) / WIDTH**0.5).requires_grad_(), torch.zeros(WIDTH, RANK, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [A], "lr": lr}, {"params": [B], "lr": ratio * lr}])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = ((base + u @ A.T @ B.T).relu() @ a - y).square().mean()
        if loss.item() < LOSS:
            return step
        loss.backward()
        optimizer.step()
    return STEPS


@behaviour(
    "lora-plus", "at width 1024 and rank 4, needs fewer steps than one rate for both factors, each at its best rate"
)
def width() -> list[Seen]:
    grid = {1.0: (2e-3, 4e-3, 8e-3), 4.0: (2e-3, 4e-3), 16.0: (1e-3, 1.5e-3, 2e-3)}
    best = {ratio: min(steps(ratio, lr) for lr in rates) for ratio, rates in grid.items()}
    return [
        Seen(f"steps to a loss of {LOSS}", f"ratio {ratio:g}", best[ratio], "ratio 1", best[1.0], "lower")
        for ratio in (4.0, 16.0)
    ]
