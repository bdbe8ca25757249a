"""Bottleneck adapters: a correction that bends, which no change of a weight can be, and one that does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.method import Method
from intarsia.methods import Bottleneck, Lora


def _left(method: Method, wanted: Tensor, up: Tensor, bends: bool) -> float:
    """What is left of a correction up phi(wanted x) after 600 steps, as a share of its mean square."""
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 16, generator=generator) / 4)
    net = nn.Sequential(layer)
    models.attach(net, method, "0")
    W = layer.weight.detach().clone()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)

    def loss() -> tuple[Tensor, Tensor]:
        x = torch.randn(256, 16, generator=generator)
        inner = x @ wanted.T
        correction = (inner.tanh() if bends else inner) @ up.T
        return (net(x) - x @ W.T - correction).square().mean(), correction.square().mean()

    for _ in range(600):
        optimizer.zero_grad()
        loss()[0].backward()
        optimizer.step()
    with torch.no_grad():
        error, size = loss()
    return float(error / size)


@behaviour(
    "bottleneck",
    "learns a correction that bends, which LoRA of as many numbers cannot; on a linear one LoRA is no worse",
)
def bent() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    wanted, up = torch.randn(4, 16, generator=generator), torch.randn(16, 4, generator=generator)
    bends, linear = (
        {kind: _left(method, wanted, up, curve) for kind, method in (("b", Bottleneck(4)), ("l", Lora(4)))}
        for curve in (True, False)
    )
    return [
        Seen("share of a bent correction left", "bottleneck b=4", bends["b"], "lora r=4", bends["l"], "lower"),
        Seen("share of a linear correction left", "lora r=4", linear["l"], "bottleneck b=4", linear["b"], "lower"),
    ]
