"""DARE: drop at random, and rescale.    D = lambda sum_i w_i b_i D_i / density,  b_i ~ Bernoulli(density) at every entry

Yu et al. 2023, arXiv:2311.03099, section 3. With ``elect: total`` the signs are elected as in TIES (``dare_ties``).
What is kept is divided by the density, as in the paper and in PEFT; ``rescale: l1`` is what mergekit does, one factor that
gives the sum of the sizes back. Whether an entry is kept depends on the seed, the adapter's name, the weight's name and the
entry's position, and on nothing else: a sparse edit and the same one written densely are thinned out alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.merge.elementwise import Elementwise
from intarsia.merge.rule import each, register
from intarsia.merge.thinning import RESCALES, rescaled
from intarsia.method import option
from intarsia.support import uniform


@register
@dataclass(frozen=True)
class Dare(Elementwise):
    density: float = each(0.5, "probability with which an entry of an edit is kept")
    rescale: str = option(
        "expectation", "of what is kept: expectation: by 1 / density, l1: to the old sum of sizes, none"
    )

    name, title, paper = "dare", "DARE", "arXiv:2311.03099"
    draws = True
    formula = "lambda sum w_i b_i D_i / density"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rescale in RESCALES, "rescale", f"one of {', '.join(RESCALES)}")

    def thin(self, own: Tensor, rows: Tensor, positions: Tensor, key: int) -> Tensor:
        if self.density >= 1:
            return own
        return rescaled(own * (uniform(positions, key) < self.density), own, self.density, self.rescale)
