"""Intruder dimensions: leading singular vectors of a changed weight that the base's weight has no counterpart of.

Shuttleworth, Andreas, Torralba & Sharma 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv:2410.21228, sec. 3.

    W0 = U0 S0 V0^T,  W1 = W0 + D = U1 S1 V1^T,    sim_j = max_i |u1_j . u0_i|  over all i, for the first k columns of U1

Direction j is an intruder where sim_j < eps. The paper takes left vectors (of the outputs), k = 10 and eps = 0.5.

One thing is ours. Singular vectors of nearly equal singular values rotate freely within the space that they span, so sim_j may
drop although nothing has changed. Beside sim_j we take the length of u1_j within every window of base vectors whose singular
values agree to a relative ``degenerate``; it is never below sim_j, and it decides. ``degenerate=0`` is the paper's rule.

O out_features, I in_features, m = min(O, I).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.analyze.change import base_weight
from intarsia.edits import Edit
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter

Progress = Callable[[int, int, str], None]  # done, all, what

TOP, EPSILON, DEGENERATE = 10, 0.5, 1e-3
SIDES = ("left", "right", "both")


@dataclass(frozen=True, eq=False)
class SVD:
    """A thin decomposition U diag(S) Vh of a weight, in float32 or wider: U (O, m), S (m,), Vh (m, I)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> SVD:
        """(O, I) -> its decomposition."""
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return cls(*torch.linalg.svd(wide, full_matrices=False))

    @classmethod
    def leading(cls, weight: Tensor, top: int) -> SVD:
        """The ``top`` largest alone, in float64: by the eigenvectors of the smaller of W W^T and W^T W, in half the time.

        Squaring costs digits of small singular values only; a direction that has no energy left is a row of zeros.
        """
        wide = weight.detach().double()
        tall = wide.shape[0] > wide.shape[1]
        Q = torch.linalg.eigh(wide.mT @ wide if tall else wide @ wide.mT).eigenvectors.flip(1)[:, :top]
        other = wide @ Q if tall else wide.mT @ Q
        S: Tensor = torch.linalg.vector_norm(other, dim=0)
        other = other / S.clamp_min(torch.finfo(S.dtype).tiny)
        return cls(other, S, Q.mT) if tall else cls(Q, S, other.mT)


@dataclass(frozen=True)
class Direction:
    """One of the leading singular directions of a changed weight.

    Attributes:
        j: its place, 0 for the largest singular value.
        value: S1_j.
        similarity: sim_j, 0..1.
        within: its length within the best window of base vectors; sim_j where no singular values are nearly equal.
        intruder: within < eps.
    """

    j: int
    value: float
    similarity: float
    within: float
    intruder: bool


@dataclass(frozen=True, eq=False)
class Intruders:
    """The leading directions of one changed weight, and which of them are intruders.

    Attributes:
        name: of the weight.
        directions: the first k, largest singular value first.
        energy_share: of ||W1||_F^2 that the intruders hold, 0..1.
        changed: the decomposition of W1, cut to k directions: U (O, k), S (k,), Vh (k, I), float64.
    """

    name: str
    shape: tuple[int, int]
    directions: tuple[Direction, ...]
    energy_share: float
    changed: SVD

    @property
    def found(self) -> tuple[Direction, ...]:
        """The intruders alone."""
        return tuple(one for one in self.directions if one.intruder)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "intruders": len(self.found),
            "energy_share": self.energy_share,
            "directions": [asdict(one) for one in self.directions],
        }


def intruders(
    weight: Tensor,
    edit: Edit,
    *,
    top: int = TOP,
    epsilon: float = EPSILON,
    side: str = "left",
    degenerate: float = DEGENERATE,
    name: str = "weight",
    base: SVD | None = None,
) -> Intruders:
    """The leading singular directions of W1 = fold(W0), each with its likeness to those of W0.

    Args:
        weight: W0 (O, I); nothing is written. W1 is computed in float32 or wider, not rounded to the weight's dtype.
        top: k, how many directions to look at.
        epsilon: eps, the likeness below which a direction is an intruder.
        side: ``left`` (outputs), ``right`` (inputs), or ``both``: an intruder is unlike on both sides.
        degenerate: relative difference below which singular values of W0 count as equal; 0 for the paper's rule.
        base: W0's decomposition, where it is known already.

    Raises:
        IntarsiaError: for settings out of range, and numbers that are not finite.
    """
    check_settings(top, epsilon, side, degenerate)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    W1 = wide + edit.delta(wide)
    if not bool(W1.isfinite().all()):
        raise IntarsiaError(f"{name}: the changed weight has numbers that are not finite, so it has no singular values")
    base = SVD.of(wide) if base is None else base
    changed = SVD.leading(W1, top)
    likeness = _likeness(base, changed, side, degenerate)
    # A direction without energy is none: below this a singular value is rounding.
    least = float(changed.S[0]) * max(W1.shape) * torch.finfo(W1.dtype).eps if len(changed.S) else 0.0
    directions = []
    for j, (sim, within) in enumerate(likeness.tolist()):
        value = float(changed.S[j])
        directions.append(Direction(j, value, sim, within, value > least and within < epsilon))
    energy = sum(one.value**2 for one in directions if one.intruder)
    total = float(W1.double().square().sum())
    return Intruders(name, edit.shape, tuple(directions), energy / total if total else 0.0, changed)


def check_settings(top: int, epsilon: float, side: str, degenerate: float = DEGENERATE) -> None:
    """Raise IntarsiaError for settings that mean nothing."""
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise IntarsiaError(f"top={top!r}; expected a whole number of directions, 1 or more")
    if not 0 <= epsilon <= 1:
        raise IntarsiaError(f"epsilon={epsilon!r}; expected a likeness from 0 to 1 (a cosine)")
    if side not in SIDES:
        raise IntarsiaError(f"side={side!r}; expected one of {', '.join(SIDES)}")
    if not 0 <= degenerate < 1:
        raise IntarsiaError(f"degenerate={degenerate!r}; expected a relative difference, 0 or more and below 1")


def _likeness(base: SVD, changed: SVD, side: str, degenerate: float) -> Tensor:
    """(sim_j, length within the best window) of each direction. -> (k, 2)."""
    starts, ends = _windows(base.S, degenerate)
    sides = []
    if side != "right":
        sides.append(_of_one_side(base.U.double().mT @ changed.U, starts, ends))
    if side != "left":
        sides.append(_of_one_side(base.Vh.double() @ changed.Vh.mT, starts, ends))
    return torch.stack(sides).amax(0)


def _of_one_side(cosines: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """(m, k) cosines of base vectors with changed ones -> (k, 2)."""
    squares = cosines.square()
    sums = torch.cat([squares.new_zeros(1, squares.shape[1]), squares.cumsum(0)])
    sim = cosines.abs().amax(0)
    within = (sums[ends] - sums[starts]).amax(0).clamp_min(0).sqrt()
    # Differences of running sums round; a window of one vector is that vector's own cosine.
    return torch.stack([sim, torch.maximum(sim, within)], dim=1).clamp_max(1.0)


def _windows(S: Tensor, degenerate: float) -> tuple[Tensor, Tensor]:
    """For each singular value the run of those within a relative ``degenerate`` of it. -> starts, ends (m,).

    Not chains of neighbours: in a wide weight these would join all values to one window that everything lies within.
    """
    m = len(S)
    places = torch.arange(m, device=S.device)
    if not m or not degenerate:
        return places, places + 1
    ascending = S.double().flip(0).contiguous()
    low = torch.searchsorted(ascending, ascending * (1 - degenerate))
    high = torch.searchsorted(ascending, ascending * (1 + degenerate), right=True)
    # Values that are zero but for rounding span no space that the base uses: each stands alone.
    alone = ascending <= ascending[-1] * m * torch.finfo(S.dtype).eps
    low, high = torch.where(alone, places, low), torch.where(alone, places + 1, high)
    return (m - high).flip(0), (m - low).flip(0)


def adapter_intruders(
    adapter: Adapter,
    weights: Mapping[str, Tensor],
    *,
    top: int = TOP,
    epsilon: float = EPSILON,
    side: str = "left",
    degenerate: float = DEGENERATE,
    bases: Mapping[str, SVD] | None = None,
    progress: Progress | None = None,
) -> list[Intruders]:
    """The intruders of every weight that an adapter edits, in its order. Two decompositions a weight: minutes for many.

    Args:
        weights: the base's, by name.
        bases: their decompositions, where several adapters of one base are looked at.

    Raises:
        IntarsiaError: for settings out of range, and weights that are missing, of another shape, or not finite.
    """
    check_settings(top, epsilon, side, degenerate)
    needed = {
        name: base_weight(weights, name, edit)
        for name, edit in adapter.outlines.items()
        if edit.in_weight() is not None  # what acts beside its layer has no directions in the weight
    }
    found = []
    for done, (name, weight) in enumerate(needed.items(), 1):
        one = intruders(
            weight,
            adapter.edits[name].in_weight() or adapter.edits[name],
            top=top,
            epsilon=epsilon,
            side=side,
            degenerate=degenerate,
            name=name,
            base=None if bases is None else bases.get(name),
        )
        found.append(one)
        if progress:
            progress(done, len(needed), "looking for intruder dimensions")
    return found
