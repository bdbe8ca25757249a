"""NOLA below the smallest LoRA: half the numbers of rank 1, on a language model of two layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intarsia import model as models
from intarsia.bench.behaviours import Seen, behaviour
from intarsia.method import Method
from intarsia.methods.lora import Lora
from intarsia.methods.nola import Nola

WORDS, WIDTH, LENGTH = 32, 48, 24
TARGETS = ["*.query", "*.value"]


class Layer(nn.Module):
    """One head of causal attention and a small network behind it, each added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        v = self.first(x)
        q, k, v = (layer(v).unsqueeze(1) for layer in (self.query, self.key, self.value))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        found: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.second(x))))
        return found


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        found: Tensor = self.head(self.last(self.layers(x)))
        return found


def sentences(odds: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The next word by the two before it: in half of all cases by the last, else by the one before. -> (count, LENGTH)."""
    ids = torch.randint(WORDS, (count, LENGTH), generator=generator)
    for i in range(2, LENGTH):
        back = torch.randint(1, 3, (count,), generator=generator)
        before = ids[torch.arange(count), i - back]
        ids[:, i] = torch.multinomial(odds[before], 1, generator=generator).squeeze(1)
    return ids


def train(model: nn.Module, odds: Tensor, steps: int, lr: float, seed: int) -> float:
    """Adam on new sentences; the loss on 256 others, in nats a word."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model, sentences(odds, 32, generator)).backward()
        optimizer.step()
    with torch.no_grad():
        return float(_loss(model, sentences(odds, 256, torch.Generator().manual_seed(99))))


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@behaviour("nola", "with half the numbers of a LoRA of rank 1 gains at least nine tenths of what that gains")
def below_rank_one() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.softmax(2 * torch.randn(WORDS, WORDS, generator=generator), 1) for _ in range(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Language()
    train(model, first, 600, 2e-3, 1)
    before = train(model, second, 0, 0.0, 2)
    smallest: Method = Lora(rank=1)
    count = smallest.trained_count((WIDTH, WIDTH))
    methods = {
        "lora r=1": smallest,
        "nola, half of it": Nola(rank=8, down=count // 4, up=count // 4),
    }
    gains: dict[str, Any] = {}
    for name, method in methods.items():
        models.attach(model, method, TARGETS, name="a", seed=0)
        gains[name] = before - train(model, second, 300, 1e-2, 2)
        models.detach(model, "a")
    ours, theirs = "nola, half of it", "lora r=1"
    return [
        Seen("gain in nats a word", ours, gains[ours], f"0.9 of {theirs}", 0.9 * gains[theirs], "higher"),
        Seen("trained numbers a weight", ours, 2 * (count // 4), theirs, count, "lower"),
    ]
