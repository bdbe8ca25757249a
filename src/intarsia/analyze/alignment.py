"""How far two matrices share their leading singular directions: a diagnostic before two changes are merged.

Ito, Yamada & Kumagai 2024, "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv:2402.04051, sec. 4:

    R(A, B) = sum_ij s_i^A s_j^B (u_i^A . u_j^B) (v_i^A . v_j^B) / (||A||_F ||B||_F)

Over all singular values it is <A, B> / (||A|| ||B||), the cosine of the two. The paper leaves out those below a threshold: the
part that is left is what weight matching raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.analyze.repair import decomposed
from intarsia.edits import Edit
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
    (U1, S1, V1), (U2, S2, V2) = (_kept(_svd(matrix, weight), above) for matrix in (one, other))
    lengths = float(S1.norm() * S2.norm())
    if not lengths:
        return 0.0
    inner = (S1[:, None] * (U1.mT @ U2) * (V1 @ V2.mT) * S2).sum()
    return max(-1.0, min(1.0, float(inner) / lengths))


def _svd(matrix: Tensor | Edit, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(matrix, Edit):
        return decomposed(matrix, weight)
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    return torch.linalg.svd(wide, full_matrices=False)  # type: ignore[no-any-return]


def _kept(svd: tuple[Tensor, Tensor, Tensor], above: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = (part.double() for part in svd)
    kept = above * S[0] < S if len(S) else S > 0
    return U[:, kept], S[kept], Vh[kept]
