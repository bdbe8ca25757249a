"""Routed functions: of some experts, a few act at each token. Routed ranks: the experts are ranks, or blocks of them.    g(v) = B (gate * A v)"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.edits.edit import want_numbers, want_tensors
from intarsia.edits.insert import INSERTED, Inserted
from intarsia.errors import IntarsiaError

# From the logits of those chosen (..., k) to their gates.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.shape[-1] * z.softmax(-1),  # 1 each where the router is indifferent
    "logit": lambda z: z,
    "sigmoid": torch.sigmoid,
    "binary": torch.ones_like,
}


class Routing(Inserted):
    """A function in two steps, so that who needs the choice makes it once: what a mixture's function is."""

    @abstractmethod
    def route(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(gates in v's dtype, the numbers of the chosen experts), both (..., k)."""

    @abstractmethod
    def mixed(self, v: Tensor, gates: Tensor, which: Tensor) -> Tensor:
        """What the chosen experts make together. (..., n) -> (..., m)."""

    def __call__(self, v: Tensor) -> Tensor:
        return self.mixed(v, *self.route(v))


@dataclass(frozen=True, eq=False)
class Routed(Routing):
    """A (r, n), B (m, r); router (N, n), b (N,), which moves the choice and not the gates.

    Expert e of N is the e-th block of r / N ranks (N = r: a single one); k = ``active`` of them act at a token.
    """

    A: Tensor
    B: Tensor
    router: Tensor
    b: Tensor
    active: int
    gate: str

    what = "mixture of ranks"
    wide = frozenset({"b"})  # whose steps are small beside it

    def route(self, v: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(v, self.router.to(v))
        which = (z.detach() + self.b.to(v.device)).topk(self.active, dim=-1).indices
        return GATES[self.gate](z.gather(-1, which)), which

    def mixed(self, v: Tensor, gates: Tensor, which: Tensor) -> Tensor:
        h, N = F.linear(v, self.A.to(v)), len(self.b)
        gate = h.new_zeros(*h.shape[:-1], N).scatter(-1, which, gates.to(h))
        return F.linear(gate.repeat_interleave(len(self.A) // N, -1) * h, self.B.to(v))

    def tensors(self) -> dict[str, Tensor]:
        return {"A": self.A, "B": self.B, "router": self.router, "b": self.b}

    def facts(self) -> dict[str, Any]:
        return {"active": self.active, "gate": self.gate}

    @classmethod
    def build(cls, inputs: int, outputs: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        want_tensors(tensors, {"A", "B", "router", "b"})
        r, N = (len(tensors[name]) if tensors[name].ndim else 0 for name in ("A", "b"))
        for name, shape in {"A": (r, inputs), "B": (outputs, r), "router": (N, inputs), "b": (N,)}.items():
            if tuple(tensors[name].shape) != shape:
                raise IntarsiaError(
                    f"{name} is {tuple(tensors[name].shape)}; expected {shape}, for {r} ranks of {N} experts"
                )
            want_numbers(name, tensors[name])
        if not N or r % N or not r:
            raise IntarsiaError(f"{r} ranks do not make {N} experts; expected a multiple")
        active, gate = facts.get("active"), facts.get("gate")
        if type(active) is not int or not 1 <= active <= N:
            raise IntarsiaError(f"active is {active!r}; expected a whole number from 1 to {N}, the experts there are")
        if not isinstance(gate, str) or gate not in GATES:
            raise IntarsiaError(f"gate is {gate!r}; expected one of {', '.join(GATES)}")
        return cls(**tensors, active=active, gate=gate)

    def times(self, factor: float) -> Self:
        return replace(self, B=factor * self.B)

    def through(self, W: Tensor) -> Self:
        return replace(self, B=W @ self.B)

    @property
    def multiplications(self) -> int:
        return self.A.numel() + self.B.numel() + self.router.numel() + len(self.b)


INSERTED[Routed.what] = Routed
