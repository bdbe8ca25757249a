"""Reallocation: a method whose layers give and take while it trains (``Method.reallocate``) is asked once after every optimizer step.

    for step, batch in enumerate(batches, start=1):
        ...backward, optimizer.step()...
        allocators.reallocate(model, "default", step, steps)

``intarsia train`` calls it by itself, :class:`intarsia.train.allocation.Allocation` does in transformers.Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from intarsia.errors import IntarsiaError
from intarsia.method import Method
from intarsia.model import record, states


def reallocate(model: nn.Module, name: str, step: int, steps: int) -> Mapping[str, int]:
    """Let the method of an adapter give and take between its layers after optimizer step ``step`` (from 1) of ``steps``, where that is due.

    For a method that does no such thing nothing happens. All that it depends on is in the adapter's state, so a run that is
    resumed from a checkpoint goes on as it would have.

    Returns:
        How much each site has now, of what ``method.allots`` names; empty where nothing was due.

    Raises:
        IntarsiaError: for an unknown adapter, or a step that is not in 1..steps.
    """
    found = states(model, name)
    method = record(model).adapters[name].method
    if type(method).reallocate is Method.reallocate:
        return {}
    if not 1 <= step <= steps:
        raise IntarsiaError(f"step {step} of {steps} was asked for; steps are counted from 1 to {steps}")
    with torch.no_grad():
        return method.reallocate({site: state.raw() for site, state in found.items()}, step, steps)


def told(counts: Mapping[str, int], what: str) -> str:
    """One line for people: the sum, the range, and the sites with most."""
    most = sorted(counts, key=lambda site: -counts[site])[:3]
    ends = f"{min(counts.values()):,} to {max(counts.values()):,} a weight"
    return f"{sum(counts.values()):,} {what or 'units'}, {ends}, most in {', '.join(most)}"
