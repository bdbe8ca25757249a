"""The bottleneck: few numbers between two thin matrices.    g(v) = gain * up phi(down v)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.edits.edit import want_numbers, want_tensors
from intarsia.edits.insert import INSERTED, Inserted
from intarsia.errors import IntarsiaError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda v: v,
}


@dataclass(frozen=True, eq=False)
class Bottleneck(Inserted):
    """down (b, n), up (m, b), gain () where the size was trained too. No biases."""

    down: Tensor
    up: Tensor
    activation: str
    gain: Tensor | None = None

    what = "bottleneck"
    wide = frozenset({"gain"})  # it multiplies all of the function, and takes no room

    def __call__(self, v: Tensor) -> Tensor:
        found = F.linear(ACTIVATIONS[self.activation](F.linear(v, self.down.to(v))), self.up.to(v))
        return found if self.gain is None else self.gain * found

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up} | ({} if self.gain is None else {"gain": self.gain})

    def facts(self) -> dict[str, Any]:
        return {"activation": self.activation}

    @classmethod
    def build(cls, inputs: int, outputs: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"down", "up"} | tensors.keys() & {"gain"})
        down, up, gain = tensors["down"], tensors["up"], tensors.get("gain")
        fits = down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] >= 1
        if not fits or (down.shape[1], up.shape[0]) != (inputs, outputs):
            raise IntarsiaError(
                f"down {tuple(down.shape)} and up {tuple(up.shape)} are no bottleneck of {inputs} inputs and {outputs} outputs: "
                f"expected (b, {inputs}) and ({outputs}, b)"
            )
        if gain is not None and gain.ndim:
            raise IntarsiaError(f"gain is {tuple(gain.shape)}; expected a single number")
        for name, tensor in tensors.items():
            want_numbers(name, tensor)
        activation = facts.get("activation")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise IntarsiaError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        return cls(down, up, activation, gain)

    def times(self, factor: float) -> Self:
        return replace(self, up=factor * self.up)

    def through(self, W: Tensor) -> Self:
        return replace(self, up=W @ self.up)

    @property
    def multiplications(self) -> int:
        return self.down.numel() + self.up.numel() + (0 if self.gain is None else self.up.shape[0])


INSERTED[Bottleneck.what] = Bottleneck
