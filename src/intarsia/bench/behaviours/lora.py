"""LoRA and the rank of what is to be learned: no adapter of rank r comes nearer to a matrix than its SVD (Eckart and Young)."""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods.lora import Lora


@behaviour(
    "lora", "learns a change of its own rank, and of a full one no more than the best approximation of that rank"
)
def rank() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(32, 4, generator=generator) @ torch.randn(4, 32, generator=generator) / 8
    full = torch.randn(32, 32, generator=generator) / 4
    best = float(torch.linalg.svdvals(full)[4:].square().sum().sqrt() / full.norm())
    return [
        Seen("relative error, rank 4", "lora r=4", fit(Lora(4), low), "one half", 0.5, "lower"),
        Seen("relative error, full rank", "lora r=4", fit(Lora(4), full), "the SVD's", 0.999 * best, "higher"),
    ]
