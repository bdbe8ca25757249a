"""Plans: the bits that an adapter or a fusion puts into the weights, those that it puts them over, and where.

Made once and used at every switch: sorted, cast to the weights' dtype, all weights of one kind of run behind one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intarsia.deck.inserts import Together
from intarsia.edits import Runs, check_finite, gathered, put, summed
from intarsia.edits.placement import Terms

Keep = Callable[[Tensor], Tensor]  # the same numbers where a writer wants them
IndexDtype = Callable[[Tensor, int], torch.dtype]
Shares = tuple[tuple[str, float], ...]  # (adapter, weight) of what is set in


@dataclass(frozen=True, eq=False)
class Where:
    """Runs of one length in several weights of one dtype, behind one another, and the base's bits there."""

    run: int
    weights: tuple[str, ...]
    starts: tuple[int, ...]  # of each weight's part; one more at the end
    index: Tensor  # (n,)
    base: Tensor  # (n, run)

    def part(self, number: int) -> slice:
        return slice(self.starts[number], self.starts[number + 1])


@dataclass(frozen=True, eq=False)
class Whole:
    """A weight that is written whole: an exact copy of the base's, and what is to be set into it."""

    base: Tensor
    terms: Terms


@dataclass(frozen=True, eq=False)
class Plan:
    """What is set in with these shares. ``bits[i]`` belong to ``where[i]``; ``inserts`` act beside the layers of weights."""

    shares: Shares = ()
    where: tuple[Where, ...] = ()
    bits: tuple[Tensor, ...] = ()
    whole: Mapping[str, Whole] = field(default_factory=dict)
    inserts: Mapping[str, Together] = field(default_factory=dict)

    @property
    def weights(self) -> list[str]:
        return [name for where in self.where for name in where.weights] + list(self.whole)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the base's bits."""
        return sum(size_of(where.base) for where in self.where) + sum(size_of(w.base) for w in self.whole.values())

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        beside = sum(together.bytes for together in self.inserts.values())
        return (
            self.kept_bytes + sum(size_of(where.index) for where in self.where) + sum(map(size_of, self.bits)) + beside
        )

    def moved(self, like: Callable[[str], Tensor], index_dtype: IndexDtype, keep: Keep) -> Plan:
        """The same plan for weights of another device or dtype: a copy of bits in another dtype is what the weights' own are."""
        where, bits = [], []
        for old, own in zip(self.where, self.bits, strict=True):
            to = like(old.weights[0])
            index, base = old.index.to(to.device, index_dtype(to, old.run)), old.base.to(to.device, to.dtype)
            where.append(Where(old.run, old.weights, old.starts, keep(index), keep(base)))
            bits.append(keep(own.to(to.device, to.dtype)))
        whole = {
            n: Whole(
                keep(w.base.to(like(n).device, like(n).dtype)), [(c, edit.to(like(n).device)) for c, edit in w.terms]
            )
            for n, w in self.whole.items()
        }
        return Plan(self.shares, tuple(where), tuple(bits), whole, self.inserts)


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def made(
    shares: Shares,
    terms: Mapping[str, Terms],
    base_of: Callable[[str], Tensor],
    index_dtype: IndexDtype,
    keep: Keep,
) -> Plan:
    """The plan of setting in ``terms``, the weighted edits of each weight. Writes nothing.

    ``base_of(weight)`` is the base's matrix (O, I), free of what is set in now. ``index_dtype(weight, run)``: what the
    writer wants; ``keep``: where it wants the numbers.

    Raises:
        IntarsiaError: where a result is not finite in the weight's dtype.
    """
    found: dict[tuple[int, torch.dtype, torch.dtype, torch.device], list[tuple[str, Tensor, Tensor, Tensor]]] = {}
    whole: dict[str, Whole] = {}
    for name, parts in terms.items():
        W = base_of(name)
        here = [(weight, edit.to(W.device)) for weight, edit in parts]
        change = summed(W, here, torch.promote_types(W.dtype, torch.float32))
        if change is None:
            whole[name] = Whole(keep(W), here)
            continue
        base, bits = _rounded(name, W, change)
        index = change.index.to(index_dtype(W, change.run))
        found.setdefault((change.run, W.dtype, index.dtype, W.device), []).append((name, index, base, bits))
    where, own = [], []
    for (run, *_), parts_of in found.items():
        names, indices, bases, all_bits = zip(*parts_of, strict=True)
        starts = [0]
        for index in indices:
            starts.append(starts[-1] + len(index))
        where.append(Where(run, names, tuple(starts), keep(torch.cat(indices)), keep(torch.cat(bases))))
        own.append(keep(torch.cat(all_bits)))
    return Plan(shares, tuple(where), tuple(own), whole)


def _rounded(name: str, W: Tensor, change: Runs) -> tuple[Tensor, Tensor]:
    """(the base's bits, those that are set in) at the place of a change."""
    base = gathered(W, change.run, change.index)
    bits = (base.to(change.values.dtype) + change.values).to(W.dtype)
    check_finite(name, bits)
    return base, bits


# ------------------------------------------------------------------ from one plan to the next
@dataclass(frozen=True, eq=False)
class Batch:
    """Two lists of runs, each ascending within a weight: ``a`` is written where ``b`` has nothing, else ``b``.

    pieces: (weight, its part of a, its part of b).
    """

    run: int
    pieces: tuple[tuple[str, slice, slice], ...]
    a: tuple[Tensor, Tensor]  # index, bits (n, run)
    b: tuple[Tensor, Tensor]


NOTHING = slice(0, 0)


@dataclass(frozen=True, eq=False)
class Passage:
    """From what is set in to what is to be: every run once. Weights that were written whole get the base's copy first,
    those that are to be written whole get it instead."""

    copies: tuple[str, ...]  # weights whose exact copy goes back
    batches: tuple[Batch, ...]


def passage(old: Plan, new: Plan) -> Passage:
    """The base's bits for what ``old`` alone touches, the new ones for what ``new`` touches; nothing is written twice.

    Where one weight has runs of two lengths, the longer ones take in what lies within them.
    """
    before = {
        name: (where, number)
        for where in old.where
        for number, name in enumerate(where.weights)
        if name not in new.whole
    }
    copies = tuple(name for name in old.whole if name not in new.whole)
    batches: list[Batch] = []
    for where, bits in zip(new.where, new.bits, strict=True):
        others = [w for w in old.where if _alike(w, where)]
        other = others[0] if others else None
        pieces = []
        for number, name in enumerate(where.weights):
            was = before.get(name)
            if was is None:
                pieces.append((name, NOTHING, where.part(number)))
            elif was[0] is other:
                pieces.append((name, other.part(was[1]), where.part(number)))
                del before[name]
            else:
                batches += _mixed(name, was, where, number, bits)
                del before[name]
        a = (where.index[:0], where.base[:0]) if other is None else (other.index, other.base)
        batches.append(Batch(where.run, tuple(pieces), a, (where.index, bits)))
    for where in old.where:
        left = tuple((n, where.part(i), NOTHING) for i, n in enumerate(where.weights) if n in before)
        if left:
            batches.append(Batch(where.run, left, (where.index, where.base), (where.index[:0], where.base[:0])))
    return Passage(copies, tuple(batch for batch in batches if batch.pieces))


def _alike(one: Where, other: Where) -> bool:
    return (one.run, one.index.dtype, one.base.dtype, one.base.device) == (
        other.run,
        other.index.dtype,
        other.base.dtype,
        other.base.device,
    )


def _mixed(name: str, was: tuple[Where, int], where: Where, number: int, bits: Tensor) -> Iterable[Batch]:
    """One weight of two lengths of run: two batches that have no entry in common."""
    part, old_part = where.part(number), was[0].part(was[1])
    fresh = Runs(where.run, where.index[part].long(), bits[part])
    stale = Runs(was[0].run, was[0].index[old_part].long(), was[0].base[old_part])
    dtypes = {where.run: where.index.dtype, was[0].run: was[0].index.dtype}
    short_wins = fresh.run < stale.run  # what is new does
    long, short = (stale, fresh) if short_wins else (fresh, stale)
    if long.run % short.run:  # neither fits into the other: both in entries
        long, short, dtypes = long.cut(1), short.cut(1), {1: torch.int64}
    each = long.run // short.run
    spot = torch.searchsorted(long.index, short.index // each).clamp_max(len(long.index) - 1)
    within = long.index[spot] == short.index // each
    values = long.values
    if short_wins:
        values = values.clone()
        values.view(-1, short.run)[spot[within] * each + short.index[within] % each] = short.values[within]
    outside = ~within
    for runs in (Runs(long.run, long.index, values), Runs(short.run, short.index[outside], short.values[outside])):
        if len(runs.index):
            index = runs.index.to(dtypes.get(runs.run, torch.int64))
            nothing = (index[:0], runs.values[:0])
            yield Batch(runs.run, ((name, NOTHING, slice(0, len(index))),), nothing, (index, runs.values))


# ------------------------------------------------------------------ going back
def restore(plans: Sequence[Plan], matrix: Callable[[str], Tensor]) -> None:
    """The base's bits wherever one of these plans may have written, whatever stands there. Plainly, weight by weight."""
    with torch.no_grad():
        for plan in plans:
            for name, whole in plan.whole.items():
                matrix(name).copy_(whole.base)
        for plan in plans:
            for where in plan.where:
                _each(where, where.base, matrix)


def renew(plan: Plan, matrix: Callable[[str], Tensor], whole: Mapping[str, Tensor]) -> None:
    """The plan's bits into the base, and the copies of weights written whole. Plainly, weight by weight."""
    with torch.no_grad():
        for name, bits in whole.items():
            matrix(name).copy_(bits)
        for where, bits in zip(plan.where, plan.bits, strict=True):
            _each(where, bits, matrix)


def put_part(W: Tensor, where: Where, number: int) -> None:
    """The base's bits of one weight into W."""
    part = where.part(number)
    _put(W, where, part, where.base)


def _each(where: Where, bits: Tensor, matrix: Callable[[str], Tensor]) -> None:
    for number, name in enumerate(where.weights):
        _put(matrix(name), where, where.part(number), bits)


def _put(W: Tensor, where: Where, part: slice, bits: Tensor) -> None:
    put(W, where.run, where.index[part].to(W.device, torch.int64), bits[part].to(W.device))
