"""The delta form: W' = W + delta(p), with a branch beside the base that never builds delta where it need not."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from intarsia.method import Below, Method
from intarsia.operators import KINDS


class Delta(Method):
    """W' = W + delta(p). ``branch`` may avoid building delta and is tested against it."""

    kinds = frozenset(KINDS)

    @abstractmethod
    def delta(self, p: Any) -> Tensor:
        """(O, I), in the dtype of p."""

    def branch(self, p: Any, x: Tensor) -> Tensor:
        """The layer's product with delta instead of W, x delta^T in a Linear. (..., I) -> (..., O)."""
        return p.operator.product(x, self.delta(p))  # type: ignore[no-any-return]

    def forward(self, p: Any, x: Tensor, below: Below) -> Tensor:
        return below(x) + self.branch(p, x)

    def fold(self, p: Any, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W + self.delta(p), b


class Remade(Delta):
    """A delta that is too large to keep: formed in every forward and again in backward. Between them only x and the state are kept."""

    def product(self, p: Any, x: Tensor) -> Tensor:
        """What the branch is: the layer's product with delta."""
        return p.operator.product(x, self.delta(p).to(p.dtype))  # type: ignore[no-any-return]

    def branch(self, p: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.product(p, x)
        return checkpoint(self.product, p, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
