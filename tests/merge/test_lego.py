"""LoRA-LEGO against what its two reweightings and its clusters must give in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from intarsia.edits import Edit, LowRank, Sparse, columns, elements
from intarsia.errors import IntarsiaError
from intarsia.merge.clusters import clusters, means
from intarsia.merge.rule import build, taken
from intarsia.merge.rules.lego import centres
from merge.parts import change, low_rank, merged, some

SHAPE = (12, 16)


def test_as_many_clusters_as_units_give_the_sum():
    edits = [low_rank(0, SHAPE, 4, 0.5), low_rank(10, SHAPE, 2, 2.0), low_rank(20, SHAPE, 3, 1.0)]
    weights = [0.6, -1.0, 2.0]
    found = merged("lego", edits, weights, rank=9, output_scale=False).edit
    expected = sum(w * change(edit) for w, edit in zip(weights, edits, strict=True))
    torch.testing.assert_close(change(found), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_identical_adapters_give_their_own_change(count):
    edit = low_rank(0, SHAPE, 4, 0.7)
    found = merged("lego", [edit] * count).edit
    assert isinstance(found, LowRank)
    assert found.A.shape == (4, 16)
    torch.testing.assert_close(change(found), change(edit), rtol=1e-12, atol=1e-12)


def test_a_centre_has_the_mean_length_of_its_members():
    units = some(0, 20, 9)
    labels = clusters(units, 6, key=5)
    made = centres(units, labels, 6)
    lengths = torch.stack([units[labels == c].norm(dim=1).mean() for c in range(6)])
    torch.testing.assert_close(made.norm(dim=1), lengths, rtol=1e-12, atol=0)
    directions = torch.stack([units[labels == c].mean(0) for c in range(6)])
    torch.testing.assert_close(made / lengths[:, None], directions / directions.norm(dim=1, keepdim=True))


def test_the_whole_against_the_formula_for_two_clusters():
    """Two bundles of units that no start can confuse: their means at their mean lengths, times sqrt(r / k)."""
    a = torch.tensor([[8.0, 0, 1], [8.0, 1, 0], [0, -8, 1], [0, -8, -1]], dtype=torch.float64)
    b = torch.tensor([[4.0, 1], [4.0, -1], [-1.0, 4], [1.0, 4]], dtype=torch.float64)
    edits = [LowRank((2, 3), b[i : i + 1].mT, a[i : i + 1], 1.0) for i in range(4)]
    found = merged("lego", edits, rank=2).edit
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for pair in ((0, 1), (2, 3)):
        units = [torch.cat([a[i], b[i]]) for i in pair]
        mean = (units[0] + units[1]) / 2
        mean = mean * (units[0].norm() + units[1].norm()) / 2 / mean.norm()
        expected += torch.outer(mean[3:], mean[:3])
    torch.testing.assert_close(change(found), math.sqrt(1 / 2) * expected, rtol=1e-12, atol=1e-12)


def test_permuting_the_ranks_changes_nothing():
    edits = [low_rank(0, SHAPE, 5), low_rank(10, SHAPE, 4)]
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = LowRank(SHAPE, edits[0].B[:, order], edits[0].A[order], edits[0].scale)
    found = [change(merged("lego", pair, rank=3).edit) for pair in (edits, [shuffled, edits[1]], edits[::-1])]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-12, atol=1e-12)


def test_adapters_of_different_ranks():
    edits = [low_rank(seed, SHAPE, rank) for seed, rank in ((0, 4), (10, 8), (30, 2))]
    found = merged("lego", edits, rank=5).edit
    assert isinstance(found, LowRank)
    assert (tuple(found.A.shape), tuple(found.B.shape)) == ((5, 16), (12, 5))
    assert found.scale == math.sqrt(14 / 3 / 5)
    usual = merged("lego", edits).edit
    assert isinstance(usual, LowRank)
    assert usual.A.shape[0] == 5, "the rounded mean of 4, 8 and 2"


def test_opposite_units_leave_nothing():
    edit = low_rank(0, (5, 4), 1)
    units = torch.cat([edit.A, edit.B.mT], dim=1)
    made = centres(torch.cat([units, -units]), torch.zeros(2, dtype=torch.int64), 1)
    assert made.equal(torch.zeros_like(made))


def test_balancing_makes_other_spellings_of_a_rank_alike():
    edit = low_rank(0, SHAPE, 3)
    factors = torch.tensor([4.0, 0.25, 10.0], dtype=torch.float64)
    respelt = LowRank(SHAPE, edit.B / factors, factors[:, None] * edit.A, edit.scale)
    found = merged("lego", [edit, respelt], rank=3, balance=True).edit
    torch.testing.assert_close(change(found), change(edit), rtol=1e-12, atol=1e-12)
    unbalanced = merged("lego", [edit, respelt], rank=3).edit
    assert (change(unbalanced) - change(edit)).norm() > 0.1 * change(edit).norm()


def test_clusters_find_bundles_whatever_the_order():
    centre = 10 * some(0, 4, 6)
    points = torch.cat([centre[i] + 0.1 * some(i + 1, 5, 6) for i in range(4)])
    truth = torch.arange(4).repeat_interleave(5)
    for seed in range(5):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
        labels = clusters(points[order], 4, key=1)
        assert len({(int(a), int(b)) for a, b in zip(labels, truth[order], strict=True)}) == 4
    torch.testing.assert_close(means(points, truth, 4)[2], points[10:15].mean(0), rtol=1e-14, atol=0)


def test_no_cluster_is_empty():
    points = some(0, 3, 4).repeat(4, 1)  # 3 distinct points, 12 in all
    for k in (3, 5, 11, 12):
        assert clusters(points, k, key=2).unique().tolist() == list(range(k))


def test_only_low_ranks_are_taken():
    rule = build("lego", {})
    edit = elements(SHAPE, torch.tensor([3]), torch.ones(1))
    with pytest.raises(
        IntarsiaError, match="pirate: up.weight: lego takes edits that are low rank, and this one .elements. is sparse"
    ):
        taken(rule, "pirate", "up.weight", edit, None)
    unit = columns(SHAPE, torch.tensor([3, 7]), some(0, 12, 2))
    assert isinstance(taken(rule, "pirate", "up.weight", unit, None), Sparse), "columns are a low rank"
    torch.testing.assert_close(change(merged("lego", [unit]).edit), change(unit), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ what it is for
Task = tuple[torch.Tensor, torch.Tensor]


def _task(seed: int, k: int) -> Task:
    """A change of rank 3 that looks at inputs 8 k to 8 k + 7 of 24, and inputs there. -> (12, 24), (256, 24)."""
    wanted, x = torch.zeros(12, 24, dtype=torch.float64), torch.zeros(256, 24, dtype=torch.float64)
    wanted[:, 8 * k : 8 * k + 8] = some(seed, 12, 3) @ some(seed + 1, 3, 8) / 3
    x[:, 8 * k : 8 * k + 8] = some(seed + 2, 256, 8)
    return wanted, x


def _trained(task: Task, seed: int, rank: int) -> LowRank:
    wanted, x = task
    A = (some(seed, rank, 24) / 24**0.5).requires_grad_()
    B = torch.zeros(12, rank, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([A, B], lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        (x @ (B @ A - wanted).mT).square().mean().backward()
        optimizer.step()
    return LowRank((12, 24), B.detach(), A.detach(), 1.0)


def _error(edit: Edit, tasks: Sequence[Task]) -> float:
    shares = [(x @ (change(edit) - wanted).mT).square().sum() / (x @ wanted.mT).square().sum() for wanted, x in tasks]
    return float(torch.stack(shares).mean())


@pytest.mark.parametrize("seed", [0, 100])
def test_it_keeps_more_of_three_tasks_than_averaged_factors(seed):
    tasks = [_task(seed + 10 * k, k) for k in range(3)]
    loras = [_trained(task, seed + k, 4) for k, task in enumerate(tasks)]
    assert all(_error(lora, [task]) < 0.01 for lora, task in zip(loras, tasks, strict=True))
    B, A = (torch.stack([lora.tensors()[key] for lora in loras]).mean(0) for key in ("B", "A"))
    assert _error(merged("lego", loras).edit, tasks) < 0.8 * _error(LowRank((12, 24), B, A, 1.0), tasks)


def test_it_prunes_one_better_than_leaving_out_half_of_its_ranks():
    task = _task(0, 0)
    lora = _trained(task, 5, 16)
    halves = [torch.randperm(16, generator=torch.Generator().manual_seed(s))[:8] for s in range(20)]
    dropped = [_error(LowRank((12, 24), lora.B[:, half], lora.A[half], 1.0), [task]) for half in halves]
    assert _error(merged("lego", [lora], rank=8).edit, [task]) < 0.5 * sum(dropped) / len(dropped)
