"""All that ``intarsia compress --to`` knows in one table, and the one function behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from intarsia.compress.bits import in_bits
from intarsia.compress.numbers import Progress
from intarsia.compress.rank import to_low_rank, to_prefix, to_sparse
from intarsia.compress.search import within
from intarsia.compress.sparsify import prune, stc, ternary
from intarsia.errors import IntarsiaError, nearest
from intarsia.store import Adapter


@dataclass(frozen=True)
class Target:
    """One way to compress.

    Attributes:
        make: adapter and options -> adapter.
        needs: options that must be given.
        takes: options that may be given.
        thins: whether it takes a density, so that a budget of bytes can set it.
    """

    title: str
    make: Callable[..., Adapter]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    thins: bool = False


TARGETS: dict[str, Target] = {
    "ternary": Target("ComPEFT: the largest numbers as +- alpha * std", ternary, ("density",), ("alpha",), thins=True),
    "stc": Target("the largest numbers as +- their mean", stc, ("density",), thins=True),
    "bits": Target("every number in 1, 2, 4 or 8 bits", in_bits, ("bits",)),
    "prune": Target("the most important numbers as they are", prune, ("density",), thins=True),
    "low-rank": Target("the nearest low rank of every weight's change", to_low_rank, ("rank",)),
    "prefix": Target("the first ranks, of an adapter that was trained to act with them alone", to_prefix, ("rank",)),
    "sparse": Target("the largest entries of every weight's change", to_sparse, ("density",), thins=True),
}


def compressed(
    adapter: Adapter,
    to: str,
    *,
    density: float | None = None,
    alpha: float | None = None,
    bits: int | None = None,
    rank: int | None = None,
    budget: int | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """The adapter, compressed by the rule of that name.

    Args:
        to: a name in :data:`TARGETS`.
        density, alpha, bits, rank: see the rules that take them.
        budget: bytes of the folder, instead of a density: the highest one that keeps to it.

    Raises:
        IntarsiaError: for an unknown rule, an option that it does not take or lacks, and whatever the rule refuses.
    """
    target = check_options(to, density=density, alpha=alpha, bits=bits, rank=rank, budget=budget)
    given: dict[str, Any] = {"density": density, "alpha": alpha, "bits": bits, "rank": rank}
    options = {name: value for name, value in given.items() if value is not None}
    if budget is not None:
        return within(budget, lambda share: target.make(adapter, density=share, **options), progress)
    return target.make(adapter, **options)


def check_options(to: str, **options: Any) -> Target:
    """The rule of that name. Raises IntarsiaError for an unknown one, and options that it does not take or lacks; None is not given."""
    if to not in TARGETS:
        raise IntarsiaError(f"no rule {to!r} to compress by; {nearest(to, TARGETS)}")
    target = TARGETS[to]
    given = {name for name, value in options.items() if value is not None}
    known = {*target.needs, *target.takes, *(("budget",) if target.thins else ())}
    if unwanted := sorted(given - known):
        takers = [name for name, other in TARGETS.items() if unwanted[0] in (*other.needs, *other.takes)]
        takers = takers or [name for name, other in TARGETS.items() if other.thins]
        raise IntarsiaError(f"{to} takes no {unwanted[0]} (--{unwanted[0]}); that is for {', '.join(takers)}")
    if target.thins and {"budget", "density"} <= given:
        raise IntarsiaError("a density and a budget are given; one follows from the other, leave one out")
    missing = [name for name in target.needs if name not in given and not (name == "density" and "budget" in given)]
    if missing:
        more = ", or a budget of bytes (--budget)" if target.thins else ""
        raise IntarsiaError(f"{to} needs a {missing[0]} (--{missing[0]}){more}")
    return target
