"""Roles: what a weight is to the attention or MLP block that it stands in. Facts for methods, filled in by ``families``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """One part of one weight in a coupled structure: ``units`` heads or channels of ``width`` adjacent rows or columns each.

    Unit u of this part is the unit number ``first + u`` of the weight, counted in steps of ``width``.

    Attributes:
        block: dotted name of the weight whose columns the block reads from, the same for all weights of one block.
        kind: ``attention`` or ``mlp``.
        part: q, k, v or o; gate, up or down.
        side: ``columns`` (o, down: what reads the units) or ``rows`` (what makes them).
        width: head_dim, or 1 for a channel.
        units: heads or channels on this side; for k and v under grouped queries, the key-value heads.
        group: how many units of the column side share one of these: query heads of a key-value head, else 1.
        first: where this part begins in a weight that holds several, such as a fused q|k|v, in units.
    """

    block: str
    kind: str
    part: str
    side: str
    width: int
    units: int
    group: int = 1
    first: int = 0
