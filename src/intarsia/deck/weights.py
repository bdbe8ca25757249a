"""The weights that a deck writes: found anew at each switch, and watched for whoever else writes them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from intarsia.bases import packing_of
from intarsia.edits import memory
from intarsia.errors import IntarsiaError
from intarsia.operators import Operator
from intarsia.site import decoders, editable, weight_of


class Weights:
    """A model's weights by name, as matrices.

    A weight that is moved to another device or dtype is followed; one that is replaced by another parameter is refused.
    Writes of others are seen by torch's count of changes, which those through ``.data`` or another library do not raise.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[str, tuple[nn.Module, str, Tensor]] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            owner, _, attribute = name.rpartition(".")
            self._owners[name] = (model.get_submodule(owner), attribute, weight)
        self._decoders = decoders(model)  # which have no weight of their own
        self._operators = {n: operator for n, operator in editable(model).items() if n not in self._decoders}
        self._watched = {name: _Watched(*self._owners[name]) for name in self._operators}

    def __getitem__(self, name: str) -> Tensor:
        return self._owners[name][2]

    def layer(self, name: str) -> nn.Module:
        """The layer whose weight it is, or the decoder of that name."""
        return self._decoders[name] if name in self._decoders else self._owners[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """What its layer computes in."""
        weight = weight_of(self._decoders[name]) if name in self._decoders else self[name]
        return packing_of(weight).dtype(weight)

    @property
    def adaptable(self) -> list[Tensor]:
        """Those that an adapter may change, and that lie in memory as plain numbers."""
        return [self[n] for n in self._operators if packing_of(self[n]).in_place]

    def matrix(self, name: str) -> Tensor:
        """The weight as its edits see it, (O, I). A view, made anew because moving a model gives its weights new memory."""
        operator = self._operators[name]
        assert isinstance(operator, Operator)  # add() has taken no other
        return operator.matrix(self[name].detach())

    def memory(self, name: str) -> Tensor:
        """The weight's memory as one row. A view."""
        weight = self[name].detach()
        if weight.is_contiguous():
            return weight.view(-1)
        row = memory(self.matrix(name))
        assert row is not None  # a plan has runs of no other
        return row

    def changed(self) -> bool:
        """Whether anybody has written or moved a weight since :meth:`saw`.

        Raises:
            IntarsiaError: where a layer has another weight than it had.
        """
        found = False
        for name, one in self._watched.items():  # at every switch, so in one pass over few attributes
            weight = one.weight
            if one.owner._parameters.get(one.attribute) is not weight:
                raise IntarsiaError(
                    f"{name} is another parameter than when the deck was made, so its bits cannot be exchanged; make a new "
                    "deck: intarsia.Deck(model), or put the old parameter back"
                )
            # An address tells the device too.
            if weight._version != one.version or weight.data_ptr() != one.address or weight.dtype is not one.dtype:
                found = True
        return found

    def saw(self) -> None:
        """Take the weights as they are now, and where they lie, for known."""
        for one in self._watched.values():
            one.look()

    def wrote(self, names: Iterable[str]) -> None:
        """Take what the deck itself has just written for known; one that was moved meanwhile is still found out."""
        for name in names:
            one = self._watched[name]
            one.version = one.weight._version


class _Watched:
    """A weight, and what it was when the deck last looked."""

    __slots__ = ("address", "attribute", "dtype", "owner", "version", "weight")

    def __init__(self, owner: nn.Module, attribute: str, weight: Tensor) -> None:
        self.owner, self.attribute, self.weight = owner, attribute, weight
        self.look()

    def look(self) -> None:
        weight = self.weight
        self.version, self.address, self.dtype = weight._version, weight.data_ptr(), weight.dtype
