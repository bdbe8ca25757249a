"""A callback for transformers.Trainer: layers give and take as the method says, and train by turns as an allocator says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from intarsia.allocators import Turns, reallocate
from intarsia.errors import IntarsiaError


class Allocation(TrainerCallback):
    """Before every optimizer step the turn of some layers (:class:`intarsia.allocators.Turns`), after it :func:`intarsia.allocators.reallocate`.

    Args:
        turns: where an allocator is set over the adapter; its state is no part of the Trainer's checkpoints: keep ``turns.state_dict()``.
        loss: of some rows of the training data, given the number of the step; needed where the allocator measures losses.
        report: called with the step and how much each site has now, where something was dealt out.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "default",
        *,
        turns: Turns | None = None,
        loss: Callable[[int], Tensor | float] | None = None,
        report: Callable[[int, Mapping[str, int]], None] | None = None,
    ) -> None:
        if turns is not None and turns.allocator.rows() and loss is None:
            raise IntarsiaError(f"{turns.allocator.name} measures losses as it goes: pass loss=function of a step")
        self.model, self.name, self.turns, self.loss, self.report = model, name, turns, loss, report

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.turns is not None:
            step, loss = state.global_step + 1, self.loss
            self.turns.begin(step, None if loss is None else lambda: loss(step))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        counts = reallocate(self.model, self.name, state.global_step, state.max_steps)
        if counts and self.report is not None:
            self.report(state.global_step, counts)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.turns is not None:
            self.turns.end()
