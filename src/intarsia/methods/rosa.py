"""RoSA: a few entries of W itself, and a low-rank update beside them.    W' = W + s1 scatter(values, index) + s2 B A

Nikdan et al. 2024, "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation", arXiv:2401.04679, section 4.
Trained: round(density * O * I) + r (O + I) numbers a weight.  values = 0 and B = 0 at the start; A as LoRA's.

The scorer is what tells its relatives apart, which are named variants: RoSA takes the largest mean squares of the gradient (fisher;
``scorer="gradient"`` is its mean), Supra (arXiv:2607.09287) the largest weights (magnitude), SLTrain (arXiv:2406.02214) any (random).
Deviations: the support is chosen on the base before training, as the authors' code does by default, not after 64 steps of LoRA
alone, as in the paper; s1 follows from density and shape as SHiRA's does (``scale=1.0`` is the papers); Supra's Wanda scores
are ``scorer="wanda"``, over the weight and not by rows.
SLTrain here is the adapter form: W stays below, and its values start at 0. Left out is what makes it a way to pre-train: W gone from
memory, values ~ U(-1, 1) / sqrt(I), and W = B A + S built for a product and thrown away after it.
The learning rate is that of both parts alone; it is not measured for the two together on a language model.
"""

from dataclasses import dataclass
from typing import ClassVar

from intarsia.forms import SCORER_NAMES, Pair
from intarsia.method import option
from intarsia.methods.lora import Lora
from intarsia.methods.shira import Shira
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Rosa(Pair):
    rank: int = option(8, "rank r of the low-rank part")
    density: float = option(0.003, "share of the entries that is trained, in (0, 1]")
    scorer: str = option("fisher", "what chooses them: " + ", ".join(SCORER_NAMES))
    alpha: float | None = option(None, "the low-rank part is multiplied by alpha / r; none: 2 r")
    scaling: str = option("lora", "lora: alpha / r, rslora: alpha / sqrt(r), none: alpha")
    scale: float | str = option(
        "auto", "factor in front of the values; 'auto' fits density and shape, 1.0 is the paper"
    )

    name, title, paper = "rosa", "RoSA", "arXiv:2401.04679"
    formula, trained = "W' = W + S + s B A", "density * O * I + r (O + I)"
    default_lr = 4e-3
    small = ({"rank": 2, "density": 0.1}, {"rank": 2, "density": 0.1, "scorer": "random", "scaling": "rslora"})
    expected: ClassVar = {
        "keeps what it declares": "beside what the sparse part keeps, the low-rank one keeps x and x A^T"
    }

    def __post_init__(self):
        self.join(Shira(self.density, self.scorer, scale=self.scale), Lora(self.rank, self.alpha, self.scaling))
