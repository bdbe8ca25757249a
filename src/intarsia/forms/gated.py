"""The gated form: a factor with a gate for every rank.    W' = W + s B diag(g) A;  a rank whose gate is 0 is no part of the edit

Shapes: O out_features, I in_features, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.edits import Edit, LowRank
from intarsia.errors import IntarsiaError
from intarsia.forms.factored import Factored
from intarsia.site import Site
from intarsia.support import Shape


class Gated(Factored):
    """State: ``A`` (r, I), ``B`` (O, r) and ``gate`` (r,). A finished edit has fewer ranks, and is restored with gates of 1."""

    def trained_count(self, shape: Shape) -> int:
        return super().trained_count(shape) + self.rank_at(shape)

    def gated(self, site: Site, factors: Mapping[str, Tensor], gate: Tensor) -> dict[str, Tensor]:
        """The state of these tensors."""
        state = self.begin(site, factors)
        return state | {"gate": nn.Parameter(gate.to(state["A"], copy=True))}

    def stays_wide(self) -> frozenset[str]:
        return super().stays_wide() | {"gate"}

    def thin(self, p: Any) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(p.B.dtype, p.dtype)
        return (p.B * p.gate).to(wide), p.A.to(wide)  # multiplied in the dtype that is stored, as in the edit

    def edit(self, p: Any) -> Edit:
        left = p.gate.detach() != 0
        return LowRank(p.shape, (p.B * p.gate).detach()[:, left], p.A.detach()[left], self.scale)

    def restore(self, edit: Edit, site: Site) -> dict[str, Tensor]:
        found = (len(edit.A), edit.scale) if isinstance(edit, LowRank) else (edit.kind, None)
        if not isinstance(edit, LowRank) or edit.scale != self.scale or len(edit.A) > self.rank_at(site.shape):
            raise IntarsiaError(
                f"{site.name}: the file has (rank, scale) {found}, which its own config does not make: {self}"
            )
        return self.gated(site, edit.tensors(), torch.ones(len(edit.A)))
