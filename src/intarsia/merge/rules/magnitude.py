"""Magnitude pruning, then the weighted sum.    D = lambda sum_i w_i trim_i

trim_i keeps the share ``density`` of edit i that is largest in size (Han et al. 2015, arXiv:1506.02626, of whole networks): TIES
without the election, and PEFT's ``magnitude_prune``. On one adapter alone it prunes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.merge.elementwise import Elementwise
from intarsia.merge.rule import each, register
from intarsia.merge.thinning import largest


@register
@dataclass(frozen=True)
class Magnitude(Elementwise):
    density: float = each(0.5, "share of an edit's entries that is kept, the largest in size")

    name, title, paper = "magnitude", "Magnitude pruning", "arXiv:1506.02626"
    formula = "lambda sum w_i trim_i"

    def thin(self, own: Tensor, rows: Tensor, positions: Tensor, key: int) -> Tensor:
        return largest(own, self.density)
