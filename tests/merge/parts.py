"""Terms and adapters for tests of merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.edits import Dense, Edit, LowRank, elements, scale
from intarsia.merge import Merged, Term, Where, build, changed
from intarsia.store import Adapter, Base

BASE = Base("0" * 64, "float32", "a/base")


def some(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def merged(
    method: str,
    edits: Sequence[Edit],
    weights: Sequence[float] | None = None,
    own: Sequence[Mapping[str, Any]] | None = None,
    where: str = "model.layers.0.up.weight",
    seed: int = 0,
    **shared: Any,
) -> Merged:
    """What a rule makes of edits of one weight: adapters a0, a1, ... of these weights (1) and own parameters."""
    weights = weights or [1.0] * len(edits)
    rule = build(method, {("lambda" if k == "lambda_" else k): v for k, v in shared.items()})
    rules = [changed(rule, one) for one in own or [{}] * len(edits)]
    terms = [Term(f"a{i}", edit, w, r) for i, (edit, w, r) in enumerate(zip(edits, weights, rules, strict=True))]
    found = rule.merge(terms, Where(where, seed, sum(weights)))
    return Merged(scale(found.edit, rule.lambda_), found.lost, found.of)


def change(edit: Edit) -> Tensor:
    """The whole change in float64."""
    return edit.delta(torch.zeros(edit.shape, dtype=torch.float64))


def dense(D: Tensor) -> Dense:
    """A dense edit."""
    return Dense((D.shape[0], D.shape[1]), D)


def low_rank(seed: int, shape: tuple[int, int], rank: int, factor: float = 0.5) -> LowRank:
    """A low-rank edit of random factors."""
    return LowRank(shape, some(seed, shape[0], rank), some(seed + 1, rank, shape[1]), factor)


def sparse(D: Tensor, index: Tensor) -> Edit:
    """The entries of a change at these flat positions."""
    return elements((D.shape[0], D.shape[1]), index, D.reshape(-1)[index])


def adapter(
    name: str, edits: Mapping[str, Edit], base: Base = BASE, note: Mapping[str, Any] | None = None, **noted: Any
) -> Adapter:
    """An adapter in memory."""
    return Adapter(name, edits, base, {"name": "shira"}, {"seed": 0}, {**(note or {}), **noted})
