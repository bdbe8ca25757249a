"""WaRA: half of LoRA's numbers for a change that is smooth along both sides, and no gift for one that is not."""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods.lora import Lora
from intarsia.methods.wara import Wara


@behaviour(
    "wara", "the low-low band fits a smooth change in half of the numbers, and does not win on any other low rank"
)
def smooth() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(16, 4, generator=generator) / 4, torch.randn(4, 16, generator=generator) / 4
    constant = torch.kron(B @ A, torch.ones(2, 2)) / 2  # of rank 4
    other = torch.randn(32, 2, generator=generator) @ torch.randn(2, 32, generator=generator) / 32
    low, lora = Wara(rank=4, bands="ll"), Lora(2)  # 128 numbers both
    return [
        Seen("relative error, smooth, 128 numbers", "wara ll r=4", fit(low, constant), "lora r=2", fit(lora, constant), "lower"),
        Seen("relative error, random rank 2, 128 numbers", "wara ll r=4", fit(low, other), "lora r=2", fit(lora, other), "higher"),
    ]  # fmt: skip
