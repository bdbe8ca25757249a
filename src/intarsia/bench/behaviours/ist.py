"""IST and layers that cannot help: of eight layers four are cut off; who gets the turns, and what that is worth beside turns by lot (RST)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.allocators import Ist, Turns
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.methods.lora import Lora

WIDTH, LAYERS, STEPS, SEEDS = 16, 8, 200, 3
CUT_OFF = (1, 2, 5, 6)  # layers whose output is multiplied by 0


class _Blocks(nn.Module):
    """Eight blocks with a way around each."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = x + (0.0 if number in CUT_OFF else 0.5) * layer(x).tanh()
        return x


@behaviour("ist", "gives fewer turns to layers that cannot help, and learns faster than turns by lot")
def turns() -> list[Seen]:
    chances, losses, others = [], [], []
    for seed in range(SEEDS):
        chance, loss = _fit(Ist(), seed)
        chances.append(chance)
        losses.append(loss)
        others.append(_fit(Ist(interval=0), seed)[1])
    cut, rest = (sum(pair[i] for pair in chances) / SEEDS for i in (0, 1))
    return [
        Seen("weight in the draw, mean", "layers cut off", cut, "the others", rest, "lower"),
        Seen("held-out loss, mean of 3 seeds", "ist", sum(losses) / SEEDS, "rst", sum(others) / SEEDS, "lower"),
    ]


def _fit(allocator: Ist, seed: int) -> tuple[tuple[float, float], float]:
    """(the weights in the draw of the layers cut off and of the others, held-out loss) after training towards another such net."""
    generator = torch.Generator().manual_seed(seed)
    net, goal = _Blocks(generator), _Blocks(generator)
    models.attach(net, Lora(4), seed=seed)
    parts = Turns(net, "default", allocator, seed=seed)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)

    def loss(rows: int, chance: torch.Generator) -> Tensor:
        x = torch.randn(rows, WIDTH, generator=chance)
        with torch.no_grad():
            y = goal(x)
        found: Tensor = (net(x) - y).square().mean()
        return found

    for step in range(1, STEPS + 1):
        parts.begin(step, lambda step=step: loss(16, torch.Generator().manual_seed(10_000 + step)))  # type: ignore[misc]
        loss(32, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    parts.end()
    weights: Any = torch.sigmoid(-parts.state["scores"]).tolist()
    cut = sum(weights[number] for number in CUT_OFF) / len(CUT_OFF)
    rest = sum(w for number, w in enumerate(weights) if number not in CUT_OFF) / (LAYERS - len(CUT_OFF))
    with torch.no_grad():
        return (cut, rest), float(loss(4096, torch.Generator().manual_seed(seed)))
