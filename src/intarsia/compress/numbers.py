"""The numbers of an adapter that compression works on: what was learned, as one long vector over all its edits.

Sparse and dense edits have their values, low-rank, block and Kronecker ones their factors as they are stored (so ComPEFT takes A and B),
combined and scaled ones their coefficients and scales, tiled and block-affine ones their tile and blocks, sums those of their parts, multiplied and
transformed ones those of the inner edit, and so rescaled ones: the lengths multiply whole rows and stay as they are. A kernel edit, and a core edit with a start, are refused: their change is a small difference of
factors, which rounding them would drown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

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
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter, Code

BEFORE = "before compression"  # of the note's remarks

Progress = Callable[[int, int, str], None]  # done, all, what


@singledispatch
def learned(edit: Edit) -> tuple[str, ...]:
    """Which of an edit's tensors hold what was learned, by their names in a file.

    Raises:
        IntarsiaError: for a kind that cannot be compressed.
    """
    known = ", ".join(sorted(cls.__name__ for cls in learned.registry if cls is not object))
    raise IntarsiaError(f"{edit.kind} edits cannot be compressed; it is for {known}")


@learned.register(Sparse)
@learned.register(Dense)
def _(edit: Sparse | Dense) -> tuple[str, ...]:
    return ("values",)


@learned.register(LowRank)
@learned.register(Kronecker)
@learned.register(Blocks)
def _(edit: LowRank | Kronecker | Blocks) -> tuple[str, ...]:
    return ("A", "B")


@learned.register
def _(edit: Scaled) -> tuple[str, ...]:
    return ("gamma", "lambda")


@learned.register
def _(edit: Combined) -> tuple[str, ...]:
    return ("a", "c")


@learned.register
def _(edit: Sequential) -> tuple[str, ...]:
    return ("D", "U")


@learned.register
def _(edit: Core) -> tuple[str, ...]:
    if edit.start:
        raise IntarsiaError(
            "core edits that have a start cannot be compressed: their change is the small difference from it; make them a low rank first"
        )
    return tuple(edit.now)


@learned.register
def _(edit: Tiled) -> tuple[str, ...]:
    return ("D",)


@learned.register
def _(edit: BlockAffine) -> tuple[str, ...]:
    return ("B",)


@learned.register(Rescaled)
@learned.register(Multiplied)
@learned.register(Transformed)
def _(edit: Rescaled | Multiplied | Transformed) -> tuple[str, ...]:
    return learned(edit.inner)


@learned.register
def _(edit: Sum) -> tuple[str, ...]:
    return tuple(f"{i}_{name}" for i, part in enumerate(edit.parts) for name in learned(part))


def numbers(adapter: Adapter) -> dict[str, Tensor]:
    """What was learned, by the names of the tensors, sorted as ComPEFT sorts them.

    Raises:
        IntarsiaError: for an adapter that has nothing, or an edit of a kind that cannot be compressed; all of them at once.
    """
    found: dict[str, Tensor] = {}
    refused: dict[str, list[str]] = {}
    for weight, edit in adapter.edits.items():
        try:
            parts = learned(edit)
        except IntarsiaError as error:
            refused.setdefault(str(error), []).append(weight)
            continue
        tensors = edit.tensors()
        found |= {f"{weight}.{part}": tensors[part].detach() for part in parts}
    if refused:
        raise IntarsiaError("\n".join(f"{', '.join(names[:3])}: {why}" for why, names in refused.items()))
    if not any(tensor.numel() for tensor in found.values()):
        raise IntarsiaError(f"{adapter.name} holds no numbers to compress")
    return dict(sorted(found.items()))


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All of them as one vector, float64. -> (d,)."""
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])


def split(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`flat`, for a vector of any type."""
    pieces = vector.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view(like[name].shape).clone() for name, piece in zip(like, pieces, strict=True)}


def made_of(
    adapter: Adapter, tensors: Mapping[str, Tensor], step: Mapping[str, Any], codes: Mapping[str, Code] | None = None
) -> Adapter:
    """The adapter with other numbers: units of a support that are 0 as a whole are dropped, and weights that no longer change.

    Args:
        step: what was done, for the lineage in ``about``.

    Raises:
        IntarsiaError: where nothing is left.
    """
    edits: dict[str, Edit] = {}
    for weight, edit in adapter.edits.items():
        mine = {part: tensors[f"{weight}.{part}"] for part in learned(edit)}
        kept = without_zeros(edit.made_of(edit.tensors() | mine))
        if changes(kept):
            edits[weight] = kept
    if not edits:
        raise IntarsiaError(f"nothing of {adapter.name} is left; keep more: a higher density")
    return with_step(replace(adapter, edits=edits, codes=codes or {}), step, adapter)


def with_step(adapter: Adapter, step: Mapping[str, Any], before: Adapter) -> Adapter:
    """The adapter with one more step in its lineage, ``about["compressed"]``: what was done, and to which adapter.

    Remarks such as losses are those of the adapter before, and said to be.
    """
    steps = [*before.about.get("compressed", []), {**step, "from": before.digest}]
    note = before.note if BEFORE in before.note or not before.note else {BEFORE: dict(before.note)}
    return replace(adapter, about={**before.about, "compressed": steps}, note=note)


@singledispatch
def without_zeros(edit: Edit) -> Edit:
    """The same change, without the units of a support that add nothing; a dense edit that is mostly zeros as elements."""
    return edit


@without_zeros.register
def _(edit: Sparse) -> Edit:
    unit, count = edit.granularity, len(edit.index)
    alive = (
        edit.values.movedim(unit.axis, 0).reshape(count, -1).any(dim=1) if count else torch.zeros(0, dtype=torch.bool)
    )
    if bool(alive.all()):
        return edit
    kept = alive.nonzero().squeeze(1)
    return replace(edit, index=edit.index[kept], values=edit.values.index_select(unit.axis, unit.spread(kept)))


@without_zeros.register
def _(edit: Dense) -> Edit:
    index = edit.values.reshape(-1).nonzero().squeeze(1)
    few = 2 * len(index) <= edit.values.numel()
    return elements(edit.shape, index, edit.values.reshape(-1)[index]) if few else edit


@without_zeros.register
def _(edit: Sum) -> Edit:
    return replace(edit, parts=tuple(without_zeros(part) for part in edit.parts))


@without_zeros.register(Rescaled)
@without_zeros.register(Multiplied)
@without_zeros.register(Transformed)
def _(edit: Rescaled | Multiplied | Transformed) -> Edit:
    return replace(edit, inner=without_zeros(edit.inner))


def changes(edit: Edit) -> bool:
    """Whether the edit can change anything: a support that kept nothing, or a factor of zeros, does not."""
    if isinstance(edit, Rescaled | Sum | Multiplied):
        return True
    if isinstance(edit, Combined):  # whose A is something without a coefficient, and whose B is not
        return bool(edit.c.any())
    return all(bool(edit.tensors()[part].any()) for part in learned(edit))
