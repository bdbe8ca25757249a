"""TIES: trim, elect signs, merge.    D = lambda sum_i [sign = s] w_i trim_i / sum_i [sign = s] w_i,  s = sign(sum_i w_i trim_i)

Yadav et al. 2023, arXiv:2306.01708, section 3. trim_i keeps the share ``density`` of edit i that is largest in size; at
each entry only those adapters count whose sign is the elected one. A tie is positive, as in the authors' code.
The weights take part in the election, as in mergekit; with equal ones this is the paper's rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.merge.elementwise import Elementwise
from intarsia.merge.rule import each, register
from intarsia.merge.thinning import largest
from intarsia.method import option


@register
@dataclass(frozen=True)
class Ties(Elementwise):
    density: float = each(0.5, "share of an edit's entries that is kept, the largest in size")
    elect: str = option(
        "total", "signs by which entries take part: total: that of the sum, frequency: of the most, none: all do"
    )
    normalize: bool = option(True, "divide by the sum of the weights of those that take part")

    name, title, paper = "ties", "TIES", "arXiv:2306.01708"
    formula = "lambda sum [sign = s] w_i trim_i / sum [sign = s] w_i"

    def thin(self, own: Tensor, rows: Tensor, positions: Tensor, key: int) -> Tensor:
        return largest(own, self.density)
