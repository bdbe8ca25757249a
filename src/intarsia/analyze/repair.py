"""Repair of intruder dimensions: each is scaled by lambda, and the result is an adapter again.

    W_new = W1 + (lambda - 1) sum_{j in intruders} S1_j u1_j v1_j^T

Shuttleworth et al. 2024, arXiv:2410.21228, sec. 6: 1 keeps an intruder, 0 removes it; in between knowledge of the base comes
back at a small cost on the task. What is added has the rank of the number of intruders, so the repaired change is exactly the
old edit plus a low-rank one: a low-rank edit becomes one of higher rank, a sparse one a sum. Nothing dense is built for it.
Cutting it to a rank loses what the error says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from intarsia.analyze.change import base_weight, change_norm
from intarsia.analyze.intruders import Intruders
from intarsia.analyze.product import directions
from intarsia.analyze.reduced import reduced
from intarsia.edits import Edit, LowRank, add
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter

Progress = Callable[[int, int, str], None]  # done, all, what

LAMBDA = 0.75


def repaired(edit: Edit, looked: Intruders, factor: float = LAMBDA) -> Edit:
    """The edit with its intruders scaled by ``factor`` (lambda), losslessly; the very same edit where there are none.

    Raises:
        IntarsiaError: for a factor that is not a finite number, or intruders of a weight of another shape.
    """
    check_factor(factor)
    if tuple(looked.shape) != tuple(edit.shape):
        raise IntarsiaError(
            f"{looked.name}: these intruders are of a weight {looked.shape}; the edit is of {edit.shape}"
        )
    if not looked.found or factor == 1:
        return edit
    chosen = [one.j for one in looked.found]
    root = looked.changed.S[chosen].sqrt()
    B = (looked.changed.U[:, chosen] * root).float()  # (O, n)
    A = (root[:, None] * looked.changed.Vh[chosen]).float()  # (n, I)
    return add(edit, LowRank(edit.shape, B.contiguous(), A.contiguous(), factor - 1.0))


def check_factor(factor: float) -> None:
    """Raise IntarsiaError for a lambda that means nothing."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        raise IntarsiaError(f"lambda={factor!r}; expected a finite number: 1 keeps intruders, 0 removes them")


def truncated(edit: Edit, rank: int, weight: Tensor | None = None, scale: float | None = None) -> tuple[LowRank, float]:
    """The best edit of a rank, and what it loses: ||D - D'|| / ||D|| (Eckart and Young). B and A share sqrt(S) equally.

    Args:
        weight: what the edit is set into, for those that depend on it.
        scale: of the new edit; by default 1, of a low-rank edit its own. B and A are divided by it.

    Raises:
        IntarsiaError: for a rank below 1, a scale of zero, or an edit that depends on a weight that is not given.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise IntarsiaError(f"rank={rank!r}; expected a whole number, 1 or more")
    scale = (edit.scale if isinstance(edit, LowRank) else 1.0) if scale is None else scale
    if not scale:
        raise IntarsiaError("a low-rank edit of scale 0 changes nothing; give the scale of the new one")
    found = directions(reduced(edit, weight))
    U, S, V = found.U, found.s, found.V
    total = float(S.double().norm())
    # A negative scale is kept, as whoever restores the adapter knows it; one of the factors takes the sign.
    root = (S[:rank] / abs(scale)).sqrt()
    B, A = U[:, :rank] * root, math.copysign(1.0, scale) * root[:, None] * V[:, :rank].mT
    lost = float(S[rank:].double().norm()) / total if total else 0.0
    return LowRank(edit.shape, B.contiguous(), A.contiguous(), scale), lost


@dataclass(frozen=True, eq=False)
class Repaired:
    """A repaired adapter, and what became of it.

    Attributes:
        intruders: how many were scaled, in how many ``weights``.
        loss: ||change - written|| / ||change|| over all weights that were cut to a rank; 0.0 where all is exact.
    """

    adapter: Adapter
    intruders: int
    weights: int
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"intruders": self.intruders, "weights": self.weights, "loss": self.loss, "digest": self.adapter.digest}


def repair(
    adapter: Adapter,
    looked: Sequence[Intruders],
    weights: Mapping[str, Tensor],
    *,
    factor: float = LAMBDA,
    rank: int | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Repaired:
    """The adapter with the intruders of every weight scaled by ``factor`` (lambda). The adapter given stays as it is.

    Its note is left out: losses that were measured before are none of the repaired one's.

    Args:
        looked: what :func:`~intarsia.analyze.adapter_intruders` found.
        rank: cut the weights that had intruders to low-rank edits of this rank, as a LoRA of fixed rank needs; None is lossless.
        name: of the new adapter; by default the old one's.

    Raises:
        IntarsiaError: for settings out of range, and intruders that belong to other weights.
    """
    check_factor(factor)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise IntarsiaError(f"rank={rank!r}; expected a whole number, 1 or more, or none to lose nothing")
    by_weight = {one.name: one for one in looked}
    if strange := sorted(by_weight.keys() - set(adapter.outlines)):
        raise IntarsiaError(f"the adapter does not edit {', '.join(strange[:3])}, whose intruders were given")
    edits: dict[str, Edit] = {}
    lost = total = 0.0
    for done, (weight_name, edit) in enumerate(adapter.edits.items(), 1):
        edits[weight_name] = edit
        one = by_weight.get(weight_name)
        if one is not None and one.found and factor != 1:
            edits[weight_name] = new = repaired(edit, one, factor)
            if rank is not None:
                weight = base_weight(weights, weight_name, edit)
                scale = edit.scale if isinstance(edit, LowRank) and edit.scale else None
                edits[weight_name], error = truncated(new, rank, weight, scale)
                length = change_norm(new, weight)
                lost, total = math.hypot(lost, error * length), math.hypot(total, length)
        if progress:
            progress(done, len(adapter.edits), "repairing")
    count = sum(len(one.found) for one in looked)
    about = {
        "repaired": {
            "of": adapter.digest,
            "intruders": count,
            "lambda": factor,
            **({} if rank is None else {"rank": rank}),
        }
    }
    made = replace(adapter, name=name or adapter.name, edits=edits, about={**adapter.about, **about}, note={})
    return Repaired(made, count, sum(bool(one.found) for one in looked), lost / total if total else 0.0)
