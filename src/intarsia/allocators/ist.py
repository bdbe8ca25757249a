"""IST: a few layers train a step, those that seem to matter.    layers ~ sigmoid(-I),  I_i += mu (r_c - mean r) p_i (1 - p_i)

Yao et al. 2024, "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of Large Language
Models", arXiv:2410.11772, section 4; the constants are those of the authors' callback. Over the adapter of any method.

Before each step the share ``share`` of the layers is drawn without replacement, layer i with a chance in proportion to sigmoid(-I_i); the
adapters of the others are frozen for that step, so that autograd keeps nothing for them, and the optimizer leaves them and their moments alone.
Every ``interval`` steps ``candidates`` sets of layers are drawn by sigmoid(I); for each, their adapters are damped to ``beta`` of their change,
and the loss L of the same rows is measured: the reward is r = exp(-L), and p = sigmoid(I). So a HIGH I means that the loss does not mind
the layer damped (the paper's text turns the sign round). I = 0 at the start. ``interval=0`` measures nothing: the authors' control, RST.
Deviations: what is damped is all that the adapter changes in a layer's output, also where a method has no scale of its own; a set that was drawn
already is drawn anew at most 100 times. A layer is a block: what has the same name up to its first number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.allocators.allocator import Allocator, Draws, register
from intarsia.method import option

REDRAWS = 100  # of a set that was drawn already: where few sets are possible there may be no other


@register
@dataclass(frozen=True)
class Ist(Allocator):
    share: float = option(0.25, "share of the layers that trains in a step, rounded down, one at least")
    interval: int = option(
        10, "optimizer steps from one measurement of the layers to the next; 0: none, all layers alike"
    )
    suppressed: float = option(0.5, "share of the layers that is damped in a trial, rounded down, one at least")
    beta: float = option(0.25, "what a damped adapter keeps of its change")
    candidates: int = option(3, "trials a measurement")
    mu: float = option(10.0, "step size of the scores")
    batch: int = option(16, "rows of the training data that a measurement is made on")

    name, title, paper = "ist", "IST", "arXiv:2410.11772"
    formula = "layers ~ sigmoid(-I),  I_i += mu (r_c - mean r) p_i (1 - p_i)"

    def __post_init__(self) -> None:
        for field in ("share", "suppressed"):
            self.require(0 < getattr(self, field) <= 1, field, "above 0, and 1 at most")
        self.require(self.interval >= 0, "interval", "0 or more")
        self.require(0 <= self.beta < 1, "beta", "in [0, 1)")
        self.require(self.candidates >= 2, "candidates", "2 or more: rewards are compared with their mean")
        self.require(self.mu > 0, "mu", "positive")
        self.require(self.batch >= 1, "batch", "1 or more")

    def begin(self, layers: int) -> dict[str, Tensor]:
        return {"scores": torch.zeros(layers, dtype=torch.float64)}

    def choose(self, state: Mapping[str, Tensor], step: int, draws: Draws) -> Sequence[int]:
        chances = torch.sigmoid(-state["scores"]).tolist()
        return draws.some(chances, max(1, int(self.share * len(chances))), "train", step)

    def trials(self, state: Mapping[str, Tensor], step: int, draws: Draws) -> list[tuple[int, ...]]:
        if not self.interval or step == 1 or (step - 1) % self.interval:
            return []
        chances = torch.sigmoid(state["scores"]).tolist()
        count = max(1, int(self.suppressed * len(chances)))
        found: list[tuple[int, ...]] = []
        for number in range(self.candidates):
            drawn = [draws.some(chances, count, "damp", step, number)]
            while drawn[-1] in found and len(drawn) < REDRAWS:
                drawn.append(draws.some(chances, count, "damp", step, number, len(drawn)))
            found.append(drawn[-1])
        return found

    def learn(self, state: Mapping[str, Tensor], trials: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        p, rewards = torch.sigmoid(state["scores"]), torch.tensor(losses, dtype=torch.float64).neg().exp()
        for trial, advantage in zip(trials, (rewards - rewards.mean()).tolist(), strict=True):
            at = torch.tensor(list(trial))
            state["scores"][at] += self.mu * advantage * (p * (1 - p))[at]

    def damping(self) -> float:
        return self.beta

    def rows(self) -> int:
        return self.batch if self.interval else 0
