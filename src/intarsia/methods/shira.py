"""SHiRA: train a few entries of W itself.    W' = W + s * scatter(values, index)

Bhardwaj et al. 2024, "Sparse High Rank Adapters", arXiv:2406.13175, section 3; masks in section 3.1.
Trained: round(density * O * I) numbers a weight (larger units: round(density * units) * entries in one).  values = 0 at the start.

Scorers (the paper's masks): random (Rand), magnitude (WM), gradient (Grad), snip (SNIP), struct (Struct: the diagonal
and evenly spaced rows).  Deviations: the paper trains with s = 1; here s follows from density and shape, so that
LoRA's learning rates serve (``scale=1.0`` is the paper); Struct trains exactly the budget, the last row in part;
the calibration size, not fixed in the paper, is whatever data is given; ties go to the lower index.
"""

import math
from dataclasses import dataclass

from intarsia.forms import Sparse, auto_scale
from intarsia.method import option
from intarsia.registry import register
from intarsia.support import CROWDED, GRANULARITIES, OUTSIDE, SCORERS, choose, is_scorer, named_granularity, needs_of

SCORER_NAMES = ("random", "struct", *SCORERS, OUTSIDE)


@register
@dataclass(frozen=True)
class Shira(Sparse):
    density: float = option(0.01, "share of the entries that is trained, in (0, 1]")
    scorer: str = option("random", "what chooses them: " + ", ".join(SCORER_NAMES))
    granularity: str = option("element", "what is chosen: " + ", ".join(GRANULARITIES))
    width: int | None = option(
        None, "entries in a line or along a tile's side, rows or columns in a unit; none: 32, 32, 1, 1"
    )
    scale: float | str = option(
        "auto", "factor in front of the values; 'auto' fits density and shape, 1.0 is the paper"
    )
    offset: int = option(0, "struct: first row, so that adapters with different offsets overlap little")

    name, title, paper = "shira", "SHiRA", "arXiv:2406.13175"
    formula, trained = "W' = W + s * scatter(values, index)", "density * O * I"
    default_lr = 4e-3
    small = (*({"density": 0.1, "scorer": s} for s in ("random", "struct", "magnitude", "snip", "wanda", "fisher", "residual",
                                                        "intarsia.support.scorers:gradient")),
             {"density": 0.1, "scale": 3.0},
             *({"density": 0.2, "granularity": g} for g in ("column", "row", "diagonal")),
             *({"density": 0.3, "granularity": g, "width": 4} for g in ("line", "tile", "column", "row")))  # fmt: skip

    def __post_init__(self):
        self.require(0 < self.density <= 1, "density", "in (0, 1], a share of the entries")
        self.require(self.scorer in ("random", "struct") or is_scorer(self.scorer), "scorer",
                     "one of " + ", ".join(SCORER_NAMES))  # fmt: skip
        self.require(self.granularity in GRANULARITIES, "granularity", "one of " + ", ".join(GRANULARITIES))
        named_granularity(self.granularity, self.width)  # raises for a width that cannot be
        self.require(self.scale == "auto" or (isinstance(self.scale, float | int) and 0 < self.scale < math.inf),
                     "scale", "'auto' or a positive number")  # fmt: skip
        self.require(self.granularity == "element" or self.scorer != "struct", "scorer",
                     "another one with larger units: struct chooses entries")  # fmt: skip
        self.require(self.offset >= 0, "offset", "0 or a row number")

    def granularity_at(self, shape):
        return named_granularity(self.granularity, self.width)

    def units(self, shape):
        return round(self.density * self.granularity_at(shape).units(shape))

    def scale_at(self, shape):
        if self.scale != "auto":
            return float(self.scale)
        # Entries chosen by gradient crowd into a few rows and columns, so the same step weighs more: docs/learning-rate.md.
        return auto_scale(shape, self.trained_count(shape)) / (8 if self.scorer in CROWDED else 1)

    def choose(self, site, start):
        return choose(self.granularity_at(site.shape), self.scorer, self.units(site.shape), site, start, self.offset)

    def needs(self):
        return frozenset() if self.scorer in ("random", "struct") else needs_of(self.scorer)
