"""The chosen form: a sparse form whose support is a point in the support space, granularity x scorer x budget x schedule."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from intarsia.edits import Edit
from intarsia.edits import Sparse as SparseEdit
from intarsia.errors import IntarsiaError
from intarsia.forms.joint import Part
from intarsia.forms.sparse import Sparse
from intarsia.method import Method, Start
from intarsia.site import Site
from intarsia.support import (
    BUDGETS,
    GRANULARITIES,
    OF_THE_MODEL,
    OUTSIDE,
    SCORERS,
    Granularity,
    Shape,
    allocate,
    choose,
    free_count,
    free_units,
    is_scorer,
    named_granularity,
    needs_of,
    proportional,
    score,
    top,
)

SCORER_NAMES = ("random", "struct", *SCORERS, OUTSIDE)
SCHEDULES = ("fixed", "drop-and-grow")


class Chosen(Sparse):
    """A method that has these fields; what they mean stands where a method declares them (SHiRA)."""

    density: float
    scorer: str
    granularity: str
    width: int | None
    budget: str
    offset: int
    schedule: str
    every: int
    swap: float

    def require_support(self) -> None:
        """For ``__post_init__``: one readable error for a support that cannot be."""
        self.require(0 < self.density <= 1, "density", "in (0, 1], a share of the entries")
        known = self.scorer in ("random", "struct") or is_scorer(self.scorer)
        self.require(known, "scorer", "one of " + ", ".join(SCORER_NAMES))
        self.require(self.granularity in GRANULARITIES, "granularity", "one of " + ", ".join(GRANULARITIES))
        named_granularity(self.granularity, self.width)  # raises for a width that cannot be
        entries = self.granularity == "element" or self.scorer != "struct"
        self.require(entries, "scorer", "another one with larger units: struct chooses entries")
        self.require(self.offset >= 0, "offset", "0 or a row number")
        self.require(self.budget in BUDGETS, "budget", "one of " + ", ".join(BUDGETS))
        self.require(self.budget == "weight" or self.scorer != "struct", "budget", "weight with the scorer struct")
        ranks = not self.chooses_together() or self.scorer != "random"
        self.require(ranks, "budget", "weight or neuron with the scorer random, which ranks no weight above another")
        in_rows = self.budget != "neuron" or self.granularity in ("element", "line")
        self.require(in_rows, "budget", f"another one: a {self.granularity} is no part of a single output row")

        self.require(self.schedule in SCHEDULES, "schedule", "one of " + ", ".join(SCHEDULES))
        self.require(self.every >= 1, "every", "1 or more optimizer steps")
        self.require(0 < self.swap < 1, "swap", "in (0, 1), a share of the support")

    def moves(self, step: int, steps: int) -> float:
        """Every so many steps, a share that falls to nothing at three quarters of the run, so that all units are trained."""
        if self.schedule == "fixed" or step % self.every:
            return 0.0
        return self.swap * max(0.0, 1 - step / (0.75 * steps))

    def grows_by(self) -> str:
        return self.scorer if self.scorer in ("gradient", "snip", "fisher") else "gradient"

    @abstractmethod
    def scale_of(self, shape: Shape, trained: int) -> float:
        """The factor in front of the values of a weight of which so many entries are trained."""

    def scale_at(self, shape: Shape) -> float:
        return self.scale_of(shape, self.trained_count(shape))

    def granularity_at(self, shape: Shape) -> Granularity:
        return named_granularity(self.granularity, self.width)

    def units(self, shape: Shape) -> int:
        units, rows = self.granularity_at(shape).units(shape), shape[0] if self.budget == "neuron" else 1
        return round(self.density * (units // rows)) * rows

    def needs(self) -> frozenset[str]:
        return frozenset() if self.scorer in ("random", "struct") else needs_of(self.scorer)

    def choose(self, site: Site, start: Start) -> Tensor:
        unit, count, by_row = self.granularity_at(site.shape), self.units(site.shape), self.budget == "neuron"
        return choose(unit, self.scorer, count, site, start, self.offset, by_row)

    # --- a budget of the whole model: what stands at a weight is a part with a count of its own

    def chooses_together(self) -> bool:
        return self.budget in OF_THE_MODEL

    @property
    def expected(self) -> Mapping[str, str]:  # type: ignore[override]
        together = {"same seed same adapter": "all targets share one budget"}
        return together if self.chooses_together() else {}

    def survey(self, site: Site, start: Start) -> Tensor:
        """Of the units that may be chosen."""
        unit = self.granularity_at(site.shape)  # root mean squares, so that a unit is not better for being larger
        scores = unit.reduce(score(self.scorer, site, start)) / math.sqrt(unit.size(site.shape))
        free = free_units(unit, site)
        return scores if free is None else scores[free.to(scores.device)]

    def settle(
        self, sites: Mapping[str, Site], surveys: Mapping[str, Tensor] | None, seed: int
    ) -> Mapping[str, tuple[Method, Mapping[str, Any]]]:
        if not self.chooses_together():
            return super().settle(sites, surveys, seed)
        units = {name: self.granularity_at(site.shape).units(site.shape) for name, site in sites.items()}
        total = round(self.density * sum(units.values()))
        if not total:
            raise IntarsiaError(
                f"{self.name}: none of the {sum(units.values())} units of {len(sites)} weights would be trained; raise the density"
            )
        room = {name: free_count(self.granularity_at(site.shape), site) for name, site in sites.items()}
        if total > sum(room.values()):
            raise IntarsiaError(
                f"{self.name}: {total} units of {len(sites)} weights are asked for, and {sum(room.values())} of their "
                f"{sum(units.values())} are left beside the adapters to avoid; ask for fewer, or avoid fewer adapters"
            )
        if surveys is None:
            counts = proportional(room, room, total)
        else:
            counts = allocate(self.budget, {name: surveys[name] for name in sites if room[name]}, total)
        return {
            name: (
                self._part(sites[name].shape, k),
                {} if surveys is None else {"index": self._best(sites[name], surveys[name], k)},
            )
            for name, k in counts.items()
            if k
        }

    def _best(self, site: Site, scores: Tensor, count: int) -> Tensor:
        """The units with the highest scores, which are of those that may be chosen."""
        best, free = top(scores, count), free_units(self.granularity_at(site.shape), site)
        return best if free is None else free.nonzero().squeeze(1)[best]

    def _part(self, shape: Shape, count: int) -> Part:
        unit = self.granularity_at(shape)
        return Part(self.name, unit, count, self.scale_of(shape, count * unit.size(shape)))

    def at(self, edit: Edit, site: Site) -> Method:
        fits = isinstance(edit, SparseEdit) and edit.granularity == self.granularity_at(edit.shape)
        return self._part(edit.shape, len(edit.index)) if self.chooses_together() and fits else self  # type: ignore[attr-defined]

    def check(self, site: Site) -> str | None:
        if self.chooses_together():
            return f"{site.name}: budget={self.budget!r} is of the whole model, so {self.name} cannot be inside of another method"
        return super().check(site) or self._short_row(site)

    def _short_row(self, site: Site) -> str | None:
        """Which row has too few units left, where each gets as many as any other."""
        if self.budget != "neuron" or site.avoid is None:
            return None
        unit, rows = self.granularity_at(site.shape), site.shape[0]
        free = free_units(unit, site)
        assert free is not None
        left, wanted = free.view(rows, -1).sum(1), self.units(site.shape) // rows
        if wanted <= int(left.min()):
            return None
        return (
            f"{site.name}: {wanted} {unit.plural} of every row are asked for, and in row {int(left.argmin())} {int(left.min())} are left "
            "beside the adapters to avoid; ask for fewer, or avoid fewer adapters"
        )
