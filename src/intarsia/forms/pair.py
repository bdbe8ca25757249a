"""The pair form: a part of W itself is trained, and another update beside it.    W' = W + scatter(change, index) + delta(p)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intarsia.edits import Edit, Sum
from intarsia.errors import IntarsiaError
from intarsia.forms.delta import Delta
from intarsia.forms.sparse import Read, Sparse
from intarsia.method import Start
from intarsia.operators import KINDS
from intarsia.site import Site
from intarsia.support import Granularity, Shape


class Pair(Sparse):
    """State: that of the sparse part, and that of the part beside it; the names of their tensors differ.

    The sparse part is live as it is alone, so that it costs no product of its own; the other one is a branch.
    """

    avoids = False  # the part beside reaches every entry
    moves_support = False  # a gradient taken of W alone would leave the other part out
    kinds = frozenset(KINDS)  # the part beside needs a forward of ours

    sparse: Sparse  # the part that is trained in W itself
    beside: Delta  # the part beside it

    def join(self, sparse: Sparse, beside: Delta) -> None:
        """For ``__post_init__``: set both parts, which are made once of the fields and are no fields themselves."""
        object.__setattr__(self, "sparse", sparse)
        object.__setattr__(self, "beside", beside)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return self.beside.pairs

    def granularity_at(self, shape: Shape) -> Granularity:
        return self.sparse.granularity_at(shape)

    def units(self, shape: Shape) -> int:
        return self.sparse.units(shape)

    def scale_at(self, shape: Shape) -> float:
        return self.sparse.scale_at(shape)

    def choose(self, site: Site, start: Start) -> Tensor:
        return self.sparse.choose(site, start)

    def trains_weights(self) -> bool:
        return self.sparse.trains_weights()

    def needs(self) -> frozenset[str]:
        return self.sparse.needs() | self.beside.needs()

    def stays_wide(self) -> frozenset[str]:
        return self.sparse.stays_wide() | self.beside.stays_wide()

    def trained_count(self, shape: Shape) -> int:
        return self.sparse.trained_count(shape) + self.beside.trained_count(shape)

    def check(self, site: Site) -> str | None:
        return self.sparse.check(site) or self.beside.check(site)

    def init(self, site: Site, start: Start) -> dict[str, Tensor]:
        return self.sparse.init(site, start) | self.beside.init(site, start)

    def delta(self, p: Any) -> Tensor:
        return self.sparse.delta(p) + self.beside.delta(p)

    def branch(self, p: Any, x: Tensor) -> Tensor:
        return self.sparse.branch(p, x) + self.beside.branch(p, x)

    def live(self, p: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self.sparse.live(p, x, W, b) + self.beside.branch(p, x)

    def over(self, p: Any, x: Tensor, read: Read, stored: torch.dtype, b: Tensor | None) -> Tensor:
        return self.sparse.over(p, x, read, stored, b) + self.beside.branch(p, x)

    def edit(self, p: Any) -> Edit:
        return Sum(p.shape, (self.sparse.edit(p), self.beside.edit(p)))

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        if not isinstance(edit, Sum) or len(edit.parts) != 2:
            raise IntarsiaError(f"{site.name}: the file has a {edit.kind} edit; {self.name} needs a sum of two")
        return self.sparse.restore(edit.parts[0], site) | self.beside.restore(edit.parts[1], site)
