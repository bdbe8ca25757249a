"""SMoRA between two tasks that ask for different changes of one layer. A token's first entries say which task it belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.edits import Routed
from intarsia.method import Method
from intarsia.methods.lora import Lora
from intarsia.methods.smora import Smora

WIDTH, MARKS, RANK = 32, 4, 4  # marks: entries that are +1 in one task and -1 in the other


def _tokens(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(x (count, WIDTH), task (count,) of 0 and 1)."""
    x, task = torch.randn(count, WIDTH, generator=generator), torch.randint(2, (count,), generator=generator)
    x[:, :MARKS] = (2.0 * task - 1)[:, None]
    return x, task


def _left(method: Method, targets: Tensor, steps: int = 1500) -> tuple[float, Any]:
    """(relative error on fresh tokens, the trained net). targets (2, WIDTH, WIDTH): what each task adds to the layer."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
    net, W = nn.Sequential(layer), layer.weight.detach().clone()
    models.attach(net, method, "0")
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def added(x: Tensor, task: Tensor) -> Tensor:
        return torch.einsum("noi,ni->no", targets[task], x)

    for _ in range(steps):
        x, task = _tokens(256, generator)
        optimizer.zero_grad()
        (net(x) - x @ W.T - added(x, task)).square().mean().backward()
        optimizer.step()
        schedule.step()
    x, task = _tokens(2048, generator)
    with torch.no_grad():
        wanted = added(x, task)
        return float((net.eval()(x) - x @ W.T - wanted).norm() / wanted.norm()), net


def _overlap(net: Any, active: int) -> float:
    """Jaccard index of the ranks that each task uses most, ``active`` of them each."""
    (state,) = models.states(net, "default").values()
    x, task = _tokens(2048, torch.Generator().manual_seed(9))
    with torch.no_grad():
        g: Any = state.method.inserted(state.raw())  # type: ignore[attr-defined]
        assert isinstance(g, Routed)
        _, which = g.route(x)
    most = [set(which[task == t].flatten().bincount(minlength=len(g.b)).topk(active).indices.tolist()) for t in (0, 1)]
    return len(most[0] & most[1]) / len(most[0] | most[1])


@behaviour(
    "smora",
    "learns two conflicting tasks with few active ranks, where LoRA of as many or of all ranks makes a compromise",
)
def conflict() -> list[Seen]:
    generator = torch.Generator().manual_seed(1)
    own = [
        torch.randn(WIDTH, RANK, generator=generator) @ torch.randn(RANK, WIDTH, generator=generator) for _ in range(2)
    ]
    targets = torch.stack(own) / (RANK * WIDTH) ** 0.5
    targets[:, :, :MARKS] = 0.0
    error, net = _left(Smora(16, 4), targets)
    few, all_of_them = (_left(Lora(rank), targets)[0] for rank in (4, 16))
    # Two sets of 4 of 16, drawn at random, share one on average; their Jaccard index is 0.15.
    return [
        Seen("relative error", "smora r=16, k=4", error, "lora r=4", few, "lower"),
        Seen("relative error", "smora r=16, k=4", error, "lora r=16", all_of_them, "lower"),
        Seen(
            "Jaccard of the 4 ranks each task uses most",
            "smora r=16, k=4",
            _overlap(net, 4),
            "sets at random",
            0.15,
            "lower",
        ),
    ]
