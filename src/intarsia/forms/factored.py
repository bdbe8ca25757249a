"""The factored form: two thin factors, perhaps a small core between them, and perhaps a start that is subtracted.

    W' = W + s (B C A - B0 C0 A0)

Shapes: O out_features, I in_features, r rank.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Set
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from intarsia.edits import Core, Edit, LowRank, thin
from intarsia.errors import IntarsiaError
from intarsia.forms.delta import Delta
from intarsia.site import Site
from intarsia.support import Shape


class Factored(Delta):
    """State: ``A`` (r, I), ``B`` (O, r), and where there is a core ``C`` (r, r), or (r,) for a diagonal; those that ``learns`` names train.
    Where the start is subtracted, also ``A0``, ``B0``, ``C0``: what those that train were at the start.

    A subtracted start is computed by the differences of the tensors (``edits.thin``), so that it costs no digits and starts at exactly 0.
    """

    rank: int | None  # None: that of the weight
    core: ClassVar[str] = "none"  # or "square", or "diagonal"

    @property
    @abstractmethod
    def scale(self) -> float:
        """s."""

    def rank_at(self, shape: Shape) -> int:
        """r at a weight of this shape."""
        return min(shape) if self.rank is None else self.rank

    def learns(self) -> str:
        """Letters of the tensors that train."""
        return "AB" if self.core == "none" else "ABC"

    def check(self, site: Site) -> str | None:
        rows, columns = site.shape
        if self.rank_at(site.shape) > min(site.shape):
            return f"{site.name}: rank={self.rank} is above {min(site.shape)}, the rank of a {rows} x {columns} weight"
        return None

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Of the tensors that make the update, by name."""
        r = self.rank_at(shape)
        cores: dict[str, dict[str, tuple[int, ...]]] = {"none": {}, "square": {"C": (r, r)}, "diagonal": {"C": (r,)}}
        return {"A": (r, shape[1]), "B": (shape[0], r), **cores[self.core]}

    def stays_wide(self) -> frozenset[str]:
        # What was learned is the difference from the start, of which bfloat16 would keep no digit.
        return frozenset({"A", "B", "C", "A0", "B0", "C0"})

    def trained_count(self, shape: Shape) -> int:
        return self._count(shape, set(self.learns()) - self.shares())

    def shared_count(self, shape: Shape) -> int:
        return self._count(shape, self.shares())

    def _count(self, shape: Shape, names: Set[str]) -> int:
        return sum(math.prod(size) for name, size in self.shapes(shape).items() if name in names)

    def begin(
        self, site: Site, made: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The state of these tensors; ``start``: what they were at the start, where that is subtracted."""
        wide, device = torch.promote_types(site.weight.dtype, torch.float32), site.weight.device

        def own(tensor: Tensor) -> Tensor:
            # In rows: a column-wise copy would multiply in another order than the same numbers read from a file.
            return tensor.detach().to(device, wide, copy=True, memory_format=torch.contiguous_format)

        state = {name: own(tensor) for name, tensor in made.items()}
        state |= {f"{name}0": own(tensor) for name, tensor in (start or {}).items() if name in self.learns()}
        return state | {name: nn.Parameter(state[name]) for name in made if name in self.learns()}

    def thin(self, p: Any) -> tuple[Tensor, Tensor]:
        """Two factors whose product, times s, is the change. -> (O, q), (q, I)."""
        if self.core == "none" and not hasattr(p, "A0"):  # as most are, in every forward
            wide = torch.promote_types(p.A.dtype, p.dtype)
            return p.B.to(wide), p.A.to(wide)
        return thin(self._part(p, ""), self._part(p, "0"), p.dtype)

    def _part(self, p: Any, end: str) -> dict[str, Tensor]:
        return {name: getattr(p, name + end) for name in "ABC" if hasattr(p, name + end)}

    def delta(self, p: Any) -> Tensor:
        B, A = self.thin(p)
        return self.scale * (B @ A)

    def branch(self, p: Any, x: Tensor) -> Tensor:
        B, A = (factor.to(p.dtype) for factor in self.thin(p))
        return self.scale * p.operator.low_rank(x, B, A)  # type: ignore[no-any-return]

    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.delta(p).to(W.dtype), b

    def edit(self, p: Any) -> Edit:
        now, start = ({k: t.detach().clone() for k, t in self._part(p, end).items()} for end in ("", "0"))
        if self.core == "none" and not start:
            return LowRank(p.shape, now["B"], now["A"], self.scale)
        return Core(p.shape, now, start, self.scale)

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        now = edit.now if isinstance(edit, Core) else edit.tensors() if isinstance(edit, LowRank) else {}
        start = edit.start if isinstance(edit, Core) else {}
        shapes = {name: tuple(tensor.shape) for name, tensor in now.items()}
        scale = getattr(edit, "scale", None)
        if (shapes, scale) != (self.shapes(site.shape), self.scale) or start.keys() - set(self.learns()):
            found = f"(rank, scale) {(now['A'].shape[0], scale)}" if now else f"a {edit.kind} edit"
            raise IntarsiaError(f"{site.name}: the file has {found}; its own config asks for {self}")
        return self.begin(site, now, start)
