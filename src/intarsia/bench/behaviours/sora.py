"""SoRA and a change of rank 2: of 8 ranks those that are not needed are 0 in the end, and the loss is that of a LoRA of the right rank."""

from __future__ import annotations

import torch
from torch import nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.method import Method
from intarsia.methods.lora import Lora
from intarsia.methods.sora import Sora

ROWS, COLUMNS, NOISE, STEPS = 32, 32, 0.1, 600


@behaviour("sora", "keeps about as many of 8 ranks as a change of rank 2 needs, and fits as well as LoRA of rank 2")
def ranks() -> list[Seen]:
    left, loss = _fit(Sora(8))
    _, other = _fit(Lora(2))
    return [
        Seen("ranks left of 8", "sora", left, "twice what is needed", 4.5, "lower"),
        Seen("ranks left of 8", "sora", left, "less than what is needed", 1.5, "higher"),
        Seen("held-out loss", "sora r=8", loss, "lora r=2, and 5 %", 1.05 * other, "lower"),
    ]


def _fit(method: Method) -> tuple[int, float]:
    """(ranks of the edit, held-out loss) after training towards W + a change of rank 2, with noise on the labels."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    net = nn.Sequential(layer)
    W = torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS**0.5
    change = torch.randn(ROWS, 2, generator=generator) @ torch.randn(2, COLUMNS, generator=generator) / 8
    with torch.no_grad():
        layer.weight.copy_(W)
    models.attach(net, method, "0")
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)

    def loss(rows: int) -> torch.Tensor:
        x = torch.randn(rows, COLUMNS, generator=generator)
        y = x @ (W + change).T + NOISE * torch.randn(rows, ROWS, generator=generator)
        found: torch.Tensor = (net(x) - y).square().mean()
        return found

    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(128).backward()
        optimizer.step()
        schedule.step()
    edit = models.export(net).edits["0.weight"]
    with torch.no_grad():
        return len(edit.tensors()["A"]), float(loss(8192))
