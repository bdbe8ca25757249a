"""HUT: a change that scales rows and columns of the weight is of full rank, and of rank 1 or 2 to HUT."""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods.hut import Hut
from intarsia.methods.lora import Lora


@behaviour("hut", "fits a rescaling of rows and columns that LoRA of four times its numbers cannot")
def rescaling() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(48, 32, generator=generator) / 32**0.5
    rows, columns = (1 + 0.5 * torch.randn(n, generator=generator) for n in (48, 32))
    target = rows[:, None] * W * columns - W
    lora = {rank: fit(Lora(rank), target, W=W) for rank in (4, 8)}
    pure = fit(Hut(1, form="pure"), target, W=W, steps=1500)
    return [
        Seen("relative error", "hut r=1, pure", pure, "lora r=4", lora[4], "lower"),
        Seen("relative error", "hut r=2", fit(Hut(2), target, W=W, steps=1500), "lora r=8", lora[8], "lower"),
        Seen("relative error", "hut r=1, pure", pure, "0.01", 0.01, "lower"),
    ]
