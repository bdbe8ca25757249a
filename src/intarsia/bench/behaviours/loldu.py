"""LoLDU: a handful of numbers in the layers below, beside a trained head, and what they gain over the head alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.method import Method
from intarsia.methods.loldu import Loldu
from intarsia.methods.lora import Lora

WIDTH, CLASSES = 64, 8


def _net(generator: torch.Generator) -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)
    return net


def _accuracy(method: Method | None, x: Tensor, labels: Tensor, lr: float = 1e-2) -> float:
    """On the second half, after training on the first: the head, and the adapter on the layers below."""
    net = _net(torch.Generator().manual_seed(1))
    if method is not None:
        models.attach(net, method, ["0", "2"])
    groups = [
        {"params": [p for name, p in net.named_parameters() if ".adapters." in name], "lr": lr},
        {"params": list(net[4].parameters()), "lr": 1e-2},
    ]  # fmt: skip
    net[4].requires_grad_(True)
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    half = len(x) // 2
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:half]), labels[:half]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((net(x[half:]).argmax(-1) == labels[half:]).float().mean())


@behaviour("loldu", "beats a trained head alone with a hundredth of the numbers that LoRA trains")
def head() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, WIDTH, generator=generator)
    teacher = _net(torch.Generator().manual_seed(1))  # the same layers, their weights' directions weighed otherwise
    with torch.no_grad():
        for number in (0, 2):
            W = teacher[number].get_parameter("weight")
            W.mul_(1 + 1.5 * torch.randn(W.shape[0], 1, generator=generator))
        labels = teacher(x).argmax(-1)
    alone, loldu = (_accuracy(method, x, labels) for method in (None, Loldu(WIDTH)))
    counts = [method.trained_count((768, 768)) for method in (Loldu(64), Lora(8))]
    return [
        Seen("accuracy, held out", "head and loldu r=64", loldu, "head alone", alone, "higher"),
        Seen("numbers a 768 x 768 weight", "loldu r=64", counts[0], "lora r=8, a hundredth", counts[1] / 100, "lower"),
    ]
