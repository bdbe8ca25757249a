"""RandLoRA and the spectrum of what is to be learned: full rank helps where no few directions hold most of it."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods.randlora import Randlora

COUNT = 576  # of RandLoRA with r = 8 at a 64 x 64 weight; a LoRA of rank 5 has 640


@behaviour("randlora", "comes nearer to a change of full rank than any LoRA of as many numbers (Eckart and Young)")
def full_rank() -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 64, generator=generator) / 8
    targets = {"a rotation": torch.linalg.qr(normal).Q, "normal numbers": normal}
    return [
        Seen(
            f"relative error, {name}",
            f"randlora r=8, {COUNT} numbers",
            fit(Randlora(rank=8), target, lr=1e-2, steps=200),
            "the SVD's of rank 5, 640 numbers",
            _best(target, 5),
            "lower",
        )
        for name, target in targets.items()
    ]


def _best(target: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(target)
    return float(values[rank:].norm() / values.norm())
