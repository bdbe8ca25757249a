"""RankMe: the effective rank of a set of embeddings, to choose checkpoints or hyperparameters without labels.

Garrido, Balestriero, Najman & LeCun 2023, "RankMe: Assessing the downstream performance of pretrained self-supervised
representations by their rank", arXiv:2210.02885, eq. 1:

    p_k = s_k / sum_j s_j + eps,    RankMe = exp(-sum_k p_k log p_k),    s the singular values, eps = 1e-7

Rows are neither centred nor scaled. A large value is necessary for good transfer, not a guarantee of it. Of a change of a weight,
``rankme(spectrum(edit, weight))``: at most r for a product of rank r, far more for a sparse change.

N samples, K numbers each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError

EPS = 1e-7


def rankme(s: Tensor, eps: float = EPS) -> float:
    """RankMe of singular values s (m,), in any order; 0 where all are zero. Between 1 and m, but for eps."""
    total = s.double().sum()
    if not total > 0:
        return 0.0
    p = s.double() / total + eps
    return float(torch.exp(-(p * p.log()).sum()))


def rankme_of(Z: Tensor, *, gram: bool | None = None, eps: float = EPS) -> float:
    """RankMe of embeddings Z (N, K).

    Args:
        gram: take the singular values as roots of the eigenvalues of the smaller of Z^T Z and Z Z^T, in float64: quicker for
            many samples, and blind to singular values below 1e-7 of the largest. By default where one side is at least
            four times the other.

    Raises:
        IntarsiaError: for what is no matrix, has no rows, or has numbers that are not finite.
    """
    if Z.ndim != 2 or not Z.numel():
        raise IntarsiaError(f"embeddings are {tuple(Z.shape)}; expected (samples, numbers a sample)")
    if not bool(Z.isfinite().all()):
        raise IntarsiaError("embeddings have numbers that are not finite, so they have no rank")
    wide = Z.detach().to(torch.promote_types(Z.dtype, torch.float32))
    if gram is None:
        gram = max(Z.shape) >= 4 * min(Z.shape)
    return rankme(_by_gram(wide) if gram else torch.linalg.svdvals(wide), eps)


def _by_gram(Z: Tensor) -> Tensor:
    """(N, K) -> singular values, ascending (min(N, K),)."""
    Z = Z.double()
    matrix = Z.mT @ Z if Z.shape[0] >= Z.shape[1] else Z @ Z.mT
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values.clamp_min(0).sqrt()
