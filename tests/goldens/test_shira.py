"""SHiRA against dense training with the gradient masked by hand, and its masks against brute force and closed forms."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import intarsia as ia
from intarsia.support import struct
from small import SITES, beside_the_base, layer_of, small_net, some_input, some_loss, state_of, trained, weights

STEPS = 50


def _batches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [some_input(dtype, 8, 16, seed=10 + i) for i in range(STEPS)]


def _mask_gradient(mask: torch.Tensor, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(mask)


def _dense(
    masks: dict[str, torch.Tensor], lr: float, eps: float, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The weights after ordinary AdamW(weight_decay=0) training whose gradients are masked by hand (hook mode)."""
    model = small_net(dtype)
    model.requires_grad_(False)
    for site in SITES:
        weight = layer_of(model, site).weight
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(functools.partial(_mask_gradient, masks[site]))
    optimizer = torch.optim.AdamW(trained(model), lr=lr, eps=eps, weight_decay=0.0)
    for x in _batches(dtype):
        optimizer.zero_grad()
        some_loss(model, x).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("scale", [1.0, 32.0, 3.0])
@pytest.mark.parametrize("scorer", ["random", "snip", "struct"])
def test_live_weights_equal_dense_training_with_a_masked_gradient(scale, scorer):
    """W' = W + s v: one Adam step of v by lr is one of W by s lr; v's gradient is s times W's, so Adam's eps counts s-fold less."""
    lr, eps = 2e-3, 1e-8
    model, start = small_net(), weights(small_net())
    ia.attach(model, ia.Shira(density=0.1, scorer=scorer, scale=scale), data=[some_input()], loss=some_loss)
    masks = {}
    for site in SITES:
        index = state_of(model, site).index
        masks[site] = torch.zeros(start[site].numel()).index_fill(0, index, 1.0).view_as(start[site])
    optimizer = torch.optim.AdamW(trained(model), lr=lr / scale, eps=eps * scale, weight_decay=0.0)
    for x in _batches():
        optimizer.zero_grad()
        some_loss(model, x).backward()
        optimizer.step()
    dense = _dense(masks, lr, eps)
    for site, found in weights(model).items():
        moved = (dense[site] - start[site]).abs()
        assert moved.max() > 0.03  # 50 steps of 2e-3
        torch.testing.assert_close(found, dense[site], rtol=0, atol=1e-5)
        assert torch.equal(found[masks[site] == 0], start[site][masks[site] == 0])


def test_beside_the_base_the_trajectory_is_the_same():
    """Sparse-parameter mode (the branch) and live weights, step by step, in float64."""
    runs = []
    for branch in (False, True):
        model = small_net(torch.float64)
        ia.attach(model, ia.Shira(density=0.1))
        optimizer = torch.optim.AdamW(trained(model), lr=1e-3, weight_decay=0.0)
        for x in _batches(torch.float64):
            optimizer.zero_grad()
            if branch:
                with beside_the_base(model):
                    some_loss(model, x).backward()
            else:
                some_loss(model, x).backward()
            optimizer.step()
        runs.append([parameter.detach().clone() for parameter in trained(model)])
    for live, beside in zip(*runs, strict=True):
        assert live.abs().max() > 0.01
        torch.testing.assert_close(live, beside, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16), (2, 3, 2, 16)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradient_is_the_dense_gradient_at_the_support(shape, bias):
    model = small_net(torch.float64, bias)
    layer = layer_of(model, "up")
    ia.attach(model, ia.Shira(density=0.1, scale=4.0), targets="up")
    dense = layer.weight.detach().clone().requires_grad_()
    x, gy = some_input(torch.float64, *shape), some_input(torch.float64, *shape[:-1], 24, seed=3)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(mine).backward(gy)
    F.linear(theirs, dense, layer.bias).backward(gy)
    assert dense.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-13, atol=1e-13)
    state = state_of(model, "up")
    torch.testing.assert_close(state.values.grad, 4.0 * dense.grad.view(-1)[state.index], rtol=1e-13, atol=1e-13)


def test_a_second_derivative_is_refused_and_not_wrong():
    model = small_net()
    ia.attach(model, ia.Shira(density=0.1), targets="up")
    x = some_input().requires_grad_()
    (gradient,) = torch.autograd.grad(some_loss(model, x), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ------------------------------------------------------------------ masks
def _gradients(batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model = small_net()
    for x in batches:
        some_loss(model, x).backward()
    return {site: layer_of(model, site).weight.grad for site in SITES}


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("scorer", ["magnitude", "gradient", "snip"])
def test_masks_are_the_top_entries(scorer, density):
    batches = [some_input(seed=1), some_input(seed=2)]
    model, base, gradients = small_net(), weights(small_net()), _gradients(batches)
    ia.attach(model, ia.Shira(density=density, scorer=scorer), data=batches, loss=some_loss)
    for site in SITES:
        scores = {
            "magnitude": base[site].abs(),
            "gradient": gradients[site].abs(),
            "snip": (base[site] * gradients[site]).abs(),
        }[scorer].flatten()
        index = state_of(model, site).index
        assert len(index) == round(density * 384)
        order = sorted(range(384), key=lambda i: (-float(scores[i]), i))
        assert index.tolist() == sorted(order[: len(index)])


def test_equal_scores_go_to_the_lower_index():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10))
    with torch.no_grad():
        layer_of(model, "0").weight.fill_(0.5).view(-1)[[97, 41]] = torch.tensor([-2.0, 1.0])
    ia.attach(model, ia.Shira(density=0.05, scorer="magnitude"))
    assert state_of(model, "0").index.tolist() == [0, 1, 2, 41, 97]


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (7, 7), (1, 9), (9, 1)], ids=str)
def test_struct_is_the_diagonal_and_evenly_spaced_rows(shape):
    O, I = shape
    for count in range(1, O * I + 1):
        index = struct(shape, count)
        assert index.unique().tolist() == index.tolist()  # sorted and distinct
        assert len(index) == count
        assert 0 <= int(index[0]) <= int(index[-1]) < O * I
        mask = torch.zeros(O, I, dtype=torch.bool)
        mask.view(-1)[index] = True
        diagonal = min(O, I, count)
        assert all(mask[i, i] for i in range(diagonal))
        beyond = mask & ~torch.eye(O, I, dtype=torch.bool)
        in_part = beyond.any(dim=1) & ~mask.all(dim=1)
        assert int(in_part.sum()) <= 1  # whole rows but for the last one
        if count > diagonal and I > 1:
            assert mask[0, 0]
            assert beyond[0].any()  # the first row chosen is the offset


def test_struct_in_closed_form():
    # 24 x 16, 60 entries: 16 on the diagonal; 44 more need three rows of 16 (15 where the diagonal crosses), the last of
    # them in part; room is kept for four, so they are 6 apart.
    expected = {17 * i for i in range(16)} | set(range(16)) | set(range(96, 112))
    expected |= set(sorted(set(range(192, 208)) - {204})[:14])
    assert len(expected) == 60
    assert set(struct((24, 16), 60).tolist()) == expected


def test_struct_rows_move_with_the_offset_and_do_not_overlap():
    one, two = (set(struct((64, 64), 64 + 4 * 63, offset).tolist()) for offset in (0, 3))
    diagonal = {i * 65 for i in range(64)}
    assert one & two == diagonal
    rows = sorted({i // 64 for i in one - diagonal})
    assert len(rows) == 4
    assert len({b - a for a, b in itertools.pairwise(rows)}) == 1  # evenly spaced


def test_disjoint_struct_adapters_hardly_meet():
    """The lemma of the card: m = 64, 4 rows each: nnz(A1^T A2) <= m + (|R1| + |R2|) (m - 1) = 568."""
    A = []
    for number, offset in enumerate((0, 3)):
        index = struct((64, 64), 64 + 4 * 63, offset)
        values = torch.randn(len(index), generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        A.append(torch.zeros(64 * 64, dtype=torch.float64).index_copy(0, index, values).view(64, 64))
    assert int((A[0].T @ A[1] != 0).sum()) <= 568
    low_rank = torch.randn(64, 2, dtype=torch.float64) @ torch.randn(2, 64, dtype=torch.float64)
    assert int((A[0].T @ low_rank != 0).sum()) == 64 * 64  # nothing dense is orthogonal to anything


@pytest.mark.parametrize(("density", "rank"), [(0.01, 565), (0.02, 576)])
def test_random_masks_are_of_nearly_full_rank(density, rank):
    """576 x 576: 1 % of the entries make rank about 571, where LoRA has rank 2.9 for as many numbers."""
    model = torch.nn.Sequential(torch.nn.Linear(576, 576, bias=False))
    ia.attach(model, ia.Shira(density=density))
    state = state_of(model, "0")
    S = torch.zeros(576 * 576, dtype=torch.float64)
    S[state.index] = torch.randn(len(state.index), dtype=torch.float64)
    S = S.view(576, 576)
    bound = min(int((S != 0).any(0).sum()), int((S != 0).any(1).sum()))
    found = int(torch.linalg.matrix_rank(S))
    assert rank <= found <= bound
    assert round(density * 576 * 576) / (2 * 576) < 6


def test_struct_masks_with_a_diagonal_are_of_full_rank():
    index = struct((96, 96), 300)
    S = torch.zeros(96 * 96, dtype=torch.float64)
    S[index] = torch.randn(300, dtype=torch.float64)
    assert int(torch.linalg.matrix_rank(S.view(96, 96))) == 96


def test_columns_score_by_their_norm():
    model, base = small_net(), weights(small_net())
    ia.attach(model, ia.Shira(density=0.2, granularity="column", scorer="magnitude"))
    for site in SITES:
        norms = base[site].norm(dim=0)
        k = round(0.2 * base[site].shape[1])
        assert state_of(model, site).index.tolist() == sorted(norms.topk(k).indices.tolist())
