"""SVFit: a change that rescales the weight's largest directions needs no more than r numbers, if they are those directions'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.method import Start
from intarsia.methods.svfit import Svfit
from intarsia.site import Site


@dataclass(frozen=True)
class _Random(Svfit):
    """The same count of numbers between orthonormal bases that know nothing of the weight."""

    def init(self, site: Site, start: Start) -> dict[str, Tensor]:
        (O, I), generator = site.shape, start.generator()
        B, A = (torch.linalg.qr(torch.randn(n, self.rank_at(site.shape), generator=generator)).Q for n in (O, I))
        return self.begin(site, {"A": A.mT, "B": B, "C": torch.zeros(self.rank_at(site.shape))})


@behaviour(
    "svfit", "reaches a change along the largest singular vectors with r numbers, which random directions do not"
)
def planted() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(48, 32, generator=generator) / 32**0.5
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    target = (U[:, :8] * torch.randn(8, generator=generator)) @ V[:8]
    svfit, drawn = (fit(method, target, W=W, lr=3e-2, steps=300) for method in (Svfit(8), _Random(8)))
    return [
        Seen("relative error, 8 numbers trained", "svfit r=8", svfit, "one hundredth", 0.01, "lower"),
        Seen("relative error, 8 numbers trained", "svfit r=8", svfit, "random bases", drawn, "lower"),
    ]
