"""NLoRA: factors cut out of the weight learn from the first step; and the core alone learns something."""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods.lora import Lora
from intarsia.methods.nlora import Nlora


@behaviour("nlora", "is ahead of LoRA after the same steps at the scripts' rate, and its core alone lowers the error")
def steps() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 16, generator=generator) @ torch.randn(16, 64, generator=generator) / 32
    W = torch.randn(64, 64, generator=generator) / 8
    measure = "relative error, 200 steps at 2e-4"
    lora = fit(Lora(8, 8.0), target, W=W, lr=2e-4, steps=200)
    core = fit(Nlora(8, trains="core"), target, W=W, lr=3e-2, steps=200)
    return [
        *(
            Seen(
                measure,
                f"nlora {start}",
                fit(Nlora(8, start=start), target, W=W, lr=2e-4, steps=200),
                "lora",
                lora,
                "lower",
            )
            for start in ("residual", "pinv")
        ),
        Seen("relative error, 64 numbers trained", "inttune", core, "untrained", 1.0, "lower"),
    ]
