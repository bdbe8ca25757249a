"""PaCA: train random input columns of W in place.    W'[:, I] = W[:, I] + s * values

Woo et al. 2025, "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", arXiv:2503.01905, section 3.
Trained: rank * O numbers a weight.  values = 0 at the start; only x[..., I] is kept for the backward pass.

``parameterization="delta"`` (default) trains the change, so that weight decay pulls towards the base;
``"columns"`` trains W[:, I] / s itself as the authors' code does, and weight decay then shrinks pretrained columns.
Deviations: s is alpha / rank where alpha is given, else it follows from rank and shape (one learning rate for all);
the authors' layer refreshes its columns only in some training forwards and cannot give the base back; here they are
current after every optimizer step and the base returns to the bit.
"""

import math
from dataclasses import dataclass

from intarsia.forms import Sparse, auto_scale
from intarsia.method import option
from intarsia.registry import register
from intarsia.support import Column, choose

SELECT = {"random": "random", "weight_norm": "magnitude", "grad_norm": "gradient"}


@register
@dataclass(frozen=True)
class Paca(Sparse):
    rank: int = option(8, "input columns that are trained in every weight")
    alpha: float | None = option(None, "the values are multiplied by alpha / rank; none: fits rank and shape")
    select: str = option("random", "what chooses the columns: " + ", ".join(SELECT))
    parameterization: str = option(
        "delta", "what is trained: delta (the change) or columns (the weights, as published)"
    )

    name, title, paper = "paca", "PaCA", "arXiv:2503.01905"
    formula, trained = "W'[:, I] = W[:, I] + s * values", "rank * O"
    default_lr = 4e-3
    small = ({"rank": 3}, {"rank": 3, "alpha": 6.0, "parameterization": "columns"}, {"rank": 2, "select": "weight_norm"},
             {"rank": 2, "select": "grad_norm"})  # fmt: skip

    def __post_init__(self):
        self.require(self.rank >= 1, "rank", "1 or more")
        self.require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "positive, or none")
        self.require(self.select in SELECT, "select", "one of " + ", ".join(SELECT))
        self.require(self.parameterization in ("delta", "columns"), "parameterization", "delta or columns")

    def granularity_at(self, shape):
        return Column()

    def units(self, shape):
        return self.rank

    def scale_at(self, shape):
        return self.alpha / self.rank if self.alpha else auto_scale(shape, self.trained_count(shape), Column())

    def choose(self, site, start):
        return choose(Column(), SELECT[self.select], self.rank, site, start)

    def needs(self):
        return frozenset({"gradient"} if self.select == "grad_norm" else ())

    def trains_weights(self):
        return self.parameterization == "columns"
