"""PiSSA: the factors start as the principal part of the weight.    s B A = U_r S_r V_r^T of W = U S V^T

Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv:2404.02948, section 3.    B = U_r S_r^1/2 / s^1/2,  A = S_r^1/2 V_r^T / s^1/2.

The paper moves the principal part out of the frozen weight; here the weight stays and the start is subtracted, which is the
same function and gives the base back to the bit. The SVD is exact, in float32 or wider.
"""

from typing import Any

import torch
from torch import Tensor

from intarsia.inits.initialiser import initialiser
from intarsia.method import Start
from intarsia.site import Site


@initialiser("pissa", subtracted=True)
def pissa(method: Any, site: Site, start: Start) -> dict[str, Tensor]:
    """The r largest singular values and vectors of W, halved between the factors."""
    r, W = method.rank, site.weight.detach()
    U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
    root = (S[:r] / method.scale).sqrt()
    return {"A": root[:, None] * V[:r], "B": U[:, :r] * root}
