"""Optimizers by name: a frozen dataclass each, whose fields are its settings. Flags, config, table and tests come from it."""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from intarsia.errors import IntarsiaError
from intarsia.named import Catalogue, Named, option
from intarsia.optim.adam import PaperAdamW
from intarsia.optim.parts import Part, grouped, parts
from intarsia.optim.wrapped import Inner, Params
from intarsia.registry import System, made, system_of

# What may be inside by name, and how many numbers it keeps for each that it sees.
INNERS: dict[str, tuple[Inner, int]] = {
    "adamw": (torch.optim.AdamW, 2),
    "paper-adamw": (PaperAdamW, 2),
    "sgd": (torch.optim.SGD, 0),
    "sgdm": (functools.partial(torch.optim.SGD, momentum=0.9), 1),
    "rmsprop": (torch.optim.RMSprop, 1),
    "adagrad": (torch.optim.Adagrad, 1),
    "adamax": (torch.optim.Adamax, 2),
    "nadam": (torch.optim.NAdam, 2),
    "radam": (torch.optim.RAdam, 2),
}


@dataclass(frozen=True)
class Recipe(Named, ABC):
    """How an optimizer is made. Subclasses are frozen dataclasses; their fields are its settings, the learning rate aside."""

    inner: str = option("adamw", "the optimizer inside: " + ", ".join(INNERS))
    beta1: float = option(0.9, "decay of the first moment of an inner optimizer that has betas")
    beta2: float = option(0.999, "decay of the second moment")
    eps: float = option(1e-8, "what keeps the inner optimizer from dividing by zero")

    state: ClassVar[str]  # numbers kept of an m x n matrix around Adam, as a formula
    default_lr: ClassVar[float]  # of the paper
    needs_pairs: ClassVar[bool] = False  # whether it has to know which tensors act as a pair
    small: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)  # quick settings that the laws run

    def __post_init__(self) -> None:
        self.require(self.inner in INNERS, "inner", "one of " + ", ".join(INNERS))
        for field in ("beta1", "beta2"):
            self.require(0 <= getattr(self, field) < 1, field, "in [0, 1)")
        self.require(0 <= self.eps < math.inf, "eps", "0 or more")
        try:  # its own checks speak for the other fields
            self.make([nn.Parameter(torch.zeros(2, 2))], 0.0, 0.0)
        except IntarsiaError as error:
            raise IntarsiaError(f"{self.name}: {str(error).partition(': ')[2] or error}") from None

    @abstractmethod
    def make(self, groups: Params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of groups that are made already."""

    @abstractmethod
    def groups(self, found: list[Part], lr: float) -> list[dict[str, Any]]:
        """The parameters of a model, grouped."""

    @abstractmethod
    def numbers(self, shape: tuple[int, ...]) -> int:
        """Numbers kept between steps for a tensor of this shape, counters aside."""

    def build(
        self, target: nn.Module | Params, lr: float | None = None, weight_decay: float = 0.0
    ) -> torch.optim.Optimizer:
        """The optimizer of a model's trained tensors, or of tensors or groups of them.

        Raises:
            IntarsiaError: for a setting out of its range, a model of which nothing is trained, and where a model is needed.
        """
        lr = self.default_lr if lr is None else lr
        if isinstance(target, nn.Module):
            found = parts(target)
            if self.needs_pairs and not any(part.role == "up" for part in found):
                raise IntarsiaError(
                    f"{self.name} is for adapters with pairs of factors, such as lora, and this model trains none; take another "
                    "optimizer"
                )
            return self.make(self.groups(found, lr), lr, weight_decay)
        if self.needs_pairs:
            raise IntarsiaError(
                f"{self.name} has to know which tensors act as a pair: give it the model with its adapter, not tensors"
            )
        return self.make(target, lr, weight_decay)

    def usual_lr(self, lr: float) -> float:
        """The learning rate that is to be tried first where AdamW's is ``lr``."""
        return lr

    # --- for those that are to come

    def inside(self) -> tuple[Inner, dict[str, Any]]:
        """The inner optimizer and what it is made with, of what it takes."""
        inner = INNERS[self.inner][0]
        takes = inspect.signature(inner).parameters
        given = {"betas": (self.beta1, self.beta2), "eps": self.eps}
        return inner, {key: value for key, value in given.items() if key in takes}

    def moments(self) -> int:
        """Numbers that the inner optimizer keeps for each that it sees."""
        return INNERS[self.inner][1]


@dataclass(frozen=True)
class Projecting(Recipe):
    """Those that project matrices: a model's weights, but not embeddings, the layer that gives the logits, vectors."""

    def groups(self, found: list[Part], lr: float) -> list[dict[str, Any]]:
        def projected(part: Part) -> bool:
            return part.role != "other" and part.parameter.ndim == 2 and not part.embedding

        chosen = {
            "projected": [part for part in found if projected(part)],
            "plain": [part for part in found if not projected(part)],
        }
        return grouped(chosen, {"projected": {}, "plain": {"project": False}})


OPTIMIZERS: Catalogue[Recipe] = Catalogue("optimizer", "intarsia.optimizers")
register, optimizers = OPTIMIZERS.register, OPTIMIZERS.known


def build(config: str | Mapping[str, Any], also: Iterable[str] = ()) -> Recipe:
    """An optimizer from its plain config, ``{"name": "galore", "rank": 8}`` or just ``"galore"``.

    Args:
        also: further names to mention where the name is unknown.

    Raises:
        IntarsiaError: for an unknown name or field (with the nearest), a wrong type, or a value out of range.
    """
    config = OPTIMIZERS.told(config)
    return made(OPTIMIZERS.find(config["name"], also), config, {"lr": "it is train.lr"})


def systems() -> list[System]:
    """What ``intarsia methods`` tells of the optimizers."""
    return [system_of(cls, "optimizer", state=cls.state, default_lr=cls.default_lr) for cls in optimizers().values()]
