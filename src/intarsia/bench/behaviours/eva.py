"""EVA: how fast a small net learns when LoRA starts in the directions of its inputs, against five random starts."""

from __future__ import annotations

import torch
from torch import nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.method import Method
from intarsia.methods.eva import Eva
from intarsia.methods.lora import Lora

WIDTH, STEPS, RANK = 64, 50, 4


@behaviour("eva", "learns faster than LoRA's random starts, at the same learning rate and as many ranks in all")
def speed() -> list[Seen]:
    eva = _loss(Eva(rank=RANK), 0)
    random = [_loss(Lora(rank=RANK), seed) for seed in range(5)]
    return [
        Seen("loss after 50 steps", "eva", eva, "lora, mean of 5 seeds", sum(random) / len(random), "lower"),
        Seen("loss after 50 steps", "eva", eva, "lora, the best of 5 seeds", min(random), "lower"),
    ]


def _loss(method: Method, seed: int) -> float:
    """Of a net of three layers that is to become a neighbour of its own, on inputs that lie near a few directions."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    net, other = (nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))) for _ in range(2))
    mixing = drawn(WIDTH, WIDTH) * torch.logspace(0, -1.5, WIDTH)[:, None]
    with torch.no_grad():
        for weight, moved in zip(net.parameters(), other.parameters(), strict=True):
            weight.copy_(drawn(WIDTH, WIDTH) / WIDTH**0.5)
            moved.copy_(weight + 0.3 * drawn(WIDTH, WIDTH) / WIDTH**0.5)
    data = [drawn(256, WIDTH) @ mixing for _ in range(4)]
    models.attach(net, method, seed=seed, data=data, loss=lambda m, x: m(x).sum())
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=4e-3)
    loss = torch.tensor(0.0)
    for step in range(STEPS + 1):
        x = data[step % len(data)]
        loss = (net(x) - other(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)
