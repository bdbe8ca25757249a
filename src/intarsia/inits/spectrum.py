"""The principal directions of a layer's inputs, found a batch at a time: an incremental singular value decomposition.

Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 3, as in scikit-learn's and PEFT's incremental
PCA: what is known so far, s_j v_j, is decomposed anew with each batch's rows below it; where the mean is taken out, one more row
carries how far it has moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 256  # a matrix no longer or wider than this is decomposed as a whole
ROUNDS, CLOSE = 30, 1e-6  # of subspace iteration, until no squared singular value moves by more than this share of it


@dataclass
class Spectrum:
    """An observer of inputs x (N, I): the first ``components`` right singular vectors of all of them.

    ``needed`` of them have to stand still, cos >= ``tau`` from one batch to the next, for it to be satisfied.
    """

    components: int
    tau: float = 0.99
    center: bool = True
    needed: int = field(init=False)
    V: Tensor | None = None  # (p, I), float32 or wider
    s: Tensor | None = None  # (p,)
    count: int = 0  # rows seen
    mean: Tensor | None = None  # (I,) float64
    energy: float = 0.0  # sum of all squares, about the mean where it is taken out
    still: Tensor | None = None  # (p,) whether each stood still at the last batch
    skipped: int = 0  # batches with fewer rows than components

    def __post_init__(self) -> None:
        self.needed = self.components

    @property
    def satisfied(self) -> bool:
        return self.needed == 0 or (self.still is not None and bool(self.still[: self.needed].all()))

    @property
    def explained(self) -> Tensor:
        """(p,) float64: the share of all that varies that lies along each direction."""
        assert self.s is not None
        return self.s.double().square() / max(self.energy, torch.finfo(torch.float64).tiny)

    def see(self, x: Tensor) -> None:
        """Take in the rows of one batch; one with fewer rows than components is left out."""
        p = min(self.components, x.shape[1])
        if x.shape[0] < p:
            self.skipped += 1
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = [x]
        if self.V is not None and self.s is not None:
            rows = [self.s[:, None] * self.V.to(x), *self._about_mean(x)]
        elif self.center:
            rows = self._about_mean(x)
        self._count(x)
        before, (s, V) = self.V, leading(torch.cat(rows), p)
        self.V, self.s = V, s
        if before is not None:
            self.still = F.cosine_similarity(V, before.to(V)) >= self.tau

    def _about_mean(self, x: Tensor) -> list[Tensor]:
        """The rows about their own mean, and how far that is from the mean so far."""
        if not self.center:
            return [x]
        mine = x.mean(0, dtype=torch.float64)
        if self.mean is None:
            return [x - mine.to(x)]
        weight = math.sqrt(self.count * len(x) / (self.count + len(x)))
        return [x - mine.to(x), (weight * (self.mean - mine)).to(x)[None]]

    def _count(self, x: Tensor) -> None:
        wide, mine = x.double(), x.mean(0, dtype=torch.float64)
        if not self.center:
            self.energy += float(wide.square().sum())
        else:
            before = torch.zeros_like(mine) if self.mean is None else self.mean
            all_of_them = self.count + len(x)
            self.energy += float((wide - mine).square().sum())
            self.energy += float((before - mine).square().sum()) * self.count * len(x) / all_of_them
            self.mean = before + (mine - before) * (len(x) / all_of_them)
        self.count += len(x)


def leading(X: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """The first p singular values and right singular vectors, signed so that the largest entry is positive. -> (p,), (p, I)."""
    if min(X.shape) <= max(WHOLE, 2 * p):
        _, s, V = torch.linalg.svd(X, full_matrices=False)
    else:
        s, V = _iterated(X, p)
    s, V = s[:p], V[:p]
    sign = V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
    return s, V * sign


def _iterated(X: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Subspace iteration with as many directions again as are wanted, from a start that is always the same."""
    q = min(2 * p + 8, *X.shape)
    start = torch.randn(X.shape[1], q, generator=torch.Generator().manual_seed(0))
    Q, before = torch.linalg.qr(start.to(X))[0], None
    for _ in range(ROUNDS):
        Y, R = torch.linalg.qr(X.mT @ (X @ Q))
        Q, now = Y, R.diagonal().abs()[:p]  # they go to the squared singular values
        if before is not None and bool(((now - before).abs() <= CLOSE * now).all()):
            break
        before = now
    _, s, V = torch.linalg.svd(X @ Q, full_matrices=False)
    return s, V @ Q.mT
