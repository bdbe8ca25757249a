"""PiSSA: what is to be learned changes the directions in which the weight is largest."""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods.lora import Lora

RATES = (3e-3, 1e-2, 3e-2)


@behaviour(
    "pissa",
    "is nearer than LoRA after few steps where the weight's principal directions change, each at its best of three rates",
)
def early() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(32, 32, generator=generator))
    values = 0.8 ** torch.arange(32)
    W = U @ torch.diag(values) @ V
    # The first four directions are turned a little and stretched.
    target = (U[:, :4] @ torch.randn(4, 4, generator=generator) / 4) @ torch.diag(values[:4]) @ V[:4]

    def best(start: str) -> float:
        return min(fit(Lora(4, alpha=4.0, start=start), target, W=W, lr=lr, steps=40) for lr in RATES)

    return [Seen("relative error after 40 steps", "pissa r=4", best("pissa"), "lora r=4", best("lora"), "lower")]
