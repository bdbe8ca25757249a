"""LoRA-SB beside LoRA-XS, whose factors are those of the weight: which r x r core gets nearer to a change that it can only learn in part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.forms import Factored
from intarsia.method import Method, Start
from intarsia.methods.lora_sb import LoraSb
from intarsia.site import Site

RATES = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class _Xs(Factored):
    """LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604): B = U_r S_r and A = V_r^T of the weight, R = 0."""

    rank: int = 4

    name, core, scale = "xs", "square", 1.0

    def learns(self) -> str:
        return "C"

    def init(self, site: Site, start: Start) -> dict[str, Tensor]:
        U, S, V = torch.linalg.svd(site.weight.detach().float(), full_matrices=False)
        r = self.rank
        return self.begin(site, {"A": V[:r], "B": U[:, :r] * S[:r], "C": torch.zeros(r, r)})


@behaviour("lora-sb", "gets nearer to a low-rank change with noise than factors of the weight do, at the same r")
def core() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(48, 4, generator=generator) @ torch.randn(4, 32, generator=generator) / 8
    target = low + 0.05 * torch.randn(48, 32, generator=generator)
    W = torch.randn(48, 32, generator=generator) / 32**0.5
    x = torch.randn(512, 32, generator=generator)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        error: Tensor = (model(batch) - batch @ (W + target).T).square().mean()
        return error

    def best(method: Method) -> float:
        return min(fit(method, target, W=W, lr=lr, steps=200, data=[x], loss=loss) for lr in RATES)

    sb = best(LoraSb(4, 1e-2))
    return [
        Seen("relative error after 200 steps, best of 3 rates", "lora-sb r=4", sb, "lora-xs r=4", best(_Xs(4)), "lower")
    ]
