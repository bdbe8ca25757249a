"""DELLA: drop at random, the small ones sooner, elect signs.    b_ij ~ Bernoulli(density + epsilon (2 rank_ij - 1))

Deep, Bhardwaj and Poria 2024, arXiv:2406.11617, section 3 (MAGPRUNE). rank_ij is where an entry stands among those of its
row by size, 0 the smallest and 1 the largest, so that entries are kept with probabilities from density - epsilon to
density + epsilon. What is kept is divided by its probability, as in the paper; ``rescale: l1`` is what mergekit does. Signs
are elected and the weights normalized as in TIES; ``elect: none, normalize: false`` is mergekit's ``della_linear``. A draw
depends on seed, names and position alone, as in DARE.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.merge.elementwise import Elementwise
from intarsia.merge.rule import each, register
from intarsia.merge.thinning import RESCALES, ranks_in_rows, rescaled
from intarsia.method import option
from intarsia.support import uniform


@register
@dataclass(frozen=True)
class Della(Elementwise):
    density: float = each(0.5, "probability with which an entry of an edit is kept, on average")
    epsilon: float = each(
        0.15, "the largest of a row are kept with density + epsilon, the smallest with density - epsilon"
    )
    rescale: str = option(
        "expectation", "of what is kept: expectation: by 1 / probability, l1: to the old sum of sizes, none"
    )
    elect: str = option(
        "total", "signs by which entries take part: total: that of the sum, frequency: of the most, none: all do"
    )
    normalize: bool = option(True, "divide by the sum of the weights of those that take part")

    name, title, paper = "della", "DELLA", "arXiv:2406.11617"
    draws = True
    formula = "lambda sum [sign = s] w_i b_i D_i / p_i / sum [sign = s] w_i"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rescale in RESCALES, "rescale", f"one of {', '.join(RESCALES)}")
        inside = self.density in (0, 1) or self.epsilon < min(self.density, 1 - self.density)
        self.require(
            self.epsilon >= 0 and inside,
            "epsilon",
            f"0 or more, with density +- epsilon between 0 and 1 (density={self.density})",
        )

    def thin(self, own: Tensor, rows: Tensor, positions: Tensor, key: int) -> Tensor:
        if self.density in (0, 1):
            return own * self.density
        probability = self.density - self.epsilon + 2 * self.epsilon * ranks_in_rows(own, rows)
        return rescaled(own * (uniform(positions, key) < probability), own, probability, self.rescale)
