"""What a deck holds: which adapters act, and what is kept for taking them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from intarsia.deck.plan import Plan, size_of

BITS, COPY = "bits of the support", "copy of the weight"


@dataclass(frozen=True)
class Kept:
    """How one weight is kept: the base's ``bits of the support``, or, for low ranks and other dense edits, an exact

    ``copy of the weight``. ``entries``: how many are set in; ``bytes``: what is kept of the base."""

    how: str
    entries: int
    bytes: int


@dataclass(frozen=True)
class Inserted:
    """What acts beside a layer: the ``kinds`` of functions, and what they cost: ``multiplications`` of numbers for every token. Of a decoder,

    what stands before its tokens, at how many ``positions``."""

    kinds: tuple[str, ...]
    multiplications: int
    positions: int = 0


@dataclass(frozen=True)
class Status:
    """A deck at one moment.

    Attributes:
        active: adapter -> weight, empty for the base.
        strength: what the weights given to use() or fuse() have been multiplied by; see ``strength()``.
        weights: what is touched, and how each weight is kept.
        inserts: what acts beside the layers of these weights. It costs time at every token, as what is set into weights does not.
        kept_bytes: of the base's bits and copies that taking out needs. They are kept whatever the budget says.
        memory, plan_bytes: the budget for plans and adapters that were read, and what of it is used.
        planned: what can be set in without planning.
        dropped: what went because of the budget, the last ones.
        writer: ``native`` (machine code), ``staged`` (plans in the host's memory) or ``torch``.
    """

    active: Mapping[str, float]
    strength: float
    weights: Mapping[str, Kept]
    inserts: Mapping[str, Inserted]
    kept_bytes: int
    memory: int
    plan_bytes: int
    planned: tuple[str, ...]
    dropped: tuple[str, ...]
    writer: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        what = " + ".join(f"{share:g} {name}" for name, share in self.active.items()) or "the base"
        hows = [kept.how for kept in self.weights.values()]
        counts = ", ".join(f"{hows.count(how)} by {how}" for how in (BITS, COPY) if how in hows)
        kept = f"; {len(hows)} weights touched, kept {counts}, {self.kept_bytes / 1e6:.1f} MB" if hows else ""
        beside = sum(one.multiplications for one in self.inserts.values())
        ahead = sum(one.positions for one in self.inserts.values())
        layers = sum(not one.positions for one in self.inserts.values())
        places = [f"beside {layers} layers"] if layers else []
        places += [f"at {ahead} positions before the tokens"] if ahead else []
        kept += f"; inserts {' and '.join(places)}, {beside:,} multiplications a token" if places else ""
        lost = f"; dropped last: {', '.join(self.dropped[-3:])}" if self.dropped else ""
        return (
            f"{what}{kept}; plans {self.plan_bytes / 1e6:.1f} of {self.memory / 1e6:.1f} MB ({len(self.planned)} ready)"
            f"{lost}; written by {self.writer}"
        )


def beside_of(plan: Plan) -> dict[str, Inserted]:
    """What a plan inserts beside the layer of each weight."""
    return {
        name: Inserted(
            tuple(one.inserted.what for one in together.inserts),
            together.multiplications,
            sum(one.count for one in together.inserts),
        )
        for name, together in plan.inserts.items()
    }


def kept_of(plan: Plan) -> dict[str, Kept]:
    """How each weight of a plan is kept."""
    found = {
        name: Kept(BITS, where.base[where.part(n)].numel(), size_of(where.base[where.part(n)]))
        for where in plan.where
        for n, name in enumerate(where.weights)
    }
    return found | {name: Kept(COPY, w.base.numel(), size_of(w.base)) for name, w in plan.whole.items()}
