"""The directions in which the outputs of a matrix vary most, for inputs of a known second moment.

What a matrix W (O, I) makes of inputs x with E[x x^T] = H has the second moment W H W^T. Its first r eigenvectors U span the
r dimensions that lose least: U U^T W is the nearest matrix of rank r to W for these inputs (Eckart and Young 1936), and the
mean square of what is lost is the sum of the eigenvalues that are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-12  # of the trace: directions that no input has taken count as little as float64 can tell


def principal(W: Tensor, H: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """(U (O, r), S (r,)): the first left singular vectors of W H^(1/2) and their singular values; without H, those of W.

    H is (I, I), or (I,) for a diagonal one. In float64, on the CPU. Directions that H does not reach come last, by W alone.
    """
    W = W.to("cpu", torch.float64)
    if H is None:
        weighted = W
    elif H.ndim == 1:
        H = H.to("cpu", torch.float64)
        weighted = W * (H + RIDGE * H.sum()).sqrt()
    else:
        weighted = W @ root(H)
    U, S, _ = torch.linalg.svd(weighted, full_matrices=False)
    return U[:, :rank].contiguous(), S[:rank]


def root(H: Tensor) -> Tensor:
    """L with L L^T = H, for a symmetric H without negative eigenvalues but for rounding. (I, I) float64."""
    H = H.to("cpu", torch.float64)
    ridge = float(H.trace()) * RIDGE or 1.0
    while True:
        L, failed = torch.linalg.cholesky_ex(H + ridge * torch.eye(len(H), dtype=H.dtype))
        if not bool(failed):
            found: Tensor = L
            return found
        ridge *= 100  # H was summed with more rounding than float64 has
