"""What an allocator over any method is: before every optimizer step it says which layers of an adapter take part.

Subclasses are frozen dataclasses, as methods are: the fields are the hyperparameters, the functions are pure in ``state``, tensors by name,
and in ``draws``, the chance. :class:`intarsia.allocators.Turns` does what they say to a model.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intarsia import registry
from intarsia.named import Catalogue, Named
from intarsia.registry import System

ALLOCATORS: Catalogue[Allocator] = Catalogue("allocator", "intarsia.allocators")
register, known = ALLOCATORS.register, ALLOCATORS.known


@dataclass(frozen=True)
class Draws:
    """Chance that depends on the seed and on what is drawn for, and on nothing else: the same for a resumed run."""

    seed: int

    def uniform(self, *what: object) -> float:
        """A number above 0 and below 1."""
        text = ":".join(map(str, (self.seed, *what)))
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 11
        return (number + 0.5) / 2**53

    def some(self, weights: Sequence[float], count: int, *what: object) -> tuple[int, ...]:
        """``count`` of the numbers 0..len(weights)-1, ascending, drawn one after another without replacement, each with a chance in
        proportion to its weight among those that are left: the first to arrive in a race of exponential times."""
        times = [-math.log(self.uniform(*what, number)) / weight for number, weight in enumerate(weights)]
        return tuple(sorted(sorted(range(len(weights)), key=times.__getitem__)[:count]))


@dataclass(frozen=True)
class Allocator(Named, ABC):
    """Who trains when. Layers are numbers 0..n-1, in the order of the model; steps are optimizer steps from 1."""

    @abstractmethod
    def begin(self, layers: int) -> dict[str, Tensor]:
        """The state at the start: all that later choices depend on. It is part of training checkpoints."""

    @abstractmethod
    def choose(self, state: Mapping[str, Tensor], step: int, draws: Draws) -> Sequence[int]:
        """The layers that train in this step."""

    def trials(self, state: Mapping[str, Tensor], step: int, draws: Draws) -> list[tuple[int, ...]]:
        """Sets of layers, each to be damped once for a measurement of the loss before this step; none: nothing is measured."""
        return []

    def learn(self, state: Mapping[str, Tensor], trials: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """Take in what the trials came to, in place."""
        raise NotImplementedError

    def damping(self) -> float:
        """The factor of the change that a damped layer's adapter makes."""
        return 1.0

    def rows(self) -> int:
        """How many rows of the training data a measurement is to be made on."""
        return 0


def build(config: str | Mapping[str, Any]) -> Allocator:
    """An allocator from its plain config, ``{"name": "ist", "share": 0.25}`` or just ``"ist"``.

    Raises:
        IntarsiaError: for an unknown name or field (with the nearest), a wrong type, or a value out of range.
    """
    config = ALLOCATORS.told(config)
    return registry.made(ALLOCATORS.find(config["name"]), config)


def systems() -> list[System]:
    """What ``intarsia methods`` tells of the allocators."""
    needs = "a call before every optimizer step; intarsia train makes it"
    return [
        registry.system_of(cls, "allocator", config=f"allocator: {{name: {name}}}, beside any method", needs=needs)
        for name, cls in known().items()
    ]
