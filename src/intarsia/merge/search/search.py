"""The search for the weights of a merge: CMA-ES, asked for a point and told how good it was, trial by trial.

It does not know how a point is measured: ``measure(point) -> {skill: loss}`` may set a live deck, make an adapter, or
compute a formula. The sampler is optuna's ``CmaEsSampler`` (Hansen, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772).

The same seed, space and losses give the same trials. A search goes on by telling a fresh sampler all that was measured
before: it then stands exactly where an uninterrupted one would, and no state of it has to be kept in a file.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intarsia.errors import IntarsiaError
from intarsia.merge.search.objective import Gains, Losses, Objective
from intarsia.merge.search.space import Point, Space
from intarsia.merge.search.trials import Trial, TrialFile

Measure = Callable[[Point], Losses]
Told = Callable[["Search"], None]


@dataclass(frozen=True)
class Search:
    """What was tried, in order, and what follows from it."""

    space: Space
    objective: Objective
    gains: Gains
    trials: tuple[Trial, ...]

    def retained(self, trial: Trial) -> dict[str, float]:
        """Skill -> retained share of its gain; -inf where the loss was not finite."""
        return self.gains.retained(trial.losses)

    def value(self, trial: Trial) -> float:
        """The objective of a trial; -inf where a loss was not finite."""
        return self.objective(self.retained(trial)) if trial.finite else -math.inf

    @property
    def start(self) -> Trial:
        """Trial 0, where the search began."""
        return self.trials[0]

    @property
    def best(self) -> Trial:
        """The trial with the largest objective, the first of equals: never worse than the start."""
        return max(self.trials, key=self.value)

    @property
    def history(self) -> list[float]:
        """The largest objective up to each trial."""
        found: list[float] = []
        for trial in self.trials:
            found.append(max([self.value(trial), *found[-1:]]))
        return found

    @property
    def front(self) -> tuple[Trial, ...]:
        """The Pareto front: trials that no other one surpasses in one skill without losing in another."""
        return pareto(self.trials, list(self.gains.base))

    @property
    def seconds(self) -> float:
        """How long all trials took."""
        return sum(trial.seconds for trial in self.trials)


def pareto(trials: Sequence[Trial], skills: Sequence[str]) -> tuple[Trial, ...]:
    """The trials, in their order, that none dominates: no loss higher, and one lower. Of equal ones the first is kept."""
    finite = [trial for trial in trials if trial.finite]
    losses = [tuple(trial.losses[skill] for skill in skills) for trial in finite]

    def beaten(i: int) -> bool:
        mine = losses[i]
        return any(
            all(a <= b for a, b in zip(other, mine, strict=True)) and (other != mine or j < i)
            for j, other in enumerate(losses)
            if j != i
        )

    return tuple(trial for i, trial in enumerate(finite) if not beaten(i))


def search(
    space: Space,
    measure: Measure,
    gains: Gains,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    *,
    trials: int = 60,
    seed: int = 0,
    first: Sequence[Point] = (),
    file: TrialFile | None = None,
    told: Told | None = None,
) -> Search:
    """Measure ``trials`` points: the start, those in ``first``, then what CMA-ES proposes, which begins at the best of these.

    Args:
        trials: of all together, those in ``file`` included; a search that is finished goes on when this grows.
        first: points to try right after the start; all of them are inside the space.
        file: trials that were made before, and where new ones are kept; held by the caller (:meth:`TrialFile.held`).
        told: hears of every new trial.

    Raises:
        IntarsiaError: without the extra ``intarsia[search]``; for fewer than one trial, a point outside of the space,
            losses of other skills than those of ``gains``, a loss at the start that is not finite, or a file whose trials are
            not those that this sampler makes.
        KeyboardInterrupt: after Ctrl-C, saying how many trials are kept.
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise IntarsiaError(f"trials={trials!r}; expected a number of trials, 1 or more")
    check_installed()
    objective.check(gains.base)
    points = _Points(space, seed, [space.start, *(space.checked(point) for point in first)])
    done = list(file.trials) if file is not None else []
    for trial in done[:trials]:
        if (point := points.next()) != dict(trial.point):
            raise IntarsiaError(_not_ours(file, trial, point))
        points.tell(_value(objective, gains, trial))
    try:
        while len(done) < trials:
            point = points.next()
            before = time.perf_counter()
            losses = _checked(measure(point), gains)
            trial = Trial(len(done), point, losses, time.perf_counter() - before)
            if not done and not trial.finite:
                lost = ", ".join(skill for skill, loss in losses.items() if not math.isfinite(loss))
                raise IntarsiaError(f"where the search starts ({_said(point)}), the loss on {lost} is not finite")
            if file is not None:
                file.add(trial)
            done.append(trial)
            points.tell(_value(objective, gains, trial))
            if told is not None:
                told(Search(space, objective, gains, tuple(done)))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(len(done), trials, file)) from None
    return Search(space, objective, gains, tuple(done[:trials]))


class _Points:
    """The points in their order: those that were given, then the sampler's around the best of them."""

    def __init__(self, space: Space, seed: int, given: Sequence[Point]) -> None:
        self.space, self.seed, self.given = space, seed, given
        self.values: list[float] = []  # of the given ones
        self.sampler: Sampler | None = None

    def next(self) -> dict[str, float]:
        if len(self.values) < len(self.given):
            return dict(self.given[len(self.values)])
        if self.sampler is None:
            best = self.values.index(max(self.values))
            self.sampler = Sampler(self.space, self.seed, self.given[best], self.values[best])
        return self.sampler.ask()

    def tell(self, value: float) -> None:
        if self.sampler is None:
            self.values.append(value)
        else:
            self.sampler.tell(value)


class Sampler:
    """optuna's CMA-ES over [-1, 1] in every dimension, ``middle`` at 0: ask for a point, tell how good it was.

    ``value``: how good the middle is, which was measured before.
    """

    def __init__(self, space: Space, seed: int, middle: Point, value: float) -> None:
        self.space, self.middle = space, middle
        optuna = _optuna()
        with _quiet(optuna):
            sampler = optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
            self._study = optuna.create_study(direction="maximize", sampler=sampler)
            self._study.enqueue_trial(space.places(middle, middle))
        self._fail = optuna.trial.TrialState.FAIL
        self._range = {dimension.name: optuna.distributions.FloatDistribution(-1.0, 1.0) for dimension in space}
        self._asked: Any = None
        self.ask()
        self.tell(value)

    def ask(self) -> dict[str, float]:
        """The next point."""
        with _quiet(_optuna()):
            self._asked = self._study.ask(self._range)
        return self.space.values(self._asked.params, self.middle)

    def tell(self, value: float) -> None:
        """The objective of the point that was asked for last. One that is not finite is left out of what CMA-ES learns from."""
        with _quiet(_optuna()):
            if math.isfinite(value):
                self._study.tell(self._asked, value)
            else:
                self._study.tell(self._asked, state=self._fail)


def _value(objective: Objective, gains: Gains, trial: Trial) -> float:
    return objective(gains.retained(trial.losses)) if trial.finite else -math.inf


def _checked(losses: Losses, gains: Gains) -> dict[str, float]:
    if set(losses) != set(gains.base):
        raise IntarsiaError(f"measured {', '.join(losses)}; the skills are {', '.join(gains.base)}")
    # Of all numbers that are none, one: the file can hold no others.
    return {skill: loss if math.isfinite(loss := float(losses[skill])) else math.inf for skill in gains.base}


def _not_ours(file: TrialFile | None, trial: Trial, point: Mapping[str, float]) -> str:
    where = "" if file is None else f"{file.path}, "
    return (
        f"{where}trial {trial.number} is not the one that this sampler makes: {_said(trial.point)}; here {_said(point)}. "
        "Its trials may come from other versions of optuna and cmaes; install those, or begin anew with --restart"
    )


def _said(point: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in point.items())


def _interrupted(done: int, trials: int, file: TrialFile | None) -> str:
    if file is None:
        return f"interrupted after {done} of {trials} trials"
    return f"interrupted after {done} of {trials} trials, which are kept in {file.path}; the same command goes on from there"


def check_installed() -> None:
    """Raises IntarsiaError where the packages of the extra ``intarsia[search]`` are not there."""
    _optuna()


def _optuna() -> Any:
    try:
        import cmaes  # noqa: F401 - optuna asks for it when it is too late
        import optuna
    except ImportError as error:
        raise IntarsiaError(
            f'the search needs the package {error.name}, which is not installed: pip install "intarsia[search]"'
        ) from error
    return optuna


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without optuna's lines on every study and trial; its verbosity is the user's again afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
