"""EVA: LoRA that starts in the directions of its inputs, rank where they explain most.    dW = s B A,  A = v_1 .. v_r of X

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", arXiv:2410.07170,
section 3. The initialiser ``eva`` with its options; how it works and where it deviates is told in ``intarsia.inits.eva``.
Trained: r (O + I) numbers a weight, r a weight's own rank, on the average over all weights ``rank``.  B = 0 at the start, as LoRA.

It needs data: some batches of what it will be trained on.  Learning rate: LoRA's, not measured here; the paper's is 5e-4.
"""

from dataclasses import dataclass

from intarsia.inits.eva import CENTER, RHO, TAU, WHITEN
from intarsia.method import option
from intarsia.methods.lora import Lora
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Eva(Lora):
    start: str = option("eva", "how A and B start: eva")
    rho: float = option(RHO, "a weight gets at most rho times the average rank; 1: all get the same")
    tau: float = option(TAU, "cosine from one batch to the next at which a direction stands still")
    whiten: bool = option(
        WHITEN, "divide each direction by the root of its singular value, which grows with the tokens seen"
    )
    center: bool = option(CENTER, "take the mean out of the inputs, as HF PEFT does")

    name, title, paper, role = "eva", "EVA", "arXiv:2410.07170", "init"
    formula = "W' = W + s B A, A = v_1 .. v_r of X"
    small = ({"rank": 2}, {"rank": 3, "rho": 1.0, "alpha": 4.0, "center": True, "whiten": True})

    def __post_init__(self):
        super().__post_init__()
        self.require(self.start == "eva", "start", "eva; lora has the others")
        self.require(self.rho >= 1, "rho", "1 or more")
        self.require(0 < self.tau <= 1, "tau", "in (0, 1]")
