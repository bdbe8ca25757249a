"""Small adapters of edits of every kind, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia import store
from intarsia.edits import (
    BlockAffine,
    Blocks,
    Combined,
    Core,
    Dense,
    Edit,
    Kronecker,
    LowRank,
    Multiplied,
    Rescaled,
    Scaled,
    Sequential,
    Sparse,
    Sum,
    Tiled,
    Transformed,
    elements,
)
from intarsia.support import Column

BASE = store.Base("0" * 64, "float32", "somewhere")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter_of(edits: dict[str, Edit]) -> store.Adapter:
    return store.Adapter("a", edits, BASE, {"name": "any"}, {"seed": 0})


def low_ranks() -> store.Adapter:
    """Two weights whose numbers are of very different sizes."""
    return adapter_of(
        {
            "up.weight": LowRank((30, 20), 0.3 * normal(30, 4), normal(4, 20, seed=1), 2.0),
            "down.weight": LowRank((20, 30), 0.01 * normal(20, 4, seed=2), normal(4, 30, seed=3), 2.0),
        }
    )


def every_kind() -> dict[str, Edit]:
    small = elements((12, 10), torch.arange(40) * 3, normal(40))
    low = LowRank((12, 10), normal(12, 3), normal(3, 10), 1.5)
    return {
        "elements": small,
        "columns": Sparse((12, 10), Column(), torch.tensor([1, 4]), normal(12, 2)),
        "low_rank": low,
        "core": Core((12, 10), {"A": normal(3, 10), "B": normal(12, 3), "C": normal(3, 3)}, {}, 0.5),
        "dense": Dense((12, 10), normal(12, 10)),
        "kronecker": Kronecker((12, 10), normal(3, 2), normal(4, 5), 0.5),
        "blocks": Blocks((12, 10), normal(2, 6, 3), normal(2, 3, 5), 0.5),
        "combined": Combined((12, 10), normal(5), normal(7, seed=1), 3, 11, 0.5),
        "scaled": Scaled((12, 10), normal(3, 4), normal(4, 10), 7, "sparse", "paper", 0.5),
        "sum": Sum((12, 10), (small, low), (1.0, 0.5)),
        "rescaled": Rescaled((12, 10), low, torch.ones(12)),
        "sequential": Sequential((12, 10), normal(12, 3), normal(3, 12, seed=1), 0.5),
        "tiled": Tiled((12, 10), normal(3, 12)),
        "block_affine": BlockAffine((12, 10), normal(6, 2, 2)),
        "multiplied": Multiplied((12, 10), low),
        "transformed": Transformed(
            (12, 10), LowRank((6, 5), normal(6, 2), normal(2, 5), 0.5), (("haar-low", "haar-low"),)
        ),
    }
