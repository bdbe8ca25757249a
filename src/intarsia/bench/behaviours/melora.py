"""MELoRA and the shape of what is to be learned: n times the rank for the same numbers, but on the diagonal blocks alone."""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods.lora import Lora
from intarsia.methods.melora import Melora


@behaviour(
    "melora",
    "learns a block-diagonal change of rank 16 that a LoRA of the same count cannot, and not a dense one of rank 2 that LoRA can",
)
def blocks() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(8, *shape, generator=generator) for shape in ((8, 2), (2, 8)))
    inside = torch.block_diag(*(up @ down / 8).unbind())
    dense = torch.randn(64, 2, generator=generator) @ torch.randn(2, 64, generator=generator) / 16
    found = {
        (name, method.name): fit(method, target)
        for name, target in (("8 blocks", inside), ("dense", dense))
        for method in (Melora(rank=2, blocks=8), Lora(rank=2))
    }
    ours, theirs = "melora r=2 n=8", "lora r=2"
    return [
        Seen("relative error, 8 blocks", ours, found["8 blocks", "melora"], theirs, found["8 blocks", "lora"], "lower"),
        Seen("relative error, dense rank 2", theirs, found["dense", "lora"], ours, found["dense", "melora"], "lower"),
    ]
