"""How far two matrices share their leading singular directions: a diagnostic before two changes are merged.

Ito, Yamada & Kumagai 2024, "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv:2402.04051, sec. 4:

    R(A, B) = sum_ij s_i^A s_j^B (u_i^A . u_j^B) (v_i^A . v_j^B) / (||A||_F ||B||_F)

Over all singular values it is <A, B> / (||A|| ||B||), the cosine of the two. The paper leaves out those below a threshold: the
part that is left is what weight matching raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.analyze.product import Directions, directions
from intarsia.analyze.reduced import reduced
from intarsia.edits import Dense, Edit
from intarsia.errors import IntarsiaError


def subspace_alignment(
    one: Tensor | Edit, other: Tensor | Edit, *, above: float = 0.0, weight: Tensor | None = None
) -> float:
    """R of two matrices, or of what two edits add: -1..1; 0 where one of them is zero.

    Low-rank edits are never multiplied out: their singular vectors come from their factors.

    Args:
        above: singular values at or below this share of the largest of their own matrix are left out, in the sum and in the norms.
        weight: what the edits are set into, for those that depend on it.

    Raises:
        IntarsiaError: for different shapes, or a threshold that is not in 0..1.
    """
    if tuple(one.shape) != tuple(other.shape):
        raise IntarsiaError(
            f"{tuple(one.shape)} and {tuple(other.shape)} have no directions in common: one shape is needed"
        )
    if not 0 <= above < 1:
        raise IntarsiaError(f"above={above!r}; expected a share of the largest singular value, 0 or more and below 1")
    first, second = (_kept(_directions(matrix, weight), above) for matrix in (one, other))
    lengths = float(first.s.norm() * second.s.norm())
    if not lengths:
        return 0.0
    inner = (first.s[:, None] * (first.U.mT @ second.U) * (first.V.mT @ second.V) * second.s).sum()
    return max(-1.0, min(1.0, float(inner) / lengths))


def _directions(matrix: Tensor | Edit, weight: Tensor | None) -> Directions:
    if isinstance(matrix, Edit):
        return directions(reduced(matrix, weight))
    rows, columns = matrix.shape
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    return directions(Dense((rows, columns), wide))


def _kept(one: Directions, above: float) -> Directions:
    kept = one.s > above * one.s[:1]
    return Directions(one.U[:, kept].double(), one.s[kept].double(), one.V[:, kept].double())
