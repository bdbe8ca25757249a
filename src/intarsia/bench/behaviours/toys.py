"""The small problems that behaviours look at: a layer that is to become another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.method import Method


def fit(
    method: Method,
    target: Tensor,
    *,
    W: Tensor | None = None,
    lr: float = 1e-2,
    steps: int = 400,
    seed: int = 0,
    **given: Any,
) -> float:
    """||W' - (W + target)|| / ||target|| after training on ||W' x - (W + target) x||^2, x random.

    Args:
        target: (O, I), the change that is to be learned.
        W: (O, I), what the layer holds; random by default.
        lr: of Adam; it falls linearly to 0.
        given: further arguments of :func:`intarsia.attach`, such as data.
    """
    rows, columns = target.shape
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=False)
    net = nn.Sequential(layer)
    with torch.no_grad():
        start = torch.randn(rows, columns, generator=generator) / columns**0.5 if W is None else W
        layer.weight.copy_(start)
    models.attach(net, method, "0", seed=seed, **given)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    wanted = (start + target).to(layer.weight.dtype)
    for _ in range(steps):
        x = torch.randn(256, columns, generator=generator).to(wanted.dtype)
        optimizer.zero_grad()
        (net(x) - x @ wanted.T).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = net.eval()(torch.eye(columns, dtype=wanted.dtype)).T
    return float((found - wanted).norm() / target.norm())
