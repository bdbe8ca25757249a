"""What an adapter changes, weight by weight: how much, where, and what of it the base's number format can show."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.analyze.rankme import rankme
from intarsia.analyze.spectrum import (
    change_of,
    effective_rank,
    energy_share,
    needs_weight,
    numerical_rank,
    spectrum,
    stable_rank,
)
from intarsia.edits import Edit, Sparse, place, summed
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter

Progress = Callable[[int, int, str], None]  # done, all, what


def change_norm(edit: Edit, weight: Tensor | None = None) -> float:
    """Frobenius norm of what the edit adds. Sparse and low-rank edits need no weight and build no (O, I) matrix.

    Raises:
        IntarsiaError: for a rescaled edit when no weight is given.
    """
    if isinstance(edit, Sparse):
        return float(edit.values.double().norm())
    if (low := edit.low_rank()) is not None and low.A.shape[0] < min(edit.shape):
        return float(spectrum(edit).double().norm())
    return float(change_of(edit, weight).double().norm())


@dataclass(frozen=True)
class Rounding:
    """What becomes of a change that is rounded into a weight's number format.

    Attributes:
        changed: entries that the edit changes at all in exact arithmetic.
        invisible: how many of them keep the very bits that the base had.
        error: ||rounded - exact|| / ||exact change||, over the whole weight.
    """

    changed: int
    invisible: int
    error: float

    @property
    def invisible_share(self) -> float:
        """invisible / changed; 0 where nothing is changed."""
        return self.invisible / self.changed if self.changed else 0.0


def rounding(edit: Edit, weight: Tensor, name: str = "weight") -> Rounding:
    """What is lost when the edit is set into a base weight: a bfloat16 weight w cannot show a change below |w| / 256.

    (O, I) -> counts and the error; nothing is written.
    """
    weight = weight.detach()
    set_in = place(name, weight, [(1.0, edit)])
    wide = torch.promote_types(weight.dtype, torch.float32)
    before = set_in.read(weight).bits.to(wide)
    after = set_in.bits.to(wide)
    exact = _exact(edit, weight, wide)
    changed = exact != 0
    length = exact.norm()
    error = float((after - before - exact).norm() / length) if length > 0 else 0.0
    return Rounding(int(changed.sum()), int((changed & (after == before)).sum()), error)


def invisible_share(edit: Edit, weight: Tensor) -> float:
    """The share of changed entries that vanish, 0..1, when the edit is set into the weight and rounded to its dtype."""
    return rounding(edit, weight).invisible_share


def _exact(edit: Edit, weight: Tensor, wide: torch.dtype) -> Tensor:
    """The change, unrounded, in the places that a placement of this edit writes."""
    runs = summed(weight, [(1.0, edit)], wide)
    return edit.delta(weight.to(wide)) if runs is None else runs.values


# ------------------------------------------------------------------ a whole adapter


@dataclass(frozen=True)
class WeightChange:
    """What the adapter does to one weight, or beside its layer. Numbers that need the base's weight are None without it."""

    name: str
    module: str  # the last part of the layer's name: q_proj
    layer: int | None  # the first number in the name
    edit: str
    shape: tuple[int, int]
    touched: int
    bytes: int
    norm: float | None
    weight_norm: float | None
    rounding: Rounding | None
    changes_weight: bool = True  # False where all of it is inserted beside the layer; then there is no norm
    multiplications: int = 0  # for every token, by what is inserted
    positions: int = 0  # that it takes before the tokens

    @property
    def relative(self) -> float | None:
        """norm / weight_norm."""
        return self.norm / self.weight_norm if self.norm is not None and self.weight_norm else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"shape": list(self.shape), "relative": self.relative}


@dataclass(frozen=True)
class Group:
    """Several weights together, such as all of one module or of one layer."""

    name: str
    weights: int
    edits: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    touched: int
    size: int
    bytes: int
    norm: float | None
    relative: float | None
    invisible_share: float | None  # of the changed entries
    rounding_error: float | None  # ||lost|| / ||change||
    multiplications: int = 0  # for every token, by what is inserted beside the layers
    positions: int = 0  # that it takes before the tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"edits": list(self.edits), "shapes": [list(shape) for shape in self.shapes]}


def group(changes: Sequence[WeightChange], by: Callable[[WeightChange], object]) -> list[Group]:
    """Sum up the weights that are alike under ``by``, in the order in which they first appear."""
    members: dict[object, list[WeightChange]] = {}
    for change in changes:
        members.setdefault(by(change), []).append(change)
    return [_sum(str(key), of) for key, of in members.items()]


def _sum(name: str, of: Sequence[WeightChange]) -> Group:
    weights = [c for c in of if c.changes_weight]
    norms = [c.norm for c in weights if c.norm is not None]
    sizes = [c.weight_norm for c in weights if c.weight_norm is not None]
    lost = [c.rounding for c in weights if c.rounding is not None]
    norm = math.hypot(*norms) if weights and len(norms) == len(weights) else None
    size = math.hypot(*sizes) if weights and len(sizes) == len(weights) else None
    whole = bool(weights) and len(lost) == len(weights)
    errors = math.hypot(*(r.error * n for r, n in zip(lost, norms, strict=True))) if whole else 0.0
    changed = sum(r.changed for r in lost)
    return Group(
        name=name,
        weights=len(of),
        edits=tuple(dict.fromkeys(c.edit for c in of)),
        shapes=tuple(dict.fromkeys(c.shape for c in of)),
        touched=sum(c.touched for c in of),
        size=sum(c.shape[0] * c.shape[1] for c in of),
        bytes=sum(c.bytes for c in of),
        norm=norm,
        relative=norm / size if norm is not None and size else None,
        invisible_share=(sum(r.invisible for r in lost) / changed if changed else 0.0) if whole else None,
        rounding_error=(errors / norm if norm else 0.0) if whole else None,
        multiplications=sum(c.multiplications for c in of),
        positions=sum(c.positions for c in of),
    )


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the change of one weight, largest first, and what they come to."""

    name: str
    values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    numerical_rank: int
    rankme: float
    top_shares: Mapping[int, float]  # k -> share of the squared norm in the k largest

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the first 64 singular values among them."""
        shares = {str(k): share for k, share in self.top_shares.items()}
        return asdict(self) | {"values": list(self.values[:64]), "top_shares": shares, "of": len(self.values)}


def weight_changes(
    adapter: Adapter, weights: Mapping[str, Tensor] | None = None, progress: Progress | None = None
) -> list[WeightChange]:
    """What an adapter changes, one row a weight, in the adapter's order.

    Args:
        weights: the base's weights by name; with them, how large the change is beside the weight, and what is lost in
            rounding, are measured too.

    Raises:
        IntarsiaError: when a weight is missing or of another shape.
    """
    rows = []
    for done, (name, edit) in enumerate(adapter.edits.items(), 1):
        ahead = any(insert.count for _, insert in edit.inserts())  # of a decoder, which has no weight of its own
        weight = None if weights is None or ahead else base_weight(weights, name, edit)
        rows.append(_weight_change(name, edit, weight))
        if progress:
            progress(done, len(adapter.edits), "measuring the change")
    return rows


def base_weight(weights: Mapping[str, Tensor], name: str, edit: Edit) -> Tensor:
    """The base's weight that an edit belongs to. Raises IntarsiaError when it is missing or of another shape."""
    if name not in weights or tuple(weights[name].shape) != tuple(edit.shape):
        found = f"it is {tuple(weights[name].shape)}" if name in weights else "it has none of that name"
        raise IntarsiaError(f"{name}: the adapter edits a weight {tuple(edit.shape)}; in this model {found}")
    return weights[name].detach()


def _weight_change(name: str, edit: Edit, weight: Tensor | None) -> WeightChange:
    within = edit.in_weight()
    known = within is not None and not (weight is None and needs_weight(within))
    return WeightChange(
        name=name,
        module=module_of(name),
        layer=layer_of(name),
        edit=edit.kind,
        shape=edit.shape,
        touched=edit.touched,
        bytes=edit.bytes,
        norm=change_norm(within, weight) if within is not None and known else None,
        weight_norm=None if weight is None else float(weight.double().norm()),
        rounding=None if weight is None or within is None else rounding(within, weight, name),
        changes_weight=within is not None,
        multiplications=sum(one.multiplications for _, one in edit.inserts()),
        positions=sum(one.count for _, one in edit.inserts()),
    )


def module_of(weight: str) -> str:
    """The last part of the name of a weight's layer: ``q_proj``."""
    return weight.removesuffix(".weight").rpartition(".")[2]


def layer_of(weight: str) -> int | None:
    """The number of the layer that a weight is in: the first number in its name, or None."""
    number = re.search(r"(?<=\.)\d+(?=\.)", f".{weight}")
    return int(number[0]) if number else None


TOP = (1, 4, 16, 64)  # how many of the largest singular values the shares are told for


def spectra(
    adapter: Adapter,
    names: list[str],
    weights: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> list[Spectrum]:
    """The spectra of what an adapter adds to these weights.

    Raises:
        IntarsiaError: for a weight that it does not change, only inserts something beside.
    """
    found = []
    for done, name in enumerate(names, 1):
        edit = adapter.edits[name].in_weight()
        if edit is None:
            raise IntarsiaError(
                f"{name}: what is inserted beside a layer, or before the tokens, changes no weight, so it has no spectrum"
            )
        s = spectrum(edit, None if weights is None else base_weight(weights, name, edit))
        shares = {k: energy_share(s, k) for k in TOP if k <= len(s)}
        ranks = effective_rank(s), stable_rank(s), numerical_rank(s), rankme(s)
        found.append(Spectrum(name, tuple(s.tolist()), *ranks, shares))
        if progress:
            progress(done, len(names), "spectrum")
    return found
