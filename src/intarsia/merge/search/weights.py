"""The search for the weights of a merge: from a plan and rows of every skill to the weights that retain most of them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from intarsia.deck import Deck
from intarsia.errors import IntarsiaError, nearest
from intarsia.merge.making import made
from intarsia.merge.plan import WEIGHT, Plan, Wanted, settings, settle
from intarsia.merge.rule import Rule, fields_of
from intarsia.merge.rules.sum import Sum
from intarsia.merge.search.live import Live, Rows, Use, check_apart
from intarsia.merge.search.objective import Gains, Objective
from intarsia.merge.search.outcome import Compared, Outcome
from intarsia.merge.search.search import Search, check_installed, search
from intarsia.merge.search.space import Point, Space, parameters_at, space_of
from intarsia.merge.search.trials import TrialFile
from intarsia.store import Adapter
from intarsia.train.progress import Progress, clock

DENSITY = "density"
TRIAL = "the merge of a trial"  # its name in the deck, which no adapter's name can be: it has spaces


@dataclass(frozen=True, eq=False)
class Task:
    """What is searched, and on what.

    Attributes:
        plan: the merge as it was given; its weights are where the search starts.
        rows: rows that every trial is measured on, by the adapter whose skill they are.
        held_out: other rows of the same skills, for the report.
        ranges: lowest and highest number of ``weight`` and, where they are searched, ``density``.
        points: more than 1: gradients of so many values over the layers.
        base: the base's weights, where the rule needs them.
    """

    plan: Plan
    rows: Rows
    held_out: Rows
    ranges: Mapping[str, tuple[float, float]]
    objective: Objective = Objective()  # noqa: RUF009 - frozen
    points: int = 1
    seed: int = 0
    base: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        check_skills(self.plan.adapters, self.rows)
        self.objective.check(self.rows)

    @cached_property
    def space(self) -> Space:
        """What is searched. Raises IntarsiaError where the merge as given has no single number to start from."""
        return space_of(start_of(self.plan, list(self.ranges)), self.ranges, self.points)

    @property
    def first(self) -> list[dict[str, float]]:
        """Points to try after the start: equal weights of 1 and of 1 over the number of adapters, where they are others.

        A rule that divides by the sum of the weights makes no difference between them.
        """
        rule = next(iter(self.plan.rules.values()))
        if getattr(rule, "normalize", False):
            return []
        low, high = self.ranges[WEIGHT]
        equal = [weight for weight in (1.0, 1 / len(self.plan.adapters)) if low <= weight <= high]
        start, space = self.space.start, self.space
        points = [space.checked(start | {d.name: w for d in space if d.parameter == WEIGHT}) for w in equal]
        return [point for point in points if point != start]

    def wanted(self, point: Point) -> Wanted:
        """The merge at a point: as it was given, with other numbers."""
        before = self.plan.wanted
        own = {name: dict(values) for name, values in before.own.items()}
        for name, values in parameters_at(self.space, point).items():
            own.setdefault(name, {}).update(settings(f"adapters.{name}.parameters", values))
        return replace(before, own=own)

    def merged(self, point: Point, name: str) -> Adapter:
        """The merged adapter at a point."""
        return made(settle(self.plan.adapters, self.wanted(point)), name=name, base=self.base)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the rows of each skill that trials are measured on."""
        return {skill: rows_digest(examples) for skill, examples in self.rows.items()}

    def settings(self, live: Live) -> dict[str, Any]:
        """What the trials depend on, as plain JSON values: whoever goes on with them has to have the same."""
        wanted = self.plan.wanted
        return {
            "adapters": {name: adapter.digest for name, adapter in self.plan.adapters.items()},
            "base": next(iter(self.plan.adapters.values())).base.digest,
            "merge_method": wanted.method,
            "parameters": {key: value.plain for key, value in wanted.shared.items()},
            "own parameters": {n: {key: value.plain for key, value in own.items()} for n, own in wanted.own.items()},
            "merge seed": wanted.seed,
            "data": self.digests,
            "held-out data": {skill: rows_digest(examples) for skill, examples in self.held_out.items()},
            "batch_size": live.batch_size,
            "objective": self.objective.to_dict(),
            "space": self.space.to_dict(),
            "seed": self.seed,
        }


def check_skills(adapters: Mapping[str, Any], skills: Mapping[str, Any]) -> None:
    """Raises IntarsiaError unless there are two adapters or more, each with rows of its skill, and no rows of others."""
    faults = [
        f"no adapter {skill!r} is merged; {nearest(skill, adapters)}" for skill in skills if skill not in adapters
    ]
    faults += [f"there are no rows of the skill of {name}: {name}=FILE" for name in adapters if name not in skills]
    if len(adapters) < 2:
        faults.append("a search weighs adapters against each other, and there is only one; name two or more")
    if faults:
        raise IntarsiaError("search:\n  " + "\n  ".join(faults) if len(faults) > 1 else f"search: {faults[0]}")


def ranges_of(weight: Sequence[float], density: Sequence[float] | None = None) -> dict[str, tuple[float, float]]:
    """Parameter -> lowest and highest number, for :class:`Task`; without ``density`` those stay as they are."""
    ranges = {WEIGHT: (weight[0], weight[1])}
    return ranges if density is None else ranges | {DENSITY: (density[0], density[1])}


def start_of(plan: Plan, parameters: Sequence[str]) -> dict[str, dict[str, float]]:
    """Adapter -> parameter -> the number that it has in the merge as it was given.

    Raises:
        IntarsiaError: for a parameter that the rule has not, or that is not one number at all weights.
    """
    cls = type(next(iter(plan.rules.values())))
    if cls.weights is not Rule.weights:
        raise IntarsiaError(
            f"{cls.name} finds the weights by itself, so there are none to search for; take another merge_method"
        )
    start: dict[str, dict[str, float]] = {name: {} for name in plan.adapters}
    for key in parameters:
        if key != WEIGHT and not (key in fields_of(cls) and fields_of(cls)[key].metadata.get("each")):
            raise IntarsiaError(f"search.{key}: the rule {cls.name} has no {key} of single adapters to search for")
        for name in plan.adapters:
            shares = [shares[name] for shares in plan.shares.values()]
            found = {
                share.weight if key == WEIGHT else getattr(share.rule, fields_of(cls)[key].name) for share in shares
            }
            if len(found) > 1:
                raise IntarsiaError(
                    f"the {key} of {name} is not one number at all weights, and the search starts from one; give it a plain number"
                )
            start[name][key] = float(found.pop())
    return start


def rows_digest(examples: Sequence[Any]) -> str:
    """SHA-256 of encoded rows, in their order."""
    return hashlib.sha256(repr([(e.input_ids, e.labels) for e in examples]).encode()).hexdigest()


def switch(task: Task, deck: Deck) -> Callable[[Point], None]:
    """-> what sets the merge at a point into the deck's model.

    A plain sum is the deck's own fusion: nothing is made but the plan of the switch. Of other rules the merged adapter is
    made, set in, and forgotten.
    """
    rules = set(task.plan.rules.values())
    rule = next(iter(rules))
    plain = len(rules) == 1 and isinstance(rule, Sum) and not rule.normalize and task.points == 1

    def set_in(point: Point) -> None:
        weights = {d.adapter: rule.lambda_ * point[d.name] for d in task.space if d.parameter == WEIGHT}
        if plain:
            deck.fuse(weights)
            return
        deck.off()
        if not any(point[d.name] for d in task.space if d.parameter == WEIGHT):
            return  # of nothing at all there is no merge: it is the base
        if TRIAL in deck.names:
            deck.remove(TRIAL)
        deck.add(task.merged(point, TRIAL))
        deck.use(TRIAL)

    return set_in


def find_weights(
    task: Task, live: Live, *, trials: int = 60, file: TrialFile | None = None, progress: Progress | None = None
) -> Outcome:
    """Search, and measure what was found on rows that no trial has seen. The model holds the base before and after.

    Raises:
        IntarsiaError: for held-out rows that are searched on too, adapters that do not fit the model, a skill in which its
            adapter gains nothing, and what :func:`intarsia.merge.search.search.search` refuses.
        KeyboardInterrupt: after Ctrl-C, saying how to go on.
    """
    progress = progress or Progress()
    check_installed()
    check_apart(task.rows, task.held_out)
    deck = Deck(live.model)
    deck.add(**task.plan.adapters)
    set_in = switch(task, deck)

    def use(name: str | None) -> None:
        deck.off() if name is None else deck.use(name)

    def measure(point: Point) -> dict[str, float]:
        set_in(point)
        return live.losses(task.rows)

    try:
        gains = {}
        for what, rows in (("search", task.rows), ("held out", task.held_out)):
            known = file.gains.get(what) if file is not None else None
            gains[what] = known or _gains(what, rows, live, use, progress)
            if known is None and file is not None:
                file.add_gains(what, gains[what])
        found = search(
            task.space, measure, gains["search"], task.objective,
            trials=trials, seed=task.seed, first=task.first, file=file, told=_Told(trials, progress),
        )  # fmt: skip
        after = {}
        for point in (found.start.point, found.best.point):
            key = tuple(point.values())
            if key not in after:
                set_in(point)
                after[key] = live.losses(task.held_out)
    finally:
        deck.off()
    given, best = (after[tuple(t.point.values())] for t in (found.start, found.best))
    return Outcome(
        found,
        Compared(gains["search"], found.start.losses, found.best.losses, _count(task.rows)),
        Compared(gains["held out"], given, best, _count(task.held_out)),
    )


class _Told:
    """After every trial: the best value so far, that of the start, and the time that is left."""

    def __init__(self, trials: int, progress: Progress) -> None:
        self.trials, self.progress = trials, progress
        self.begun = time.monotonic()
        self.first: int | None = None  # trials that an earlier run made

    def __call__(self, found: Search) -> None:
        done = len(found.trials)
        self.first = done - 1 if self.first is None else self.first
        left = (time.monotonic() - self.begun) / (done - self.first) * (self.trials - done)
        best, start = found.value(found.best), found.value(found.start)
        said = f"{found.objective.title} retained share {best:.1%}, as given {start:.1%}, {clock(left)} left, trial"
        self.progress.work(done, self.trials, said)


def _gains(what: str, rows: Rows, live: Live, use: Use, progress: Progress) -> Gains:
    progress.say(f"the base, and each adapter alone: {_counted(rows)}, {what}")
    try:
        return live.gains(rows, use, progress.work)
    except IntarsiaError as error:
        raise IntarsiaError(f"{what} rows: {error}") from error


def _count(rows: Rows) -> dict[str, int]:
    return {skill: len(examples) for skill, examples in rows.items()}


def _counted(rows: Rows) -> str:
    return ", ".join(f"{count} rows of {skill}" for skill, count in _count(rows).items())
