"""Model Breadcrumbs: neither the outliers nor the small.    D = lambda sum_i w_i m_i D_i

Davari and Belilovsky 2023, arXiv:2312.06795, section 3. m_i leaves out the share ``gamma`` of edit i that is largest in
size and keeps the share ``density`` that comes next. ``elect: total`` elects signs as in TIES (``breadcrumbs_ties``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.merge.elementwise import Elementwise
from intarsia.merge.rule import each, register
from intarsia.merge.thinning import between


@register
@dataclass(frozen=True)
class Breadcrumbs(Elementwise):
    density: float = each(0.5, "share of an edit's entries that is kept")
    gamma: float = each(0.01, "share of an edit's entries, the largest in size, that is left out as outliers")

    name, title, paper = "breadcrumbs", "Model Breadcrumbs", "arXiv:2312.06795"
    formula = "lambda sum w_i m_i D_i"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.gamma < 1, "gamma", "from 0 to below 1")

    def thin(self, own: Tensor, rows: Tensor, positions: Tensor, key: int) -> Tensor:
        return between(own, self.density, self.gamma)
