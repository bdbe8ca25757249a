"""Low-rank sum, compressed again.    D = lambda sum_i w_i s_i B_i A_i = B A,  cut to its ``rank`` largest singular values

The ranks are put side by side, which is exact; with B = Q_B R_B and A^T = Q_A R_A the singular values of the sum are those of
the small matrix R_B R_A^T, so that no (O, I) matrix is built. By Eckart and Young no B A of that rank is nearer in the Frobenius
norm; what is lost, sqrt(sum of the squares left out), is told. Without ``rank`` only singular values at rounding's size are
left out. Sums that are not of low rank are multiplied out first and need a ``rank``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from intarsia.edits import Edit, LowRank, add, scale, to_dense
from intarsia.errors import IntarsiaError
from intarsia.interop.approximation import best
from intarsia.interop.views import as_low_rank
from intarsia.merge.elementwise import total_weight
from intarsia.merge.rule import Merged, Rule, Term, Where, register, wide
from intarsia.method import option


@register
@dataclass(frozen=True)
class Svd(Rule):
    rank: int | None = option(None, "rank of what is made; none: as many as it takes to lose nothing")
    normalize: bool = option(False, "divide by the sum of the weights")

    name, title, paper = "svd", "Low-rank sum with SVD", "https://doi.org/10.1007/BF02288367"
    formula = "SVD_rank(lambda sum w_i D_i)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rank is None or self.rank >= 1, "rank", "1 or more")

    def merge(self, terms: Sequence[Term], where: Where) -> Merged:
        by = total_weight(where) if self.normalize else 1.0
        parts = [as_low_rank(scale(term.edit, term.weight / by)) for term in terms]
        low = [part for part in parts if isinstance(part, LowRank)]
        total = add(*low) if len(low) == len(parts) else None
        if isinstance(total, LowRank) and total.A.shape[0] <= min(total.shape):
            return recompressed(total, self.rank)
        return self._dense(add(*(scale(term.edit, term.weight / by) for term in terms)), where)

    def _dense(self, total: Edit, where: Where) -> Merged:
        if self.rank is None and not isinstance(as_low_rank(total), LowRank):
            raise IntarsiaError(
                f"{where.name}: the sum ({total.kind}) is not of low rank; give svd a rank (parameters.rank=16), or take the "
                "rule sum, which loses nothing"
            )
        D = to_dense(total, dtype=wide(total))
        B, A, error = best(D, self.rank or min(D.shape))
        return Merged(LowRank(total.shape, B, A, 1.0), error**2, float(D.double().square().sum()))


def recompressed(edit: LowRank, rank: int | None) -> Merged:
    """The nearest edit of a rank, or the same in as few as rounding allows, from the factors alone; B and A of equal size."""
    Q_B, R_B = torch.linalg.qr(edit.scale * edit.B.double())  # (O, R), (R, R)
    Q_A, R_A = torch.linalg.qr(edit.A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    dtype = torch.promote_types(edit.A.dtype, torch.float32)
    above = int((S[0] * max(edit.shape) * torch.finfo(dtype).eps < S).sum()) if len(S) else 0
    keep = max(1, above if rank is None else min(rank, above))
    root = S[:keep].sqrt()
    B, A = Q_B @ (U[:, :keep] * root), (root[:, None] * Vh[:keep]) @ Q_A.mT
    whole = float(S.square().sum())
    lost = float(S[keep:].square().sum()) if keep < above else 0.0
    return Merged(LowRank(edit.shape, B.to(dtype).contiguous(), A.to(dtype).contiguous(), 1.0), lost, whole)
