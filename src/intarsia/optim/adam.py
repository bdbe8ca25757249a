"""Adam as the authors of GaLore and Fira have it.    W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) M / (sqrt V + eps)

It differs from ``torch.optim.AdamW`` in where eps stands: beside the root that is not corrected yet. Weight decay is
decoupled and comes last. With eps = 0 and no decay the two are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from intarsia.optim.wrapped import Params


class PaperAdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; eps is added before the bias is corrected."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _step(p, p.grad, self.state[p], group)
        return loss


def _step(p: torch.Tensor, G: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    b1, b2 = group["betas"]
    if not state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    state["step"] += 1
    M, V, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
    M.mul_(b1).add_(G, alpha=1 - b1)
    V.mul_(b2).addcmul_(G, G, value=1 - b2)
    size = group["lr"] * correction(b1, b2, t)
    p.addcdiv_(M, V.sqrt().add_(group["eps"]), value=-size)
    if group["weight_decay"]:
        p.mul_(1 - group["lr"] * group["weight_decay"])


def correction(b1: float, b2: float, t: float) -> float:
    """sqrt(1 - b2^t) / (1 - b1^t), what Adam's step is multiplied by."""
    return float((1 - b2**t) ** 0.5 / (1 - b1**t))
