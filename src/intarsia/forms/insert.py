"""The insert form: a small function beside a layer, which no change of its weight can say.    y' = y + s g(v)"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NoReturn

from torch import Tensor

from intarsia.edits import SITS_AT, Edit, Inserted
from intarsia.edits import Insert as InsertEdit
from intarsia.errors import IntarsiaError
from intarsia.method import Below, Method, as_parameters
from intarsia.site import Site


class Insert(Method):
    """State: the tensors of the function, by its own names for them.

    It stands *after* the layer and reads y (adapters in series), beside it in *parallel* and reads x, or *before* it and changes x.
    It costs its own products at every token, in training and afterwards.
    """

    mergeable = False
    kinds = SITS_AT

    place: str  # of intarsia.edits.PLACES
    scale: float

    @abstractmethod
    def inserted(self, p: Any) -> Inserted:
        """g, of the tensors of p."""

    def forward(self, p: Any, x: Tensor, below: Below) -> Tensor:
        if self.place == "before":
            return below(x + self._added(p, x))
        y = below(x)
        return y + self._added(p, y if self.place == "after" else x)

    def _added(self, p: Any, v: Tensor) -> Tensor:
        added = self.inserted(p)(v)
        return added if self.scale == 1 else self.scale * added

    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> NoReturn:
        raise IntarsiaError(f"{self.name} is computed beside its layer for every token and folds into no weight")

    def edit(self, p: Any) -> Edit:
        return InsertEdit(p.shape, self.inserted(p).mapped(lambda t: t.detach().clone()), self.place, self.scale)

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        return as_parameters(site, self.own(edit, site))
