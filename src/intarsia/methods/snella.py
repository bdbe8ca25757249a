"""SNELLA: SNELL with a richer kernel and layers that compete.    dW = sparsify(D + alpha softmax(D / gamma) + beta), as many zeros as the layer is given

Shen et al. 2025, "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models", arXiv:2510.24037, section 3.
Trained: r (O + I) + 3 numbers a weight; alpha, gamma, beta start as 1, 1, 0; the softmax runs over the outputs of each input.

How many entries of each layer are 0 is part of the state. It starts at ``sparsity`` everywhere, and stays there unless an
:class:`intarsia.allocators.Competition` moves it: it scores the layers by the smoothed sensitivity of their factors, and splits a
number of entries among them that falls from all those at ``sparsity`` 0 to those at the target.
Deviations, beside those of SNELL: where a layer has no zeros the factor |d| - t stays (t = 0), so that dW does not jump when the
competition begins. The paper's text was not at hand; the kernel is that of the authors' code.
"""

from dataclasses import dataclass

from intarsia.methods.snell import Snell
from intarsia.registry import register


@register
@dataclass(frozen=True)
class Snella(Snell):
    name, title, paper = "snella", "SNELLA", "arXiv:2510.24037"
    formula, trained = "W' = W + sparsify(D + a softmax(D / c) + b)", "r (O + I) + 3"
    default_lr = 6e-2
    small = ({"rank": 4}, {"rank": 2, "sparsity": 0.5, "rule": "square", "zero_start": True}, {"rank": 4, "sparsity": 0.0},
             {"rank": 4, "sparsity": 0.8, "rule": "hard"})  # fmt: skip

    def mix_at_start(self):
        return 1.0, 1.0, 0.0

    def moves_zeros(self):
        return True
