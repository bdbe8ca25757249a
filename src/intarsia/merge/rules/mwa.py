"""Metrics-weighted average of checkpoints.    w_i = (1 / L_i)^p / sum_j (1 / L_j)^p   or   w_i = s_i^p / sum_j s_j^p

Yu and Choi 2025, "Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging", arXiv:2504.18580. L_i is the training
loss of checkpoint i, smoothed rather than of one batch, s_i its step. p = 0 is the uniform average; a large p picks the best,
or the latest. The paper's penalty was not to be read in full: the power is the one-parameter family with its limits.
Losses and steps are found in the adapters' notes (``loss`` or ``training loss``, ``step`` or ``steps``), or given.

``mode: delta`` averages the changes, which is exact and puts low ranks side by side; ``factors`` averages every tensor, as the
paper does: the rank stays, and D differs from the average by sum_i w_i (B_i - B)(A_i - A). For sparse edits on one support the
two are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.edits import Edit, add, scale
from intarsia.errors import IntarsiaError
from intarsia.merge.rule import KINDS, Merged, Rule, Term, Where, each, register
from intarsia.method import option
from intarsia.store import Adapter

NOTES = {"loss": ("loss", "training loss"), "step": ("step", "steps")}  # keys of a note


@register
@dataclass(frozen=True)
class Mwa(Rule):
    metric: str = option("loss", "loss: the lower, the heavier; step: the later, the heavier")
    penalty: float = option(1.0, "power p: 0: all alike; the larger, the more the best one counts")
    mode: str = option(
        "delta", "delta: the average of the changes, exact; factors: of every tensor, so that ranks stay"
    )
    loss: float | None = each(None, "training loss of this checkpoint; none: as its note says")
    step: float | None = each(None, "step of this checkpoint; none: as its note says")

    name, title, paper = "mwa", "Metrics-weighted average", "arXiv:2504.18580"
    formula = "lambda sum w_i D_i, w_i ~ (1 / loss_i)^p or step_i^p"
    takes = frozenset(KINDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.metric in NOTES, "metric", f"one of {', '.join(NOTES)}")
        self.require(0 <= self.penalty < math.inf, "penalty", "0 or more")
        self.require(self.mode in ("delta", "factors"), "mode", "delta or factors")
        for key in NOTES:
            value = getattr(self, key)
            self.require(value is None or 0 < value < math.inf, key, "a positive number")

    def weights(self, rules: Sequence[Any], adapters: Sequence[Adapter]) -> list[float]:
        found = [_metric(rule, self.metric, adapter) for rule, adapter in zip(rules, adapters, strict=True)]
        return weights_of(found, self.metric, self.penalty)

    def merge(self, terms: Sequence[Term], where: Where) -> Merged:
        edits, weights = [term.edit for term in terms], [term.weight for term in terms]
        whole = abs(math.fsum(weights) - 1) < 1e-9  # no other checkpoint leaves this weight alone
        if whole and all(_same(edits[0], edit) for edit in edits[1:]):
            return Merged(edits[0])
        if self.mode == "delta" or not whole:
            return Merged(add(*(scale(edit, weight) for edit, weight in zip(edits, weights, strict=True))))
        return Merged(averaged(edits, weights, where))


def weights_of(metrics: Sequence[float], metric: str, penalty: float) -> list[float]:
    """The weights of checkpoints by their losses or steps: they sum to 1, and a common factor of all does not matter."""
    best = min(metrics) if metric == "loss" else max(metrics)
    shares = [(best / one if metric == "loss" else one / best) ** penalty for one in metrics]
    return [share / math.fsum(shares) for share in shares]


def averaged(edits: Sequence[Edit], weights: Sequence[float], where: Where) -> Edit:
    """One edit of the average of each tensor, A and B apart.

    Raises:
        IntarsiaError: where the edits differ in kind, shapes, supports or constants.
    """
    first = edits[0]
    for edit in edits[1:]:
        if (fault := _differ(first, edit)) is not None:
            raise IntarsiaError(
                f"{where.name}: tensors can be averaged where all checkpoints have the same; {fault}. Take mode: delta"
            )
    made = {}
    for key, tensor in first.tensors().items():
        parts = [edit.tensors()[key] for edit in edits]
        made[key] = _average(parts, weights) if tensor.is_floating_point() else tensor
    return first.made_of(made)


def _average(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = torch.zeros_like(parts[0], dtype=wide)
    for part, weight in zip(parts, weights, strict=True):
        total += weight * part.to(wide)
    return total


def _differ(one: Edit, other: Edit) -> str | None:
    if (one.kind, one.facts()) != (other.kind, other.facts()):
        return f"these are {one.kind} {one.facts() or ''} and {other.kind} {other.facts() or ''}"
    mine, theirs = one.tensors(), other.tensors()
    for key, tensor in mine.items():
        if tensor.shape != theirs[key].shape:
            return f"{key} is {tuple(tensor.shape)} and {tuple(theirs[key].shape)}"
        if not tensor.is_floating_point() and not tensor.equal(theirs[key]):
            return f"their {key} differ"
    return None


def _same(one: Edit, other: Edit) -> bool:
    if _differ(one, other) is not None:
        return False
    return all(tensor.equal(other.tensors()[key]) for key, tensor in one.tensors().items())


def _metric(rule: Mwa, metric: str, adapter: Adapter) -> float:
    given: float | None = getattr(rule, metric)
    found = [adapter.note[key] for key in NOTES[metric] if key in adapter.note]
    value = given if given is not None else found[0] if found else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        said = "says nothing of it" if value is None else f"says {value!r}, which is no positive number"
        raise IntarsiaError(
            f"{adapter.name}: mwa weighs checkpoints by their {metric}, and the note of this one {said}; give it: "
            f"{{adapter: ..., parameters: {{{metric}: ...}}}}"
        )
    return float(value)
