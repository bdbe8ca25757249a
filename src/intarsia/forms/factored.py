"""The factored form: an update of low rank that may start elsewhere than at 0.    W' = W + s (B A - B0 A0)

Shapes: O out_features, I in_features, r rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.edits import Edit, LowRank, Sum
from intarsia.errors import IntarsiaError
from intarsia.forms.delta import Delta
from intarsia.site import Site
from intarsia.support import Shape


class Factored(Delta):
    """State: ``A`` (r, I), ``B`` (O, r); ``A0``, ``B0``, what they were at the start, where that is subtracted.

    B A - B0 A0 is computed as (B - B0) A + B0 (A - A0): exactly 0 at the start, and no difference of two large numbers after it.
    """

    rank: int

    @property
    @abstractmethod
    def scale(self) -> float:
        """s."""

    def check(self, site: Site) -> str | None:
        rows, columns = site.shape
        if self.rank > min(site.shape):
            return f"{site.name}: rank={self.rank} is above {min(site.shape)}, the rank of a {rows} x {columns} weight"
        return None

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Of the tensors of the state that make the update, by name."""
        return {"A": (self.rank, shape[1]), "B": (shape[0], self.rank)}

    def stays_wide(self) -> frozenset[str]:
        # What was learned is the difference from the start, of which bfloat16 would keep no digit.
        return frozenset({"A", "B", "A0", "B0"})

    def trained_count(self, shape: Shape) -> int:
        return self.rank * (shape[0] + shape[1])

    def begin(
        self, site: Site, made: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The state of these tensors; ``start``: what they were at the start, where that is subtracted."""
        wide, device = torch.promote_types(site.weight.dtype, torch.float32), site.weight.device
        state: dict[str, Tensor] = {k: nn.Parameter(t.to(device, wide, copy=True)) for k, t in made.items()}
        return state | {f"{k}0": t.to(device, wide, copy=True) for k, t in (start or {}).items()}

    def thin(self, p: Any) -> tuple[Tensor, Tensor]:
        """Two factors whose product, times s, is the change. -> (O, q), (q, I)."""
        A, B = (t.to(torch.promote_types(t.dtype, p.dtype)) for t in (p.A, p.B))
        if not hasattr(p, "A0"):
            return B, A
        A0, B0 = p.A0.to(A.dtype), p.B0.to(B.dtype)
        return torch.cat([B - B0, B0], 1), torch.cat([A, A - A0])

    def delta(self, p: Any) -> Tensor:
        B, A = self.thin(p)
        return self.scale * (B @ A)

    def branch(self, p: Any, x: Tensor) -> Tensor:
        B, A = (factor.to(p.dtype) for factor in self.thin(p))
        return self.scale * p.operator.low_rank(x, B, A)  # type: ignore[no-any-return]

    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.delta(p).to(W.dtype), b

    def edit(self, p: Any) -> Edit:
        now = LowRank(p.shape, p.B.detach().clone(), p.A.detach().clone(), self.scale)
        if not hasattr(p, "A0"):
            return now
        return Sum(p.shape, (now, LowRank(p.shape, p.B0.clone(), p.A0.clone(), -self.scale)))

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        parts = edit.parts if isinstance(edit, Sum) else (edit,)
        found = [(part.A.shape[0], part.scale) if isinstance(part, LowRank) else part.kind for part in parts]
        if found != [(self.rank, self.scale), (self.rank, -self.scale)][: len(found)]:
            raise IntarsiaError(
                f"{site.name}: the file has (rank, scale) {', '.join(map(str, found))}; its own config asks for {self}"
            )
        return self.begin(site, *(part.tensors() for part in parts))
