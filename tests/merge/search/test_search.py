"""The search on formulas: what it finds, that it is the same every time, and that it goes on as if nothing had happened."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import IntarsiaError
from intarsia.merge.search.objective import Gains, Objective
from intarsia.merge.search.search import pareto, search
from intarsia.merge.search.space import Dimension, Space, parameters_at, space_of
from intarsia.merge.search.trials import Trial, TrialFile

A, B = "weight of a", "weight of b"
BEST = {A: 0.9, B: 0.3}


def two(start: float = 0.5, high: float = 1.5) -> Space:
    return space_of({"a": {"weight": start}, "b": {"weight": start}}, {"weight": (0.0, high)})


GAINS = Gains({"a": 3.0, "b": 2.0}, {"a": 1.0, "b": 1.0})


def bowl(point):
    """Both skills are best at the same point: retained 1 each, and 2 d^2 less at distance d from it."""
    away = sum((point[name] - BEST[name]) ** 2 for name in BEST)
    return {"a": 1.0 + 4 * away, "b": 1.0 + 2 * away}


def rivals(point):
    """a wants all of a and none of b, b the other way round: every compromise costs something."""
    return {
        "a": 1.0 + (1 - point[A]) ** 2 + point[B] ** 2,
        "b": 1.0 + (1 - point[B]) ** 2 + point[A] ** 2,
    }


# ------------------------------------------------------------------ what it finds
@pytest.mark.parametrize("objective", [Objective("worst"), Objective("mean"), Objective("weighted", {"a": 2, "b": 1})])
def test_the_optimum_of_a_bowl_is_found(objective):
    found = search(two(), bowl, GAINS, objective, trials=80, seed=1)
    assert found.best.point[A] == pytest.approx(0.9, abs=0.02)
    assert found.best.point[B] == pytest.approx(0.3, abs=0.02)
    assert found.value(found.best) == pytest.approx(1.0, abs=0.002)
    assert len(found.trials) == 80


def test_the_worst_skill_is_what_counts_and_the_mean_is_another_objective():
    def lopsided(point):  # a gains 2 a unit of weight, b loses 0.2: the mean wants a alone, the worst both even
        return {"a": 3.0 - 2 * point[A] + 0.2 * point[B], "b": 2.0 - 0.5 * point[B] + 0.2 * point[A]}

    mean = search(two(), lopsided, GAINS, Objective("mean"), trials=60)
    worst = search(two(), lopsided, GAINS, Objective("worst"), trials=60)
    assert mean.value(mean.best) > sum(mean.retained(worst.best).values()) / 2
    assert worst.value(worst.best) > min(worst.retained(mean.best).values())
    by_hand = [min((3 - t.losses["a"]) / 2, (2 - t.losses["b"]) / 1) for t in worst.trials]
    assert by_hand == pytest.approx([worst.value(t) for t in worst.trials])
    assert worst.best == worst.trials[by_hand.index(max(by_hand))]


def test_trial_0_is_the_start_and_the_best_is_never_worse():
    found = search(two(start=0.9), lambda p: {"a": 1 + abs(p[A] - 0.9), "b": 1 + abs(p[B] - 0.9)}, GAINS, trials=25)
    assert found.start.point == {A: 0.9, B: 0.9}
    assert found.best is found.start, "nothing is better than the optimum, and the first of equals is taken"
    flat = search(two(), lambda p: {"a": 2.0, "b": 1.5}, GAINS, trials=9)
    assert flat.best is flat.start, "of equals the first: nothing is changed without a reason"
    assert found.history == sorted(found.history)
    assert found.history[-1] == found.value(found.best)


def test_the_sampler_begins_at_the_best_of_the_points_that_were_given():
    far = [{A: 0.9, B: 0.3}]
    near = search(two(start=1.4), bowl, GAINS, trials=40, first=far)
    away = [sum((t.point[n] - BEST[n]) ** 2 for n in BEST) ** 0.5 for t in near.trials[2:9]]
    plain = search(two(start=1.4), bowl, GAINS, trials=40)
    away_plain = [sum((t.point[n] - BEST[n]) ** 2 for n in BEST) ** 0.5 for t in plain.trials[2:9]]
    assert sum(away) < sum(away_plain)


def test_points_to_try_first_come_right_after_the_start():
    first = [{A: 1.0, B: 1.0}, {A: 0.3333, B: 0.3333}]
    found = search(two(), bowl, GAINS, trials=5, first=first)
    assert [dict(t.point) for t in found.trials[:3]] == [{A: 0.5, B: 0.5}, *first]
    with pytest.raises(IntarsiaError, match="weight of a: outside of what is searched"):
        search(two(), bowl, GAINS, first=[{A: 1.6, B: 1.0}])


def test_every_point_is_inside_and_of_four_digits():
    space = Space((Dimension("a", "weight", 0.0, 1.5, 0.4), Dimension("a", "density", 0.1, 1.0, 1.0)))
    found = search(
        space, lambda p: {"a": 1 + p["weight of a"] - p["density of a"]}, Gains({"a": 3.0}, {"a": 1.0}), trials=60
    )
    assert all(d.low <= t.point[d.name] <= d.high for t in found.trials for d in space)
    assert all(value == round(value, 4) for t in found.trials for value in t.point.values())
    assert found.best.point == pytest.approx({"weight of a": 0.0, "density of a": 1.0}, abs=0.06), "the corner"
    assert found.start.point == {"weight of a": 0.4, "density of a": 1.0}, "a start at an edge is trial 0 all the same"


# ------------------------------------------------------------------ the same every time
def test_the_same_seed_gives_the_same_trials_and_another_one_others():
    one, again, other = (search(two(), bowl, GAINS, trials=30, seed=seed) for seed in (3, 3, 4))
    assert [t.point for t in one.trials] == [t.point for t in again.trials]
    assert [t.point for t in one.trials[1:]] != [t.point for t in other.trials[1:]]


@pytest.mark.parametrize("stops", [[1], [2], [8], [9, 17], list(range(1, 30, 3))])
def test_an_interrupted_search_makes_exactly_the_trials_of_an_uninterrupted_one(tmp_path, stops):
    whole = search(two(), rivals, GAINS, trials=30, seed=5)
    for stop in [*stops, 30]:
        file = TrialFile.read(tmp_path / "trials.jsonl")
        with file.held({"seed": 5}):
            search(two(), rivals, GAINS, trials=stop, seed=5, file=file)
    kept = TrialFile.read(tmp_path / "trials.jsonl").trials
    assert [(t.point, t.losses) for t in kept] == [(t.point, t.losses) for t in whole.trials]


def test_what_was_measured_is_not_measured_again(tmp_path):
    asked = []

    def counted(point):
        asked.append(point)
        return bowl(point)

    for trials in (10, 10, 14):
        file = TrialFile.read(tmp_path / "trials.jsonl")
        with file.held({}):
            search(two(), counted, GAINS, trials=trials, file=file)
    assert len(asked) == 14


def test_ctrl_c_keeps_what_was_done(tmp_path):
    path = tmp_path / "out" / "trials.jsonl"

    def interrupted(point):
        if len(TrialFile.read(path).trials) == 12:
            raise KeyboardInterrupt
        return rivals(point)

    file = TrialFile.read(path)
    with (
        file.held({"seed": 0}),
        pytest.raises(KeyboardInterrupt, match="interrupted after 12 of 30 trials, which are kept"),
    ):
        search(two(), interrupted, GAINS, trials=30, file=file)
    file = TrialFile.read(path)
    with file.held({"seed": 0}):
        gone_on = search(two(), rivals, GAINS, trials=30, file=file)
    assert [t.point for t in gone_on.trials] == [t.point for t in search(two(), rivals, GAINS, trials=30).trials]


def test_a_trial_without_a_finite_loss_is_kept_and_never_the_best(tmp_path):
    def broken(point):
        return bowl(point) if point[A] < 0.8 else {"a": math.nan, "b": 0.5}

    file = TrialFile.read(tmp_path / "trials.jsonl")
    with file.held({}):
        found = search(two(), broken, GAINS, trials=30, file=file)
    lost = [t for t in found.trials if not t.finite]
    assert lost
    assert found.best.point[A] < 0.8
    assert all(t.finite for t in found.front)
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert sum(line.get("loss", {}).get("a", 0) is None for line in lines) == len(lost)
    file = TrialFile.read(tmp_path / "trials.jsonl")
    with file.held({}):
        more = search(two(), broken, GAINS, trials=40, file=file)
    assert [t.point for t in more.trials] == [t.point for t in search(two(), broken, GAINS, trials=40).trials]


# ------------------------------------------------------------------ the front
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=12))
def test_the_front_is_what_the_definition_says(rows):
    trials = [Trial(i, {}, dict(zip("abc", map(float, row), strict=True)), 0.0) for i, row in enumerate(rows)]
    front = pareto(trials, "abc")

    def dominates(one, other):
        return all(x <= y for x, y in zip(one, other, strict=True)) and one != other

    left = [i for i, row in enumerate(rows) if not any(dominates(other, row) for other in rows)]
    first = [i for i in left if rows.index(rows[i]) == i]
    assert [t.number for t in front] == first


def test_the_front_holds_the_best_of_every_objective():
    found = search(two(), rivals, GAINS, trials=40)
    best = max(found.value(t) for t in found.front)
    assert best == found.value(found.best)
    for skill in ("a", "b"):
        least = min(t.losses[skill] for t in found.trials)
        assert least in [t.losses[skill] for t in found.front]


# ------------------------------------------------------------------ the space
@given(st.floats(0, 2), st.floats(0.05, 3), st.floats(0, 1), st.floats(0, 1))
def test_a_dimension_and_its_inverse(low, width, where, at):
    start = min(low + where * width, low + width)
    dimension = Dimension("a", "weight", low, low + width, start)
    value = min(low + at * width, low + width)
    assert dimension.value(dimension.place(value, start), start) == pytest.approx(value, abs=6e-5)
    assert (dimension.value(-1, start), dimension.value(1, start)) == pytest.approx((low, low + width), abs=6e-5)
    if low < start < low + width:
        assert dimension.value(0, start) == pytest.approx(start, abs=6e-5)


def test_a_gradient_over_the_layers_is_found_point_by_point():
    start = {"a": {"weight": 0.5, "density": 0.2}, "b": {"weight": 1.0}}
    ranges = {"weight": (0.0, 1.0), "density": (0.1, 1.0)}
    plain, gradients = space_of(start, ranges), space_of(start, ranges, points=2)
    assert list(plain.start) == ["weight of a", "density of a", "weight of b"]
    assert list(gradients.start) == [f"{of}, point {i}" for of in plain.start for i in (0, 1)]
    numbers = dict(zip(gradients.start, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True))
    assert parameters_at(gradients, numbers) == {
        "a": {"weight": [0.1, 0.2], "density": [0.3, 0.4]}, "b": {"weight": [0.5, 0.6]},
    }  # fmt: skip
    assert parameters_at(plain, plain.start) == start
    with pytest.raises(IntarsiaError, match="points=0; expected the number of points"):
        space_of(start, ranges, points=0)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Dimension("a", "weight", 1.0, 1.0, 1.0), "expected low < high"),
        (lambda: Dimension("a", "weight", 0.0, math.inf, 1.0), "finite"),
        (lambda: Dimension("a", "weight", 0.0, 1.0, 1.2), "weight of a starts at 1.2, and is searched from 0 to 1"),
        (lambda: Space(()), "nothing to search"),
        (lambda: Space((Dimension("a", "weight", 0, 1, 0.5),) * 2), "weight of a is in the space twice"),
        (lambda: Objective("wrst"), "unknown objective 'wrst'; did you mean 'worst'"),
        (lambda: Objective("weighted"), "needs them"),
        (lambda: Objective("worst", {"a": 1}), "belong to the objective 'weighted'"),
        (lambda: Objective("weighted", {"a": -1}), "a positive number"),
        (lambda: Gains({"a": math.nan}, {"a": 1.0}), "a: loss nan of the base"),
        (lambda: Gains({"a": 1.0}, {"a": 1.0}), "it gains nothing"),
        (lambda: search(two(), bowl, GAINS, trials=0), "trials=0"),
        (lambda: search(two(), bowl, GAINS, Objective("weighted", {"a": 1})), "importances of a; the skills are a, b"),
        (lambda: search(two(), lambda p: {"a": 1.0}, GAINS), "measured a; the skills are a, b"),
        (lambda: search(two(), lambda p: {"a": 1.0, "b": math.nan}, GAINS), "the loss on b is not finite"),
    ],
)
def test_mistakes(made, said):
    with pytest.raises(IntarsiaError, match=said):
        made()


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cmaes", None)
    with pytest.raises(
        IntarsiaError, match=r'the package cmaes, which is not installed: pip install "intarsia\[search\]"'
    ):
        search(two(), bowl, GAINS, trials=1)


def test_the_samplers_words_stay_its_own_and_its_verbosity_the_users(capfd):
    import optuna

    before = optuna.logging.get_verbosity()
    search(two(), bowl, GAINS, trials=12)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == before
