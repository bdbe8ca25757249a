"""Competition between layers: a number of entries that falls in training is split among them by importance (SNELLA).

Shen et al. 2025, arXiv:2510.24037. A layer's importance is that of its factors, sensitivity times uncertainty, both smoothed over
the steps (as AdaLoRA's); the methods gather it before every optimizer step, and here it is turned into numbers of entries.

    for step, batch in enumerate(batches, start=1):
        ...backward, optimizer.step()...
        allocators.compete(model, "default", step, steps)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from intarsia.errors import IntarsiaError
from intarsia.methods import Snella
from intarsia.model import record, states
from intarsia.support import proportional


def compete(model: nn.Module, name: str, step: int, steps: int) -> dict[str, int]:
    """Give each layer of an adapter its number of entries after optimizer step ``step`` (from 1) of ``steps``, where one is due.

    For an adapter of another method nothing happens. All that it depends on is in the adapter's state, so a run that is
    resumed from a checkpoint competes as it would have.

    Returns:
        How many entries of the change each site has now that are not 0; empty where nothing was due.

    Raises:
        IntarsiaError: for an unknown adapter, or a step that is not in 1..steps.
    """
    found = states(model, name)
    method = record(model).adapters[name].method
    if not isinstance(method, Snella):
        return {}
    if not 1 <= step <= steps:
        raise IntarsiaError(f"step {step} of {steps} was asked for; steps are counted from 1 to {steps}")
    if step > 1 and step % method.every and step != steps:
        return {}
    sizes = {site: state.shape[0] * state.shape[1] for site, state in found.items()}
    total = budget(step, steps, method, sum(sizes.values()))
    even = step <= method.warmup * steps
    scores = {site: float(sizes[site]) if even else score(state) for site, state in found.items()}
    counts = proportional(scores, sizes, total)
    for site, state in found.items():
        zeros: Any = state.zeros
        zeros.fill_(sizes[site] - counts[site])
    return counts


def budget(step: int, steps: int, method: Snella, size: int) -> int:
    """N, the entries that are not 0 of ``size`` after a step: N1 + (N0 - N1) (1 - t)^3, t from 0 at the end of the warm-up to 1
    where the share ``hold`` of the run begins. N0 and N1 are those of ``start_sparsity`` and ``sparsity``."""
    start, target = ((1 - share) * size for share in (method.start_sparsity, method.sparsity))
    first, last = method.warmup * steps, (1 - method.hold) * steps
    t = min(1.0, max(0.0, (step - first) / (last - first))) if last > first else float(step > first)
    return round(target + (start - target) * (1 - t) ** 3)


def score(state: Any) -> float:
    """The importance of a layer: the mean over A of sensitivity * uncertainty, and that over B."""
    with torch.no_grad():
        parts = [(getattr(state, f"importance_{k}") * getattr(state, f"spread_{k}")).double().mean() for k in "AB"]
    return float(parts[0] + parts[1])
