"""SNELLA: SNELL with a richer kernel and layers that compete.    dW = sparsify(D + alpha softmax(D / gamma) + beta), as many zeros as the layer is given

Shen et al. 2025, "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models", arXiv:2510.24037, section 3.
Trained: r (O + I) + 3 numbers a weight; alpha, gamma, beta start as 1, 1, 0; the softmax runs over the outputs of each input.

How many entries of a layer are 0 is part of its state. It starts at ``sparsity`` everywhere and stays there, unless
:func:`intarsia.allocators.reallocate` is called after the steps, as ``intarsia train`` does: a number of entries that falls from
``start_sparsity`` to ``sparsity`` is split among the layers by the sensitivity times uncertainty of their factors, smoothed over the steps.
Deviations, beside those of SNELL: where a layer has no zeros the factor |d| - t stays (t = 0), so that dW does not jump when the
competition begins; steps are the clock (the released script counts epochs); left-over entries are shared out exactly.
In small regression nets of which one layer was replaced, that layer got nearly all entries, and the fit was no better than with even ones.
The paper's text was not at hand; kernel and competition are those of the authors' code. Learning rate: see SNELL.
"""

from dataclasses import dataclass

import torch

from intarsia.forms import falling, smooth
from intarsia.method import option
from intarsia.methods.snell import Snell
from intarsia.registry import register
from intarsia.support import proportional


@register
@dataclass(frozen=True)
class Snella(Snell):
    start_sparsity: float = option(0.0, "share of zeros over all layers where the competition begins, in [0, 1)")
    every: int = option(20, "optimizer steps from one split among the layers to the next")
    warmup: float = option(0.0, "share of the run at the start in which all layers have the same share")
    hold: float = option(0.1, "share of the run at the end in which the number of entries stays at the target")
    smoothing: float = option(0.85, "how much of sensitivity and uncertainty is kept from step to step, in [0, 1)")

    name, title, paper = "snella", "SNELLA", "arXiv:2510.24037"
    formula, trained = "W' = W + sparsify(D + a softmax(D / c) + b)", "r (O + I) + 3"
    default_lr, allots = 6e-2, "entries"
    small = ({"rank": 4}, {"rank": 2, "sparsity": 0.5, "rule": "square", "zero_start": True}, {"rank": 4, "sparsity": 0.0},
             {"rank": 4, "sparsity": 0.8, "rule": "hard"})  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        self.require(0 <= self.start_sparsity <= self.sparsity, "start_sparsity", f"from 0 to sparsity={self.sparsity}")
        self.require(self.every >= 1, "every", "1 or more")
        self.require(0 <= self.warmup < 1, "warmup", "in [0, 1), a share of the run")
        self.require(0 <= self.hold <= 1 - self.warmup, "hold", "a share of what the warm-up leaves of the run")
        self.require(0 <= self.smoothing < 1, "smoothing", "in [0, 1)")

    def mix_at_start(self):
        return 1.0, 1.0, 0.0

    def moves_zeros(self):
        return True

    def stays_wide(self):
        return super().stays_wide() | {f"{what}_{name}" for what in ("importance", "spread") for name in "AB"}

    def _state(self, *made):
        state = super()._state(*made)
        return state | {
            f"{what}_{k}": torch.zeros_like(state[k].detach()) for what in ("importance", "spread") for k in "AB"
        }

    def before_step(self, p):
        for name in "AB":
            P, importance, spread = (getattr(p, f"{what}{name}") for what in ("", "importance_", "spread_"))
            if P.grad is not None:
                smooth(importance, spread, (P * P.grad).abs(), self.smoothing)

    def budget(self, step, steps, size):
        """N, how many of ``size`` entries are not 0 after a step: a cubic from the end of the warm-up to where ``hold`` begins."""
        start, target = ((1 - share) * size for share in (self.start_sparsity, self.sparsity))
        return falling(step, self.warmup * steps, (1 - self.hold) * steps, start, target)

    def score(self, p):
        """The importance of a layer: the mean over A of sensitivity * uncertainty, and that over B."""
        return sum(float((getattr(p, f"importance_{k}") * getattr(p, f"spread_{k}")).double().mean()) for k in "AB")

    def reallocate(self, states, step, steps):
        if step > 1 and step % self.every and step != steps:
            return {}
        sizes = {site: p.shape[0] * p.shape[1] for site, p in states.items()}
        even = step <= self.warmup * steps
        scores = {site: float(sizes[site]) if even else self.score(p) for site, p in states.items()}
        counts = proportional(scores, sizes, self.budget(step, steps, sum(sizes.values())))
        for site, p in states.items():
            p.zeros.fill_(sizes[site] - counts[site])
        return counts
