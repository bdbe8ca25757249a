"""The delta form: W' = W + delta(p), with a branch beside the base that never builds delta where it need not."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

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
