"""Hydra: what is to be learned is a low-rank change beside the layer and one behind it.

Any such change has rank r_p + r_s, so that a LoRA of that rank holds it too; Hydra needs fewer numbers for it where a layer has more
inputs than outputs, and only there: 2 r_s O against r_s (I + O).
"""

from __future__ import annotations

import torch

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.toys import fit
from intarsia.methods import Hydra, Lora


def _errors(rows: int, columns: int, rank: int) -> tuple[float, float]:
    """Relative errors of Hydra 2 + 2 and of LoRA on (I + E1) W + E2, both E of rank 2."""
    generator = torch.Generator().manual_seed(0)

    def low(columns: int) -> torch.Tensor:
        return torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator) / 8

    W = torch.randn(rows, columns, generator=generator) / columns**0.5
    target = low(rows) @ W + low(columns)
    return tuple(fit(method, target, W=W) for method in (Hydra(2, 2, scale=1.0), Lora(rank, alpha=float(rank))))  # type: ignore[return-value]


@behaviour(
    "hydra-par-seq", "learns (I + E1) W + E2 with fewer numbers than LoRA where there are more inputs than outputs"
)
def both_sides() -> list[Seen]:
    wide, square = _errors(16, 64, 3), _errors(32, 32, 4)
    return [
        Seen("relative error, 16 x 64", "hydra 2+2, 224 numbers", wide[0], "lora r=3, 240", wide[1], "lower"),
        Seen("relative error, 32 x 32", "hydra 2+2, 256 numbers", square[0], "lora r=4, 256", square[1], "lower"),
    ]
