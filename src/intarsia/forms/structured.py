"""The structured form: a change that is an edit of a few numbers.    W' = W + D,  D of the trained tensors by a structure"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from intarsia.edits import Edit
from intarsia.errors import IntarsiaError
from intarsia.forms.delta import Delta
from intarsia.method import Below
from intarsia.site import Site
from intarsia.support import Shape


class Structured(Delta):
    """State: the trained tensors that :meth:`shapes` names, and the constants besides.

    The edit is the math: it is made of the state's own tensors, applied to x by its quick way in a Linear and as a matrix elsewhere,
    and saved. A method says the shapes, the start and which edit.
    """

    constants: ClassVar[tuple[str, ...]] = ()  # tensors of the state that do not train
    recomputes: ClassVar[bool] = False  # keep x and the state for backward, and nothing that is made of them

    @abstractmethod
    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The trained tensors of the state at a weight (O, I), by name."""

    @abstractmethod
    def structure(self, p: Any) -> Edit:
        """The edit, of the tensors of p."""

    def tensors(self, edit: Edit) -> Mapping[str, Tensor]:
        """The state's tensors, by name, of an edit of this kind."""
        return edit.tensors()

    def trained_count(self, shape: Shape) -> int:
        return sum(map(math.prod, self.shapes(shape).values()))

    def delta(self, p: Any) -> Tensor:
        like = next(getattr(p, name) for name in self.shapes(p.shape))
        return self.structure(p).delta(like.new_empty(()))

    def forward(self, p: Any, x: Tensor, below: Below) -> Tensor:
        y = below(x)
        return y + self.branch(p, x).to(y.dtype)

    def branch(self, p: Any, x: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._beside, p, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return self._beside(p, x)

    def _beside(self, p: Any, x: Tensor) -> Tensor:
        if p.operator.kind == "linear":
            return self.structure(p).times(x)
        return p.operator.product(x, self.delta(p))  # type: ignore[no-any-return]

    def state(self, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors as a state at the site: float32 or wider, what is trained as parameters."""
        wide, device = torch.promote_types(site.weight.dtype, torch.float32), site.weight.device
        trained = self.shapes(site.shape)
        return {
            name: nn.Parameter(tensor.detach().to(device, wide, copy=True)) if name in trained
            else tensor.detach().to(device, copy=True)
            for name, tensor in tensors.items()
        }  # fmt: skip

    def edit(self, p: Any) -> Edit:
        return self.structure(_Frozen(p, (*self.shapes(p.shape), *self.constants)))

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        trained, tensors = self.shapes(site.shape), {}
        try:
            tensors = dict(self.tensors(edit))
            found = {name: tuple(tensors[name].shape) for name in trained}
            again = self.structure(_Frozen(None, (), tensors, site.shape))
            fits = found == trained and (again.kind, again.facts()) == (edit.kind, edit.facts())
        except (AttributeError, KeyError, RuntimeError):
            fits = False
        if not fits:
            raise IntarsiaError(
                f"{site.name}: the file has a {edit.kind} edit that its own config does not make: {self}"
            )
        return self.state(site, tensors)


class _Frozen:
    """Copies of some tensors of p, or tensors that are given, as attributes."""

    def __init__(self, p: Any, names: tuple[str, ...], tensors: Mapping[str, Tensor] | None = None, shape: Any = None):
        self.shape = p.shape if shape is None else shape
        if tensors is None:
            tensors = {name: getattr(p, name).detach().clone() for name in names}
        for name, tensor in tensors.items():
            setattr(self, name, tensor)


def shared_out(count: int, weights: Tensor, most: int) -> Tensor:
    """``count`` shared out among rows in proportion to their weights, at most ``most`` to each: whole numbers with that very sum.

    What rounding down and the limit leave over is shared equally among the rows below the limit, and the last few go to those that
    have least, the first of them first. (n,) -> (n,) int64.
    """
    total = weights.sum()
    share = count * weights / total if total > 0 else torch.full_like(weights, count / len(weights))
    counts = share.floor().long().clamp_max(most)
    while left := count - int(counts.sum()):
        free = counts < most
        each = left // int(free.sum())
        if each:
            counts = torch.where(free, (counts + each).clamp_max(most), counts)
        else:
            order = torch.where(free, counts, most + 1).argsort(stable=True)
            counts[order[:left]] += 1
    return counts
