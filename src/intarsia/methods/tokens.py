"""Trainable tokens: train the embeddings of given tokens and nothing else.    W'[:, t] = W[:, t] + s * values

HF PEFT's TrainableTokens, https://huggingface.co/docs/peft/package_reference/trainable_tokens; for tokens that were added
to a vocabulary: resize the embedding first, then attach to it.
Trained: tokens * O numbers a weight.  values = 0 at the start.

An embedding's W is (width, tokens), so its tokens are inputs; where the head shares the weight, it sees and teaches them too.
A head of its own has tokens as outputs: attach a second adapter to it, with ``side="outputs"``, and activate both.
Deviations: the change is trained, not the embedding; s = 1 and the learning rate are as PEFT's other examples have them and
were not measured.
"""

from dataclasses import dataclass

import torch

from intarsia.forms import Sparse
from intarsia.method import option
from intarsia.registry import register
from intarsia.support import Column, Row


@register
@dataclass(frozen=True)
class Tokens(Sparse):
    tokens: list | tuple = option((), "numbers of the tokens that are trained")  # type: ignore[type-arg]
    side: str = option("inputs", "inputs: of an embedding; outputs: of a head that does not share its weight")
    scale: float = option(1.0, "factor in front of the values")

    name, title, paper = (
        "tokens",
        "Trainable tokens",
        "https://huggingface.co/docs/peft/package_reference/trainable_tokens",
    )
    formula, trained = "W'[:, t] = W[:, t] + s * values", "tokens * O"
    default_lr = 4e-3
    avoids = False  # the tokens are given
    small = ({"tokens": [1, 5]}, {"tokens": [0, 3, 7], "side": "outputs", "scale": 2.0})

    def __post_init__(self):
        plain = isinstance(self.tokens, list | tuple) and all(type(t) is int and t >= 0 for t in self.tokens)
        self.require(plain, "tokens", "a list of token numbers")
        object.__setattr__(self, "tokens", tuple(sorted(set(self.tokens))))
        self.require(self.side in ("inputs", "outputs"), "side", "inputs or outputs")
        self.require(
            isinstance(self.scale, float | int) and 0 < self.scale < float("inf"), "scale", "a positive number"
        )

    def check(self, site):
        there = site.shape[0 if self.side == "outputs" else 1]
        if not self.tokens:
            return f"{site.name}: no tokens are given; say which are trained, such as tokens=[{there - 1}]"
        if self.tokens[-1] >= there:
            return f"{site.name}: there is no token {self.tokens[-1]} among its {there} {self.side}; resize the embedding first"
        return None

    def granularity_at(self, shape):
        return Row() if self.side == "outputs" else Column()

    def units(self, shape):
        return len(self.tokens)

    def scale_at(self, shape):
        return float(self.scale)

    def choose(self, site, start):
        return torch.tensor(self.tokens, device=site.weight.device)
