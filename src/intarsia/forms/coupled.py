"""The coupled form: heads and channels are chosen, once for a block, and trained wherever they stand.

Channel j of an MLP is column j of down and row j of up and gate; head h of an attention is columns of o and rows of q, k
and v, and with grouped queries k and v have one head for several of q and o. A block has one ranking of its units; a part
with the share s trains the first s of them, so parts with one share train the same units, and others nested ones. Nothing
is permuted: columns are read by index.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.forms.joint import Joint
from intarsia.method import Method, Start
from intarsia.role import Role
from intarsia.site import Site
from intarsia.support import Column, Granularity, Row, Shape, permute


@dataclass(frozen=True)
class _Block:
    """The trained parts of one block: (name of the weight, role)."""

    name: str
    parts: tuple[tuple[str, Role], ...]

    @property
    def units(self) -> int:
        """Heads or channels of the finest part's kind: query heads where key-value heads serve several."""
        role = self.parts[0][1]
        return role.units * role.group

    @property
    def group(self) -> int:
        """How many of these units are chosen as one, because a trained part has them in common."""
        return max(role.group for _, role in self.parts)


class Coupled(Joint):
    """Subclasses say the share of each part and how a part's units are ranked; ``scope`` is model or block."""

    moves_support = False  # rows and columns of one head or channel go together,
    avoids = False  # and a unit is free in one weight and taken in another

    @abstractmethod
    def portions(self) -> Mapping[str, float]:
        """The share of the units that is trained, by part: q, k, v, o, gate, up, down."""

    @abstractmethod
    def rank(self, site: Site, role: Role, start: Start) -> Tensor:
        """The scores of a part's units, the highest to be taken. -> (role.units,)."""

    @abstractmethod
    def by_chance(self) -> bool:
        """Whether the units are drawn, so that nothing needs a score."""

    def parts(self) -> frozenset[str]:
        return frozenset(part for part, share in self.portions().items() if share > 0)

    def granularity_at(self, shape: Shape) -> Granularity:
        return Column()

    def usual(self, shape: Shape, unit: Granularity) -> int:
        heads = getattr(unit, "width", 1) > 1  # a unit of width 1 is a channel
        made, read = (("q", "k", "v"), "o") if heads else (("gate", "up"), "down")
        portions = self.portions()
        share = portions[read] if isinstance(unit, Column) else max(portions[part] for part in made)
        return int(share * unit.units(shape))

    def units(self, shape: Shape) -> int:
        return int(self.portions()["down"] * shape[1])

    def survey(self, site: Site, start: Start) -> Tensor:
        if self.by_chance():
            return torch.empty(0)
        scores = torch.cat([self.rank(site, role, start) for role in self.mine(site)]).double().cpu()
        if not scores.isfinite().all():
            raise IntarsiaError(
                f"{site.name}: its units have scores that are not finite; check the base and the calibration data"
            )
        return scores

    def settle(
        self, sites: Mapping[str, Site], surveys: Mapping[str, Tensor] | None, seed: int
    ) -> dict[str, tuple[Method, dict[str, Any]]]:
        chosen: dict[str, list[Tensor]] = {name: [] for name in sites}
        for pool in self._pools(sites):
            order = _best_first(pool, self._scores(pool, sites, surveys, seed))
            for part in dict.fromkeys(role.part for block in pool for _, role in block.parts):
                for name, index in self._first(pool, part, order):
                    chosen[name].append(index)
        found: dict[str, tuple[Method, dict[str, Any]]] = {}
        for name, parts in chosen.items():
            index = torch.cat(parts).sort().values
            if len(index):
                role = self.mine(sites[name])[0]
                unit = (Column if role.side == "columns" else Row)(role.width)
                found[name] = (self.part(sites[name].shape, unit, len(index)), {"index": index})
        return found

    def _pools(self, sites: Mapping[str, Site]) -> Iterator[list[_Block]]:
        """The blocks that share one ranking: all of one kind in the model, or each for itself."""
        parts: dict[tuple[str, str], list[tuple[str, Role]]] = {}
        for name, site in sites.items():
            for role in self.mine(site):
                parts.setdefault((role.kind, role.block), []).append((name, role))
        kinds: dict[str, list[_Block]] = {}
        for (kind, name), members in parts.items():
            kinds.setdefault(kind, []).append(_Block(name, tuple(members)))
        for blocks in kinds.values():
            yield from [blocks] if self.scope == "model" else ([block] for block in blocks)

    def _scores(
        self, pool: Sequence[_Block], sites: Mapping[str, Site], surveys: Mapping[str, Tensor] | None, seed: int
    ) -> Tensor:
        """Of all units of a pool, block after block."""
        if surveys is None:  # evenly, as long as nothing is known
            return torch.cat([-(torch.arange(block.units) + 0.5) / block.units for block in pool])
        if self.by_chance():
            count = sum(block.units for block in pool)
            name = pool[0].name if self.scope == "block" else f"{self.name}:{pool[0].parts[0][1].kind}"
            scores = torch.empty(count, dtype=torch.double)
            scores[permute(torch.arange(count), count, Start.at(name, seed).key)] = -torch.arange(count).double()
            return scores
        totals = []
        for block in pool:
            total = torch.zeros(block.units, dtype=torch.double)
            for name, role in block.parts:
                own = dict(zip(self.mine(sites[name]), self._split(sites[name], surveys[name]), strict=True))[role]
                total += own.repeat_interleave(role.group) / role.group
            totals.append(total)
        return torch.cat(totals)

    def _split(self, site: Site, survey: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = survey.split([role.units for role in self.mine(site)])
        return parts

    def _first(self, pool: Sequence[_Block], part: str, order: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name of the weight, its units) of one part: the first of the ranking, as many as the part's share says."""
        places, start = {}, 0  # what the pool's units are in this part, counted over its weights; -1: nothing
        numbers = []
        for block in pool:
            found = next(((name, role) for name, role in block.parts if role.part == part), None)
            if found is None:
                numbers.append(torch.full((block.units,), -1))
                continue
            name, role = found
            numbers.append(start + torch.arange(block.units) // role.group)
            places[name] = (start, role)
            start += role.units
        count = int(self.portions()[part] * start)
        if count < 1:
            what = "heads" if next(iter(places.values()))[1].kind == "attention" else "channels"
            where = pool[0].name if self.scope == "block" else f"{len(places)} blocks"
            raise IntarsiaError(
                f"{self.name}: none of the {start} {what} of {where} would be trained in {part}; raise its share"
            )
        ranked = torch.cat(numbers)[order]
        ranked = ranked[ranked >= 0]
        first = torch.full((start,), len(ranked)).scatter_reduce(0, ranked, torch.arange(len(ranked)), "amin")
        taken = first.argsort(stable=True)[:count].sort().values
        for name, (low, role) in places.items():
            own = taken[(taken >= low) & (taken < low + role.units)]
            yield name, own - low + role.first


def _best_first(pool: Sequence[_Block], scores: Tensor) -> Tensor:
    """The units of a pool from the best to the worst; those that are chosen as one stay together, by their mean score."""
    order = scores.argsort(descending=True, stable=True)
    if all(block.group == 1 for block in pool):
        return order
    number, groups = 0, []
    for block in pool:
        groups.append(number + torch.arange(block.units) // block.group)
        number += block.units // block.group
    group = torch.cat(groups)
    mean = torch.zeros(number, dtype=scores.dtype).index_add_(0, group, scores) / group.bincount()
    order = order[group[order].argsort(stable=True)]
    return order[mean[group[order]].argsort(descending=True, stable=True)]
