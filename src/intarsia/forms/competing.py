"""The competing form: the units of many weights compete by their scores, within the model or within each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.forms.joint import Joint
from intarsia.method import Method
from intarsia.site import Site
from intarsia.support import Granularity, Shape, free_units, top


class Competing(Joint):
    """Subclasses survey a weight by the scores of its units; ``density`` is a field, and ``scope`` is model or weight."""

    density: float

    def units(self, shape: Shape) -> int:
        return round(self.density * self.granularity_at(shape).units(shape))

    def usual(self, shape: Shape, unit: Granularity) -> int:
        return self.units(shape)

    def takes(self, sites: Mapping[str, Site]) -> Mapping[str, Site]:
        found = super().takes(sites)
        for name, site in found.items():
            if self.parts() and len(self.mine(site)) < len(site.roles):
                held = ", ".join(role.part for role in site.roles)
                raise IntarsiaError(
                    f"{name} holds {held} in one weight, and {self.name} takes whole weights; name all of them"
                )
        return found

    def settle(
        self, sites: Mapping[str, Site], surveys: Mapping[str, Tensor] | None, seed: int
    ) -> dict[str, tuple[Method, dict[str, Any]]]:
        units = {name: self.granularity_at(site.shape).units(site.shape) for name, site in sites.items()}
        if surveys is None:  # evenly, as long as nothing is known
            surveys = {name: -(torch.arange(n) + 0.5) / max(1, n) for name, n in units.items()}
        found: dict[str, tuple[Method, dict[str, Any]]] = {}
        for pool in [list(sites)] if self.scope == "model" else [[name] for name in sites]:
            index, low = self._winners(pool, torch.cat([surveys[name] for name in pool]), sites), 0
            for name in pool:
                own = index[(index >= low) & (index < low + units[name])] - low
                low += units[name]
                if len(own):
                    shape = sites[name].shape
                    found[name] = self.part(shape, self.granularity_at(shape), len(own)), {"index": own}
        return found

    def _winners(self, pool: list[str], scores: Tensor, sites: Mapping[str, Site]) -> Tensor:
        where = pool[0] if len(pool) == 1 else f"{pool[0]} and {len(pool) - 1} others"
        if not scores.isfinite().all():
            raise IntarsiaError(f"{where}: scores are not finite; check the base and the calibration data")
        count = round(self.density * len(scores))
        free = self._free([sites[name] for name in pool])
        if free is not None:
            scores = scores.masked_fill(~free, -torch.inf)
            if count > (left := int(free.sum())):
                raise IntarsiaError(
                    f"{where}: {count} of the {len(scores)} units are asked for, and {left} are left beside the adapters to avoid; "
                    "ask for fewer, or avoid fewer adapters"
                )
        if count < 1:
            unit, (O, I) = self.granularity_at(sites[pool[0]].shape), sites[pool[0]].shape
            raise IntarsiaError(
                f"{where}: of the {len(scores)} {unit} in weights such as {O} x {I} none would be trained; "
                "raise the density or lower the width"
            )
        return top(scores, count)

    def _free(self, pool: Sequence[Site]) -> Tensor | None:
        """Which units of these weights may be chosen; None: all of them."""
        if all(site.avoid is None for site in pool):
            return None
        free = []
        for site in pool:
            unit = self.granularity_at(site.shape)
            here = free_units(unit, site)
            free.append(torch.ones(unit.units(site.shape), dtype=torch.bool) if here is None else here)
        return torch.cat(free)
