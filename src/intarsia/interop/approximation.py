"""How well a change can be written in few ranks.    D ~ B A, the best in the Frobenius norm (Eckart and Young)"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SIDE = 1024  # of the smaller side; above it singular vectors are found by random projection, in a fraction of the time
MORE = 16  # directions beyond the rank, and turns of the power iteration, for it to find the largest ones
TURNS = 8


def best(D: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(B (O, r), A (r, I)) in float32 or wider, and ||D - B A||, measured."""
    wide = D.to(torch.promote_types(D.dtype, torch.float32))
    rank = min(rank, *wide.shape)
    if min(wide.shape) <= SIDE:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(wide, q=min(rank + MORE, *wide.shape), niter=TURNS)
        Vh = V.mT
    root = S[:rank].sqrt()
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return B.contiguous(), A.contiguous(), float(torch.linalg.matrix_norm(wide - B @ A))


def losses(changes: Iterable[Tensor], ranks: Sequence[int]) -> dict[int, float]:
    """For each rank ||D - best of that rank|| / ||D||, over all the changes together."""
    left, whole = dict.fromkeys(ranks, 0.0), 0.0
    for D in changes:
        D = D.double()
        gram = D @ D.mT if D.shape[0] <= D.shape[1] else D.mT @ D
        energies = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)  # squares of the singular values, largest first
        whole += float(energies.sum())
        for rank in ranks:
            left[rank] += float(energies[rank:].sum())
    return {rank: math.sqrt(energy / whole) if whole else 0.0 for rank, energy in left.items()}
