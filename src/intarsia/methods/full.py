"""Full fine-tuning: every entry of a weight is trained.    W' = W + values

What the others are compared with; no paper of its own (as in Howard and Ruder 2018, arXiv:1801.06146, without its schedules).
Trained: O I numbers a weight.  values = 0 at the start.

It is the sparse form with whole rows, all of them, and scale 1: the weight holds the values while it trains, the gradient of
``values`` (O, I) is that of the weight, and an optimizer such as GaLore sees it as such. The masters are float32 (the change,
not the weight), so a small step is not lost on a bfloat16 base, weight decay pulls towards the base, and the base returns to the
bit. Deviation: only the targeted weights are trained, no biases and no norms.
``default_lr`` is what is usual for full fine-tuning with AdamW; it was not measured here.
"""

from dataclasses import dataclass

from intarsia.forms import Sparse
from intarsia.registry import register
from intarsia.support import Row, choose


@register
@dataclass(frozen=True)
class Full(Sparse):
    name, title, paper = "full", "Full fine-tuning", "arXiv:1801.06146"
    formula, trained = "W' = W + values", "O I"
    default_lr = 1e-4
    moves_support = avoids = False

    def granularity_at(self, shape):
        return Row()

    def units(self, shape):
        return shape[0]

    def scale_at(self, shape):
        return 1.0

    def choose(self, site, start):
        return choose(Row(), "random", site.shape[0], site, start)
