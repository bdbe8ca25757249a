"""DyLoRA and the rank that is chosen after training: its prefixes against those of an ordinary LoRA.

Its whole is no match for a LoRA of that rank alone: under a factor of alpha / b the first rank counts eight times as much alone as among
eight, so that no factors are best at every rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.edits import LowRank
from intarsia.method import Method
from intarsia.methods.dylora import Dylora
from intarsia.methods.lora import Lora

WIDTH, RANK, STEPS = 32, 8, 1000


@behaviour(
    "dylora", "one training gives an adapter of every rank, where a LoRA cut off after its first ranks is of no use"
)
def prefixes() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q for _ in range(2))
    change = U @ torch.diag(1.5 * 0.75 ** torch.arange(WIDTH)) @ V.T
    whole: Method = Dylora(RANK)
    nested, plain = _trained(whole, change), _trained(Lora(RANK), change)
    errors = [_error(whole.prefix(nested, b), change) for b in (1, 2, 4, 8)]
    cut = [_error(replace(plain, B=plain.B[:, :b], A=plain.A[:b]), change) for b in (1, 2, 4, 8)]
    what = "relative error, rank"
    found = [
        Seen(f"{what} {b}", "dylora", errors[i], "lora r=8 cut off", cut[i], "lower") for i, b in enumerate((1, 2, 4))
    ]
    found += [
        Seen(f"{what} {2 * b}", "dylora", errors[i + 1], f"its rank {b}", errors[i], "lower")
        for i, b in enumerate((1, 2, 4))
    ]
    return [*found, Seen(f"{what} 8", "dylora", errors[3], "1.1 of lora r=8", 1.1 * cut[3], "lower")]


def _trained(method: Method, change: Tensor) -> LowRank:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    net = nn.Sequential(layer)
    models.attach(net, method, "0")
    nn.init.zeros_(layer.weight)
    wanted = layer.weight.detach() + change
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for _ in range(STEPS):
        x = torch.randn(64, WIDTH, generator=generator)
        optimizer.zero_grad()
        (net(x) - x @ wanted.T).square().mean().backward()
        optimizer.step()
        schedule.step()
    edit = models.export(net).edits["0.weight"]
    assert isinstance(edit, LowRank)
    return edit


def _error(edit: object, change: Tensor) -> float:
    assert isinstance(edit, LowRank)
    return float((edit.delta(torch.zeros_like(change)) - change).norm() / change.norm())
