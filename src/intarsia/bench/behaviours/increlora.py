"""IncreLoRA and a net of which one branch has to change: where the rank goes, and what that is worth beside the same rank everywhere.

The orthogonality penalty weighs 0.01: the losses here are a hundredth of a language model's. At its default, 0.1, the fit is worse than LoRA's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.allocators import reallocate
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.method import Method
from intarsia.methods.increlora import Increlora
from intarsia.methods.lora import Lora

WIDTH, TARGET, STEPS, SEEDS = 24, 3, 400, 2


class _Branches(nn.Module):
    """Two nets of two layers, each on its own half of the input, added up."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        for branch in "ab":
            self.add_module(branch, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, dim=-1)
        y: Tensor = self.get_submodule("a")(one) + self.get_submodule("b")(other)
        return y


@behaviour(
    "increlora",
    "gives most of the rank to the branch that has to change, and fits better than the same rank everywhere",
)
def branches() -> list[Seen]:
    shares, losses, others = [], [], []
    for seed in range(SEEDS):
        counts, loss = _fit(Increlora(TARGET, top=1, cap=2 * TARGET, alpha=2.0 * TARGET, orthogonal=0.01), seed)
        shares.append(sum(R for site, R in counts.items() if site.startswith("a.")) / sum(counts.values()))
        losses.append(loss)
        others.append(_fit(Lora(TARGET), seed)[1])
    return [
        Seen(
            "share of the rank in the branch that changes",
            "increlora",
            sum(shares) / SEEDS,
            "half of it",
            0.6,
            "higher",
        ),
        Seen(
            "held-out loss, mean of 2 seeds",
            "increlora",
            sum(losses) / SEEDS,
            "lora of the same total",
            sum(others) / SEEDS,
            "lower",
        ),
    ]


def _fit(method: Method, seed: int) -> tuple[dict[str, int], float]:
    """(ranks by site at the end, held-out loss) after training towards the net with another first branch."""
    generator = torch.Generator().manual_seed(seed)
    net = _Branches(generator)
    goal = _Branches(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for layer in (0, 2):
            part: Any = goal.get_submodule(f"a.{layer}")
            thin = torch.randn(WIDTH, 6, generator=generator) @ torch.randn(6, WIDTH, generator=generator)
            part.weight += 0.5 * thin / (6 * WIDTH) ** 0.5
    models.attach(net, method, ["a.0", "a.2", "b.0", "b.2"], seed=seed)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)

    def loss(rows: int) -> Tensor:
        x = torch.randn(rows, 2 * WIDTH, generator=generator)
        with torch.no_grad():
            y = goal(x)
        found: Tensor = (net(x) - y).square().mean()
        return found

    counts: dict[str, int] = {}
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss(64).backward()
        optimizer.step()
        schedule.step()
        counts = dict(reallocate(net, "default", step, STEPS)) or counts
    with torch.no_grad():
        return counts, float(loss(4096))
