"""A callback for transformers.Trainer that moves the support of an adapter whose method has a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from intarsia.model import record
from intarsia.schedule import regrow


class MovingSupport(TrainerCallback):
    """After those optimizer steps that the method names (``Method.moves``), a share of the support moves.

    Args:
        batches: called when it does; gives the batches, on the model's device, by which units are grown.
    """

    def __init__(self, model: nn.Module, name: str, batches: Callable[[], Iterable[Any]]) -> None:
        self.model, self.name, self.batches = model, name, batches

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        method = record(self.model).adapters[self.name].method
        share = method.moves(state.global_step, state.max_steps)
        if share:
            optimizer = given["optimizer"]
            regrow(self.model, self.name, optimizer, data=self.batches(), share=share, scorer=method.grows_by())
