"""Our optimizers in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from intarsia.optim.recipe import build

Factory = Callable[[], Callable[..., torch.optim.Optimizer]]


def for_trainer(
    name: str, lr: float | None = None, weight_decay: float = 0.0, **fields: Any
) -> tuple[Factory, dict[str, Any]]:
    """``Trainer(..., optimizer_cls_and_kwargs=for_trainer("galore", lr=1e-2, rank=8))``: the optimizer of that name, by its fields.

    Args:
        lr: highest learning rate, by default the optimizer's own; Trainer's ``learning_rate`` is for its own optimizers.
        weight_decay: likewise.

    Raises:
        IntarsiaError: for an unknown name or field, or a value out of range.
    """
    recipe = build({"name": name, **fields})

    def make(model: nn.Module, **given: Any) -> torch.optim.Optimizer:
        return recipe.build(model, **given)

    return lambda: make, {"lr": recipe.default_lr if lr is None else lr, "weight_decay": weight_decay}
