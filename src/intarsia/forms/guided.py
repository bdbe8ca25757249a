"""The guided form: a change that depends on the weight that it changes.    W' = W + g(p, W)"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from intarsia.forms.structured import Structured
from intarsia.method import Below


class Guided(Structured):
    """W is the weight of all that lies below. W' is built once in a forward, in float32 or wider, rounded once to what the layer
    computes in, and used in one product, so that y is to the bit what the weight set in gives. It is built anew in backward:
    kept between are x and the trained tensors, nothing of the size of the weight.

    A method whose edit needs the weight in some settings only says so by ``reads_weights_below``, and is computed beside the base, as
    any other :class:`Structured` one, in the others.
    """

    reads_weights_below = True

    def stays_wide(self) -> frozenset[str]:
        # W' is rounded once, as a whole.
        return frozenset(self.shapes((0, 0))) if self.reads_weights_below else frozenset()

    def forward(self, p: Any, x: Tensor, below: Below) -> Tensor:
        if not self.reads_weights_below:
            return super().forward(p, x, below)
        if not torch.is_grad_enabled():
            return self._product(p, x, below)
        return checkpoint(partial(self._product, below=below), p, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def _product(self, p: Any, x: Tensor, below: Below) -> Tensor:
        W, b = below.weights(torch.promote_types(p.dtype, torch.float32))
        changed = self.structure(p).fold(W).to(p.dtype)
        return p.operator.product(x, changed, None if b is None else b.to(p.dtype))  # type: ignore[no-any-return]

    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.structure(p).fold(W), b
