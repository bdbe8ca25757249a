"""NLoRA: factors cut out of the weight learn from the first step; and the core alone learns something."""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods.lora import Lora
from intarsia.methods.nlora import Nlora


@behaviour("nlora", "is ahead of LoRA after the same few steps at the same rate, and its core alone lowers the error")
def steps() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 16, generator=generator) @ torch.randn(16, 64, generator=generator) / 32
    W = torch.randn(64, 64, generator=generator) / 8

    rows = []
    for steps in (50, 200):
        nlora, lora = (fit(m, target, W=W, lr=1e-2, steps=steps) for m in (Nlora(8), Lora(8, 8.0)))
        rows.append(Seen(f"relative error after {steps} steps", "nlora r=8", nlora, "lora r=8", lora, "lower"))
    core = fit(Nlora(8, trains="core"), target, W=W, lr=1e-1, steps=200)
    return [*rows, Seen("relative error, 64 numbers trained", "inttune r=8", core, "untrained", 1.0, "lower")]
