"""LoRA+: the factor B of a pair learns faster than A.    lr_B = ratio lr_A

Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354, section 4.
State: that of the inner optimizer. ``lr`` is that of A. Vectors (magnitudes, biases) go with B; an adapter of an embedding has a learning rate of its
own; all else that is trained goes with A. The groups are those of ``peft.optimizers.create_loraplus_optimizer``, but the
factors are known from the methods (``Method.pairs``), not from names. The values of a sparse adapter, which are a vector
as well, go with A: they are entries of a weight. Weight decay is not for norms and biases.

A schedule multiplies every group alike, so the ratio stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from intarsia.named import option
from intarsia.optim.parts import Part, grouped
from intarsia.optim.recipe import Recipe, register
from intarsia.optim.wrapped import Params


@register
@dataclass(frozen=True)
class LoraPlusRecipe(Recipe):
    """LoRA+: groups of parameters for an inner optimizer."""

    ratio: float = option(16.0, "lambda, the learning rate of B over that of A, 1 or more")
    embedding_lr: float = option(1e-6, "learning rate of an embedding's adapter")

    name, title, paper = "lora-plus", "LoRA+", "arXiv:2402.12354"
    formula, state = "lr_B = lambda lr_A", "2 r (m + n) a pair, as Adam"
    default_lr = 2e-4
    needs_pairs = True
    small = ({"ratio": 4.0}, {"inner": "sgdm"})

    def __post_init__(self) -> None:
        self.require(1 <= self.ratio < math.inf, "ratio", "1 or more")
        self.require(0 <= self.embedding_lr < math.inf, "embedding_lr", "0 or more")
        super().__post_init__()

    def make(self, groups: Params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        inner, settings = self.inside()
        return inner(groups, lr=lr, weight_decay=weight_decay, **settings)

    def groups(self, found: list[Part], lr: float) -> list[dict[str, Any]]:
        chosen: dict[str, list[Part]] = {"down": [], "embedding": [], "up": []}
        for part in found:
            fast = part.role == "up" or (part.role == "other" and part.parameter.ndim == 1)
            chosen["embedding" if part.embedding else "up" if fast else "down"].append(part)
        rates = {"down": lr, "embedding": self.embedding_lr, "up": self.ratio * lr}
        return grouped(chosen, {key: {"lr": rate} for key, rate in rates.items()})

    def numbers(self, shape: tuple[int, ...]) -> int:
        return self.moments() * math.prod(shape)

    def usual_lr(self, lr: float) -> float:
        # B's and A's on both sides of what serves for both.
        return lr / math.sqrt(self.ratio)
