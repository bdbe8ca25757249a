"""Inserts on a live model: functions that act beside a layer while their adapter is set in.

The layer's class is swapped for as long. A forward hook would do as much, but torch.compile does not look for hooks that
came after it compiled, and would go on without them; a class it does look at. Taking away gives the class back, and
leaves neither hook nor attribute. Both steps can be done twice, so that whatever was half done is made whole or undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import chain
from intarsia.edits import Ahead, Insert, Seen
from intarsia.errors import IntarsiaError
from intarsia.operators import DECODER, LINEAR, Operator
from intarsia.site import operator_for, weight_of

HELD = "_intarsia_inserts"  # the layer's attribute


@dataclass(frozen=True, eq=False)
class Together:
    """The inserts beside one layer, their factors multiplied in. Each reads the layer's own x and y; at a decoder they stand before

    its tokens, one behind another."""

    inserts: tuple[Insert, ...]
    operator: Operator = LINEAR  # of the layer

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., I), (..., O) -> (..., O)."""
        total = y
        for insert in self.inserts:
            total = total + insert.change(x, y).to(y.dtype)
        return total

    @property
    def ahead(self) -> tuple[Ahead, ...]:
        """What stands before the tokens."""
        return tuple(one.inserted for one in self.inserts if isinstance(one.inserted, Ahead))

    @property
    def multiplications(self) -> int:
        """Of numbers, for one token."""
        return sum(insert.multiplications for insert in self.inserts)

    @property
    def bytes(self) -> int:
        """Bytes of their numbers."""
        return sum(insert.bytes for insert in self.inserts)


class Beside:
    """A layer with inserts. Mixed in by :func:`intarsia.chain.adapted`."""

    base_class: type[nn.Module]
    role: type
    base_forward: Any

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear
        together: Together | None = getattr(self, HELD, None)
        y: Tensor = self.base_forward(input)
        return y if together is None else together(input, y)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return chain.revive, (self.base_class, self.role), self.__dict__


class BesideDecoder(chain.Decoding, Beside):
    """A decoder with something before its tokens."""

    def forward(self, *given: Any, **named: Any) -> Any:
        together: Together | None = getattr(self, HELD, None)
        ahead = () if together is None else together.ahead
        return self.run(LINEAR if together is None else together.operator, ((ahead, None),), given, named)


Terms = Sequence[tuple[float, Insert]]


def prepared(
    terms: Mapping[str, Terms],
    layer_of: Callable[[str], nn.Module],
    base_of: Callable[[str], Tensor],
    dtype_of: Callable[[str], torch.dtype],
    seen: Seen,
) -> dict[str, Together]:
    """What is to stand beside the layers, by weight: all that can be done before a layer is touched.

    Args:
        layer_of: the layer of a weight.
        base_of: the base's matrix of a weight (O, I), whatever is set in.
        dtype_of: what the layer computes in.
        seen: what tells the tokens of the model's forward, to functions that ask for them.

    Raises:
        IntarsiaError: where an adapter sits on the layer, and where the numbers are not finite in its dtype.
    """
    found = {}
    for weight, parts in terms.items():
        layer = layer_of(weight)
        if isinstance(layer, chain.OnChain):
            names = ", ".join(layer.leading.adapters)
            raise IntarsiaError(
                f"{weight}: an insert cannot be set in beside a layer that has an adapter on it, active or not ({names}); "
                "detach it first: intarsia.detach(model, name)"
            )
        device = weight_of(layer).device
        ready = [insert.to(device).ready(c, partial(base_of, weight), dtype_of(weight)) for c, insert in parts]
        if not all(bool(tensor.isfinite().all()) for insert in ready for tensor in insert.tensors().values()):
            raise IntarsiaError(
                f"{weight}: the insert beside it has numbers that are not finite in {dtype_of(weight)}; the strength is too large or "
                "the adapter is broken. Nothing was changed"
            )
        operator = operator_for(layer)
        assert isinstance(operator, Operator)  # add() has taken no other
        told = tuple(replace(one, inserted=one.inserted.watching(seen)) for one in ready)
        found[weight] = Together(told, operator)
    return found


def exchange(
    old: Mapping[str, Together],
    new: Mapping[str, Together],
    layer_of: Callable[[str], nn.Module],
    model: nn.Module,
    seen: Seen,
) -> None:
    """Make ``new`` stand beside the layers, and nothing else of ``old``; let ``seen`` watch the model where one of them asks."""
    if any(insert.inserted.watches for together in new.values() for insert in together.inserts):
        seen.watch(model)
    else:
        seen.leave(model)
    for weight in old:
        if weight not in new:
            take_away(layer_of(weight))
    for weight, together in new.items():
        put_beside(layer_of(weight), together)


def put_beside(layer: Any, together: Together) -> None:
    """Let the inserts act beside the layer, in place of others that do."""
    layer.__dict__[HELD] = together
    if not isinstance(layer, Beside):
        layer.__class__ = chain.adapted(type(layer), BesideDecoder if together.operator.kind == DECODER else Beside)


def take_away(layer: Any) -> None:
    """Give the layer its own class back, if it has not got it."""
    if isinstance(layer, Beside):
        layer.__class__ = layer.base_class  # type: ignore[assignment]  # what its class was made of
    layer.__dict__.pop(HELD, None)


def check_none(model: nn.Module) -> None:
    """Raise IntarsiaError where inserts act that no deck will take away: a copy of a model has those of its original."""
    for name, module in model.named_modules():
        if isinstance(module, Beside):
            raise IntarsiaError(
                f"an insert acts beside {name}: this model is a copy, made while a deck had an adapter set in; copy the base, "
                "after deck.off(), or load it again"
            )
