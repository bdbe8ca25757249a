"""Metrics-weighted averages against the oracles of their definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from intarsia.edits import Edit, LowRank, Rescaled, elements
from intarsia.errors import IntarsiaError
from intarsia.merge import merge
from intarsia.merge.rules.mwa import weights_of
from merge.parts import adapter, change, low_rank, merged, some, sparse

SHAPE = (6, 8)
WEIGHT = "layers.0.up.weight"


def _run(edits: Sequence[Edit], losses: Sequence[float], **parameters: Any) -> Edit:
    adapters = {
        f"step-{i}": adapter(f"step-{i}", {WEIGHT: e}, loss=loss)
        for i, (e, loss) in enumerate(zip(edits, losses, strict=True))
    }
    return merge(adapters, rule="mwa", parameters=parameters).edits[WEIGHT]


def test_no_penalty_is_the_uniform_average_to_the_bit():
    assert weights_of([1.0, 2.0, 5.0], "loss", 0.0) == [1 / 3, 1 / 3, 1 / 3]
    values = [some(i, 10) for i in range(3)]
    index = torch.arange(10)
    found = _run([elements(SHAPE, index, v) for v in values], [1.0, 2.0, 5.0], penalty=0)
    third = 1 / 3
    expected = torch.zeros(10, dtype=torch.float64) + third * values[0] + third * values[1] + third * values[2]
    assert change(found).view(-1)[:10].equal(expected)


def test_a_large_penalty_picks_the_best():
    first, second = weights_of([1.0, 2.0], "loss", 60)
    assert first == 1.0
    assert 0 < second < 1e-17
    assert weights_of([100.0, 200.0], "step", 60)[0] < 1e-17


def test_weights_by_hand():
    assert weights_of([1.0, 2.0, 4.0], "loss", 1.0) == pytest.approx([4 / 7, 2 / 7, 1 / 7], rel=1e-15)
    assert weights_of([1.0, 2.0], "loss", 2.0) == pytest.approx([0.8, 0.2], rel=1e-15)
    assert weights_of([100.0, 300.0], "step", 1.0) == pytest.approx([0.25, 0.75], rel=1e-15)


@pytest.mark.parametrize("metric", ["loss", "step"])
def test_a_common_factor_does_not_matter_and_they_sum_to_1(metric):
    metrics = [0.7, 1.3, 2.9, 1.1]
    found = weights_of(metrics, metric, 3.0)
    assert sum(found) == pytest.approx(1, abs=1e-15)
    assert weights_of([8 * one for one in metrics], metric, 3.0) == found
    assert weights_of([1e200 * one for one in metrics], metric, 300.0) == pytest.approx(
        weights_of(metrics, metric, 300.0)
    )


@pytest.mark.parametrize("mode", ["delta", "factors"])
def test_one_checkpoint_or_identical_ones_come_back_unchanged(mode):
    edit = low_rank(0, SHAPE, 2, 0.7)
    alone = _run([edit], [1.5], mode=mode)
    assert isinstance(alone, LowRank)
    for found in (alone, merged("mwa", [edit] * 3, [0.2, 0.3, 0.5], mode=mode).edit):
        assert isinstance(found, LowRank)
        assert (found.A.equal(edit.A), found.B.equal(edit.B), found.scale) == (True, True, edit.scale)


@pytest.mark.parametrize("mode", ["delta", "factors"])
def test_sparse_checkpoints_are_averaged_exactly(mode):
    index = torch.tensor([1, 7, 9, 40])
    edits = [elements(SHAPE, index, some(i, 4)) for i in range(3)]
    weights = weights_of([1.0, 2.0, 3.0], "loss", 1.0)
    found = _run(edits, [1.0, 2.0, 3.0], mode=mode)
    expected = sum(w * change(edit) for w, edit in zip(weights, edits, strict=True))
    torch.testing.assert_close(change(found), expected, rtol=1e-15, atol=1e-16)
    assert found.touched == 4


def test_delta_is_exact_and_factors_differ_by_the_covariance():
    edits = [low_rank(10 * i, SHAPE, 2, 0.5) for i in range(3)]
    losses = [1.0, 2.0, 4.0]
    weights = weights_of(losses, "loss", 1.5)
    average = sum(w * change(edit) for w, edit in zip(weights, edits, strict=True))
    exact = _run(edits, losses, penalty=1.5)
    torch.testing.assert_close(change(exact), average, rtol=1e-12, atol=1e-13)
    assert isinstance(exact, LowRank)
    assert exact.A.shape[0] == 6
    kept = _run(edits, losses, penalty=1.5, mode="factors")
    assert isinstance(kept, LowRank)
    assert (kept.A.shape[0], kept.scale) == (2, 0.5)
    B, A = (sum(w * getattr(e, k) for w, e in zip(weights, edits, strict=True)) for k in ("B", "A"))
    covariance = sum(w * (e.B - B) @ (e.A - A) for w, e in zip(weights, edits, strict=True))
    torch.testing.assert_close(change(exact) - change(kept), 0.5 * covariance, rtol=1e-11, atol=1e-12)


def test_dora_is_averaged_by_tensors_or_kept_as_parts():
    edits: list[Edit] = [Rescaled(SHAPE, low_rank(i, SHAPE, 1), some(i + 5, 6).abs() + 1) for i in (0, 20)]
    W = some(99, *SHAPE)
    exact = _run(edits, [1.0, 1.0])
    torch.testing.assert_close(exact.delta(W), (edits[0].delta(W) + edits[1].delta(W)) / 2, rtol=1e-12, atol=1e-13)
    kept = _run(edits, [1.0, 1.0], mode="factors")
    assert isinstance(kept, Rescaled)
    first, second = (edit.tensors()["magnitude"] for edit in edits)
    torch.testing.assert_close(kept.magnitude, (first + second) / 2)


def test_metrics_come_from_the_note_or_are_given():
    index = torch.tensor([0])
    ones = [elements(SHAPE, index, torch.tensor([float(v)], dtype=torch.float64)) for v in (1, 3)]
    trained = {
        "first": adapter("first", {WEIGHT: ones[0]}, note={"training loss": 2.0, "steps": 100}),
        "last": adapter("last", {WEIGHT: ones[1]}, loss=1.0, step=300),
    }
    by_loss = merge(trained, rule="mwa")
    assert change(by_loss.edits[WEIGHT])[0, 0] == pytest.approx((1 * 1 + 2 * 3) / 3)
    assert [facts["weight"] for facts in by_loss.about["merged"].values()] == pytest.approx([1 / 3, 2 / 3])
    by_step = merge(trained, rule="mwa", parameters={"metric": "step"})
    assert change(by_step.edits[WEIGHT])[0, 0] == pytest.approx((1 + 3 * 3) / 4)
    given = merge(trained, rule="mwa", own={"first": {"loss": 0.5}})
    assert change(given.edits[WEIGHT])[0, 0] == pytest.approx((2 * 1 + 1 * 3) / 3)


def test_a_checkpoint_that_leaves_a_weight_alone_counts_as_no_change():
    edit = sparse(some(0, *SHAPE), torch.tensor([3, 4]))
    both = {"a": adapter("a", {WEIGHT: edit}, loss=1.0), "b": adapter("b", {"other.weight": edit}, loss=1.0)}
    found = merge(both, rule="mwa", parameters={"mode": "factors"})
    torch.testing.assert_close(change(found.edits[WEIGHT]), 0.5 * change(edit))


@pytest.mark.parametrize(
    ("note", "parameters", "said"),
    [
        ({}, {}, "step-0: mwa weighs checkpoints by their loss, and the note of this one says nothing of it; give it"),
        ({"loss": -1.0}, {}, "the note of this one says -1.0, which is no positive number"),
        ({"loss": float("nan")}, {}, "says nan, which is no positive number"),
        ({"loss": 1.0}, {"metric": "step"}, "by their step, and the note of this one says nothing"),
        ({"loss": 1.0}, {"penalty": -1}, "penalty=-1.0 must be 0 or more"),
        ({"loss": 1.0}, {"mode": "fators"}, "mode='fators' must be delta or factors"),
        ({"loss": 1.0}, {"weight": 0.5}, "mwa finds the weights of the adapters itself; leave weight out"),
    ],
)
def test_refusals(note, parameters, said):
    with pytest.raises(IntarsiaError, match=said):
        merge({"step-0": adapter("step-0", {WEIGHT: low_rank(0, SHAPE, 2)}, **note)}, rule="mwa", parameters=parameters)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (low_rank(5, SHAPE, 3), r"B is \(6, 2\) and \(6, 3\)"),
        (low_rank(5, SHAPE, 2, 9.0), "these are low_rank"),
        (elements(SHAPE, torch.tensor([1]), torch.ones(1)), "these are low_rank"),
    ],
)
def test_factors_of_different_shapes_cannot_be_averaged(other, said):
    with pytest.raises(IntarsiaError, match=f"{said}.*Take mode: delta"):
        _run([low_rank(0, SHAPE, 2), other], [1.0, 2.0], mode="factors")


def test_the_average_of_noisy_checkpoints_is_better_than_the_last():
    """Least squares by SGD on single rows: the merged weights have a lower held-out loss than the mean and the last one."""
    better = 0
    for seed in range(5):
        X, truth, held = some(seed, 400, 8), some(seed + 100, 1, 8), some(seed + 200, 400, 8)
        noise = 0.5 * some(seed + 300, 400)
        w, edits, losses = torch.zeros(1, 8, dtype=torch.float64), [], []
        for step in range(400):
            x, y = X[step], X[step] @ truth[0] + noise[step]
            w = w - 0.08 * (w @ x - y) * x
            if step >= 200 and step % 25 == 0:
                edits.append(elements((1, 8), torch.arange(8), w[0].clone()))
                losses.append(
                    float(((X[step - 25 : step] @ w[0]) - X[step - 25 : step] @ truth[0]).square().mean()) + 0.25
                )
        risk = [float((held @ (change(e)[0] - truth[0])).square().mean()) for e in [*edits, _run(edits, losses)]]
        better += risk[-1] < min(risk[-2], sum(risk[:-1]) / len(edits))
    assert better >= 4
