"""S2-LoRA: many layers whose changes have something in common, at the count of numbers that LoRA of rank 1 trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.method import Method
from intarsia.methods.lora import Lora
from intarsia.methods.s2_lora import S2Lora

LAYERS, WIDTH, DIRECTIONS = 16, 32, 10


def _fit(method: Method, targets: list[Tensor], lr: float) -> tuple[float, nn.Module]:
    """The relative error over all layers after training each on its own regression, and the net."""
    generator = torch.Generator().manual_seed(1)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    net = nn.ModuleList(layers)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
    wanted = [layer.weight.detach() + target for layer, target in zip(layers, targets, strict=True)]
    models.attach(net, method)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 400)
    for _ in range(400):
        x = torch.randn(64, WIDTH, generator=generator)
        optimizer.zero_grad()
        torch.stack(
            [(layer(x) - x @ W.T).square().mean() for layer, W in zip(layers, wanted, strict=True)]
        ).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = [layer(torch.eye(WIDTH)).T for layer in layers]
    lost = sum(float((one - W).square().sum()) for one, W in zip(found, wanted, strict=True))
    return (lost / sum(float(target.square().sum()) for target in targets)) ** 0.5, net


@behaviour(
    "s2-lora", "fits changes along common directions better than LoRA of as many numbers; layers keep unlike ranks"
)
def common() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    P, Q = (torch.randn(WIDTH, DIRECTIONS, generator=generator) / WIDTH**0.5 for _ in range(2))
    targets = []
    for layer in range(LAYERS):  # each takes some of ten common directions, a later layer more of them
        lam = torch.randn(DIRECTIONS, generator=generator)
        lam[torch.randperm(DIRECTIONS, generator=generator)[1 + layer // 3 :]] = 0
        targets.append((P * lam) @ Q.T)
    method = S2Lora(12, orthogonal=0.01, sparse=0.3)
    shape = (WIDTH, WIDTH)
    count = LAYERS * method.trained_count(shape) + method.shared_count(shape)
    (shared, net), (lora, _) = _fit(method, targets, 1e-2), _fit(Lora(1), targets, 1e-2)
    ranks = [int((state.get_parameter("C") != 0).sum()) for state in models.states(net, "default").values()]
    half = LAYERS // 2
    low, high = sum(ranks[:half]) / half, sum(ranks[half:]) / half
    return [
        Seen("relative error", f"s2-lora r=12, {count} numbers", shared, f"lora r=1, {LAYERS * Lora(1).trained_count(shape)}", lora, "lower"),
        Seen("mean rank of the layers that need more", "the later half", high, "the earlier half", low, "higher"),
    ]  # fmt: skip
