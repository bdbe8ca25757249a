"""SHiRA: train a few entries of W itself.    W' = W + s * scatter(values, index)

Bhardwaj et al. 2024, "Sparse High Rank Adapters", arXiv:2406.13175, section 3; masks in section 3.1.
Trained: round(density * O * I) numbers a weight (larger units: round(density * units) * entries in one; other budgets: see
intarsia.support.budgets).  values = 0 at the start.

Scorers (the paper's masks): random (Rand), magnitude (WM), gradient (Grad), snip (SNIP), struct (Struct: the diagonal
and evenly spaced rows); the others are in intarsia.support.scorers.  Deviations: the paper trains with s = 1; here s follows from density and shape, so that
LoRA's learning rates serve (``scale=1.0`` is the paper); Struct trains exactly the budget, the last row in part;
the calibration size, not fixed in the paper, is whatever data is given; ties go to the lower index.
"""

import math
from dataclasses import dataclass

from intarsia.forms import SCHEDULES, SCORER_NAMES, Chosen, auto_scale
from intarsia.method import option
from intarsia.registry import register
from intarsia.support import BUDGETS, CROWDED, GRANULARITIES


@register
@dataclass(frozen=True)
class Shira(Chosen):
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
    budget: str = option("weight", "whose share it is: " + ", ".join(BUDGETS))
    schedule: str = option("fixed", "whether the support moves in training: " + ", ".join(SCHEDULES))
    every: int = option(20, "drop-and-grow: optimizer steps between two moves")
    swap: float = option(0.2, "drop-and-grow: share of the support that moves at first; 0 at three quarters of the run")

    name, title, paper = "shira", "SHiRA", "arXiv:2406.13175"
    formula, trained = "W' = W + s * scatter(values, index)", "density * O * I"
    default_lr = 4e-3
    small = (*({"density": 0.1, "scorer": s} for s in ("random", "struct", "magnitude", "snip", "wanda", "fisher", "residual",
                                                        "intarsia.support.scorers:gradient")),
             {"density": 0.1, "scale": 3.0}, {"density": 0.1, "budget": "neuron"}, {"density": 0.1, "schedule": "drop-and-grow"},
             *({"density": 0.1, "scorer": "snip", "budget": b} for b in ("neuron", "model", "layer")),
             *({"density": 0.2, "granularity": g} for g in ("column", "row", "diagonal")),
             *({"density": 0.3, "granularity": g, "width": 4} for g in ("line", "tile", "column", "row")))  # fmt: skip

    def __post_init__(self):
        self.require_support()
        self.require(self.scale == "auto" or (isinstance(self.scale, float | int) and 0 < self.scale < math.inf),
                     "scale", "'auto' or a positive number")  # fmt: skip

    def scale_of(self, shape, trained):
        if self.scale != "auto":
            return float(self.scale)
        # Entries chosen by gradient or input crowd into a few rows and columns, so the same step weighs more: docs/learning-rate.md.
        return auto_scale(shape, trained, self.granularity_at(shape)) / (8 if self.scorer in CROWDED else 1)
