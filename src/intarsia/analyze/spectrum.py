"""The singular values of a change, and what they say about its rank. Pure functions.

O out_features, I in_features, r rank; s is always a row of singular values, largest first, not negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.edits import Edit, Kronecker
from intarsia.errors import IntarsiaError


def needs_weight(edit: Edit) -> bool:
    """Whether what the edit adds depends on the weight that it is set into."""
    return edit.needs_weight


def change_of(edit: Edit, weight: Tensor | None = None) -> Tensor:
    """What the edit adds to the weight, in float32 or wider. (O, I).

    Raises:
        IntarsiaError: for an edit that depends on the weight (a rescaled one) when no weight is given.
    """
    if weight is not None:
        return edit.delta(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
    if needs_weight(edit):
        raise IntarsiaError(f"what a {edit.kind} edit changes depends on the weight: give the base's weight")
    return edit.delta(torch.zeros(edit.shape))


def singular_values(change: Tensor) -> Tensor:
    """Singular values of a matrix, largest first, in float32 or wider. (O, I) -> (min(O, I),).

    Rows and columns of zeros, of which a sparse change has many, are left out of the work: they add zeros only.
    """
    matrix = change.detach().to(torch.promote_types(change.dtype, torch.float32))
    inner = matrix[matrix.any(dim=1)][:, matrix.any(dim=0)]
    found = torch.linalg.svdvals(inner) if inner.numel() else matrix.new_empty(0)
    return torch.cat([found, found.new_zeros(min(matrix.shape) - len(found))])


def spectrum(edit: Edit, weight: Tensor | None = None) -> Tensor:
    """Singular values of what an edit adds, largest first. -> (min(O, I),).

    What is of low rank by its making is never multiplied out: with B = Q R and A^T = P S its values are those of the r x r matrix
    R S^T. Those of a product of Kronecker are the products of its factors' values.
    """
    if isinstance(edit, Kronecker):
        values = abs(edit.scale) * torch.outer(singular_values(edit.A), singular_values(edit.B)).flatten()
        return torch.cat([values, values.new_zeros(min(edit.shape))]).sort(descending=True).values[: min(edit.shape)]
    low = edit.low_rank()
    if low is None or low.A.shape[0] >= min(edit.shape):
        return singular_values(change_of(edit, weight))
    R = torch.linalg.qr(low.B.float(), mode="r").R  # (r, r)
    S = torch.linalg.qr(low.A.mT.float(), mode="r").R
    found = torch.linalg.svdvals(abs(low.scale) * (R @ S.mT))
    return torch.cat([found, found.new_zeros(min(edit.shape) - len(found))])


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of s / sum(s) (Roy & Vetterli 2007): n for n equal values, 1 for one, 0 for none."""
    share = s[s > 0] / s.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def numerical_rank(s: Tensor, tolerance: float | None = None) -> int:
    """How many singular values are above ``tolerance`` times the largest; by default m times the dtype's machine epsilon."""
    if not len(s) or not s[0] > 0:
        return 0
    tolerance = len(s) * torch.finfo(s.dtype).eps if tolerance is None else tolerance
    return int((s > tolerance * s[0]).sum())


def stable_rank(s: Tensor) -> float:
    """||.||_F^2 / ||.||_2^2: never above the rank, and deaf to small singular values; 0 for no change."""
    return float(s.square().sum() / s[0].square()) if len(s) and s[0] > 0 else 0.0


def energy_share(s: Tensor, k: int) -> float:
    """The share of ||.||_F^2 that the k largest singular values hold, 0..1; 0 for no change."""
    total = s.square().sum()
    return float(s[:k].square().sum() / total) if total > 0 else 0.0
