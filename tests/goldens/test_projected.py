"""GaLore, Fira and FRUGAL against loops written down from their papers and the authors' code, one matrix at a time, in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia import optim
from intarsia.optim import frugal
from intarsia.optim.projection import BASES, Entries, Lines, Subspace, generator

SHAPES = [(6, 10), (10, 6), (7, 7)]
STEPS = 9


def stream(shape: tuple[int, ...], steps: int = STEPS, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(steps)]


def follow(optimizer: torch.optim.Optimizer, W: nn.Parameter, gradients: list[Tensor]) -> list[Tensor]:
    """W after each step."""
    seen = []
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
        seen.append(W.detach().clone())
    return seen


def start(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64))


def subspace(G: Tensor, r: int) -> tuple[Tensor, bool]:
    """(P (m, r), True) for a wide G, (Q (n, r), False) for a tall or square one."""
    m, n = G.shape
    U, _, Vh = torch.linalg.svd(G)
    return (U[:, :r], True) if m < n else (Vh[:r].T, False)


def galore(W: Tensor, gradients: list[Tensor], r: int, T: int, lr: float, alpha: float, wd: float) -> list[Tensor]:
    """The loop of the card: moments not reset, no correction inside N."""
    b1, b2, eps = 0.9, 0.999, 1e-6
    W, M, V, seen = W.detach().clone(), torch.zeros(1), torch.zeros(1), []
    P, left = torch.zeros(1), True
    for t, G in enumerate(gradients):
        if t % T == 0:
            P, left = subspace(G, r)
        R = P.T @ G if left else G @ P
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        size = lr * math.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        N = M / (V.sqrt() + eps)
        W = W - size * alpha * (P @ N if left else N @ P.T)
        W = W - lr * wd * W
        seen.append(W)
    return seen


def fira(
    W: Tensor,
    gradients: list[Tensor],
    r: int,
    T: int,
    lr: float,
    alpha: float,
    wd: float,
    gamma: float,
    official: bool,
    whole: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    b1, b2, eps = 0.9, 0.999, 1e-6
    W, M, V, seen, rests = W.detach().clone(), torch.zeros(1), torch.zeros(1), [], []
    P, left, s = torch.zeros(1), True, None
    for t, G in enumerate(gradients):
        if t % T == 0:
            P, left = subspace(G, r)
        R = P.T @ G if left else G @ P
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        N = M / (V.sqrt() + eps)
        S = torch.zeros_like(G)
        inside = (P @ R if left else R @ P.T) * (alpha if official else 1.0)
        for j in range(G.shape[1] if left else G.shape[0]):
            n, d = (N[:, j], R[:, j]) if left else (N[j], R[j])
            phi = (N.norm() / (R.norm() + 1e-8)) if whole else n.norm() / (d.norm() + 1e-8)
            if left:
                S[:, j] = phi * (G - inside)[:, j]
            else:
                S[j] = phi * (G - inside)[j]
        if s is not None:
            S = S / (max(float(S.norm() / (s + 1e-8)), gamma) / gamma)
        s = S.norm()
        size = lr * math.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        W = W - size * (alpha * (P @ N if left else N @ P.T) + S)
        W = W - lr * wd * W
        seen.append(W)
        rests.append(S)
    return seen, rests


def close(a: list[Tensor], b: list[Tensor], atol: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


# --- GaLore


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_is_the_loop_of_the_authors(shape):
    W, gradients = start(shape), stream(shape)
    expected = galore(W, gradients, 3, 4, 0.05, 0.25, 0.1)
    optimizer = optim.GaLore([W], lr=0.05, rank=3, gap=4, scale=0.25, weight_decay=0.1)
    close(follow(optimizer, W, gradients), expected)
    state, wide = optimizer.state[W], shape[0] < shape[1]
    R = (3, shape[1]) if wide else (shape[0], 3)
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == R
    P = state["P" if wide else "Q"]
    assert P.shape == (min(shape), 3)
    torch.testing.assert_close(P.T @ P, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_with_torchs_adamw_inside_eps_stands_where_torch_has_it():
    W, gradients = start((6, 10)), stream((6, 10))
    P, _ = subspace(gradients[0], 3)
    proxy = nn.Parameter(torch.zeros(3, 10, dtype=torch.float64))
    adam = torch.optim.AdamW([proxy], lr=0.05, eps=0.3, weight_decay=0.0)
    expected = []
    for G in gradients:
        proxy.grad = P.T @ G
        adam.step()
        expected.append(W.detach() + 0.5 * P @ proxy.detach())
    optimizer = optim.GaLore([W], torch.optim.AdamW, 0.05, rank=3, gap=99, scale=0.5, eps=0.3)
    close(follow(optimizer, W, gradients), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_lie_in_the_subspace_between_refreshes_and_leave_it_after(shape):
    W, gradients = start(shape), stream(shape)
    before = W.detach().clone()
    seen = follow(optim.GaLore([W], lr=0.05, rank=2, gap=4), W, gradients)
    ranks = [int(torch.linalg.matrix_rank(each - before, rtol=1e-9)) for each in seen]
    assert ranks[:4] == [2, 2, 2, 2]
    assert ranks[4] == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gradient_of_low_rank_loses_nothing_and_the_first_step_has_a_closed_form(shape):
    g = torch.Generator().manual_seed(3)
    G = torch.randn(shape[0], 2, generator=g, dtype=torch.float64) @ torch.randn(
        2, shape[1], generator=g, dtype=torch.float64
    )
    W, (P, left) = start(shape), subspace(G, 3)
    before = W.detach().clone()
    optimizer = optim.GaLore([W], lr=0.1, rank=3, scale=0.25)
    (after,) = follow(optimizer, W, [G])
    R = P.T @ G if left else G @ P
    torch.testing.assert_close(P @ R if left else R @ P.T, G, rtol=0, atol=1e-12)
    N = R / (R.abs() + 1e-6 / math.sqrt(1 - 0.999))
    close([after], [before - 0.1 * 0.25 * (P @ N if left else N @ P.T)])


@pytest.mark.parametrize(
    ("side", "shape", "seen", "kept"),
    [
        ("std", (6, 10), (2, 10), {"P": (6, 2)}),
        ("std", (10, 6), (10, 2), {"Q": (6, 2)}),
        ("reverse_std", (6, 10), (6, 2), {"Q": (10, 2)}),
        ("reverse_std", (10, 6), (2, 6), {"P": (10, 2)}),
        ("left", (10, 6), (2, 6), {"P": (10, 2)}),
        ("right", (6, 10), (6, 2), {"Q": (10, 2)}),
        ("full", (6, 10), (2, 2), {"P": (6, 2), "Q": (10, 2)}),
    ],
)
def test_each_side_projects_as_it_says(side, shape, seen, kept):
    W, (G, *more) = start(shape), stream(shape)
    before = W.detach().clone()
    optimizer = optim.GaLore([W], torch.optim.SGD, 0.1, rank=2, side=side, scale=0.5, gap=9)
    follow(optimizer, W, [G, *more[:2]])
    U, _, Vh = torch.linalg.svd(G)
    left = U[:, :2] @ U[:, :2].T if "P" in kept else torch.eye(shape[0], dtype=torch.float64)
    right = Vh[:2].T @ Vh[:2] if "Q" in kept else torch.eye(shape[1], dtype=torch.float64)
    close([W.detach()], [before - 0.05 * left @ (G + more[0] + more[1]) @ right])
    assert {k: tuple(optimizer.state[W][k].shape) for k in kept} == kept
    assert Subspace(2, side).seen(shape) == seen
    assert Subspace(2, side).kept(shape) == sum(math.prod(s) for s in kept.values())


def test_a_random_subspace_has_orthonormal_columns_and_depends_on_seed_place_and_period():
    G = torch.zeros(8, 12)
    drawn = {key: BASES["random"](G, 3, generator(*key))[0] for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    for P in drawn.values():
        torch.testing.assert_close(P.T @ P, torch.eye(3, dtype=torch.float64))
    for key in list(drawn)[1:]:
        assert not torch.allclose(drawn[key], drawn[0, 0, 0])
    assert torch.equal(BASES["random"](G, 3, generator(0, 0, 0))[0], drawn[0, 0, 0])


# --- Fira


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("official", "whole"), [(False, False), (True, False), (False, True)])
def test_fira_is_the_loop_of_the_authors(shape, official, whole):
    W, gradients = start(shape), stream(shape)
    expected, _ = fira(W, gradients, 3, 4, 0.05, 0.5, 0.1, 1.01, official, whole)
    optimizer = optim.Fira(
        [W], lr=0.05, rank=3, gap=4, scale=0.5, weight_decay=0.1,
        residual="official" if official else "paper", factor="matrix" if whole else "column",
    )  # fmt: skip
    close(follow(optimizer, W, gradients), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_fira_is_galore(shape):
    runs = []
    for cls in (optim.Fira, optim.GaLore):
        W = start(shape)
        optimizer = cls([{"params": [W], "project": True}], lr=0.05, rank=99, gap=4, scale=1.0)
        runs.append(follow(optimizer, W, stream(shape)))
    close(runs[0], runs[1], 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rest_is_outside_of_the_subspace_and_a_spike_does_not_get_through(shape):
    """What moved W is taken apart again: without the part in the subspace it is the rest."""
    W, gradients = start(shape), stream(shape)
    gradients[5] = 100 * gradients[5]
    optimizer = optim.Fira([W], lr=0.1, rank=3, gap=99)
    P, left = subspace(gradients[0], 3)
    outside = torch.eye(min(shape), dtype=torch.float64) - P @ P.T
    before, norms = W.detach().clone(), []
    for t, after in enumerate(follow(optimizer, W, gradients), 1):
        moved = (before - after) / (0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t))
        S = outside @ moved if left else moved @ outside
        N = P.T @ moved if left else moved @ P
        assert (P.T @ S if left else S @ P).abs().max() < 1e-12
        assert N.norm() > 0.1
        norms.append(float(S.norm()))
        before = after
    assert float(optimizer.state[W]["norm"]) == pytest.approx(norms[-1], rel=1e-9)
    assert all(b <= 1.01 * a * (1 + 1e-6) for a, b in pairwise(norms))
    assert norms[5] == pytest.approx(1.01 * norms[4], rel=1e-6)
    W = start(shape)
    follow(free := optim.Fira([W], lr=0.1, rank=3, gap=99, limiter=0), W, gradients)
    _, unlimited = fira(start(shape), gradients, 3, 99, 0.1, 1.0, 0.0, 1e9, False, False)
    assert float(free.state[W]["norm"]) == pytest.approx(float(unlimited[-1].norm()), rel=1e-9)
    assert float(unlimited[5].norm()) > 1.1 * norms[5]


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_leaves_the_subspace_within_a_period(shape):
    W = start(shape)
    before = W.detach().clone()
    (first, *_) = follow(optim.Fira([W], lr=0.05, rank=2, gap=4), W, stream(shape, 1))
    assert int(torch.linalg.matrix_rank(first - before)) > 2


def test_vectors_under_fira_are_adamws():
    runs = []
    for optimizer in (
        lambda W: torch.optim.AdamW([W], 0.05, eps=1e-6),
        lambda W: optim.Fira([W], torch.optim.AdamW, 0.05, eps=1e-6, weight_decay=1e-2),
    ):
        W = start((7,))
        runs.append(follow(optimizer(W), W, stream((7,))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_adam_of_the_papers_differs_from_torchs_by_where_eps_is():
    runs = {}
    for eps in (0.0, 0.3):
        for cls in (optim.PaperAdamW, torch.optim.AdamW):
            weight = start((7,))
            runs[cls, eps] = follow(cls([weight], lr=0.05, eps=eps, weight_decay=0.0), weight, stream((7,)))
    close(runs[optim.PaperAdamW, 0.0], runs[torch.optim.AdamW, 0.0])
    W: Tensor = start((7,)).detach()
    M, V, b1, b2 = torch.zeros(7).double(), torch.zeros(7).double(), 0.9, 0.999
    for t, (G, seen) in enumerate(zip(stream((7,)), runs[optim.PaperAdamW, 0.3], strict=True), 1):
        M, V = b1 * M + (1 - b1) * G, b2 * V + (1 - b2) * G * G
        W = W - 0.05 * math.sqrt(1 - b2**t) / (1 - b1**t) * M / (V.sqrt() + 0.3)
        close([seen], [W])


# --- FRUGAL


def adam(state: dict[str, Any], g: Tensor) -> Tensor:
    """mhat / (sqrt vhat + eps), by the block's own counter."""
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g * g
    u: Tensor = state["m"] / (1 - 0.9 ** state["t"]) / ((state["v"] / (1 - 0.999 ** state["t"])).sqrt() + 1e-8)
    return u


@pytest.mark.parametrize("rest", ["sign", "sgd", "none"])
@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("selector", ["columns", "rows", "entries", "svd", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_frugal_is_the_loop_of_the_authors(shape, selector, reset, rest):
    W, gradients = start(shape), stream(shape)
    lr, wd, kappa, scale, density, T = 0.05, 0.1, 0.5, 0.8, 0.5, 4
    optimizer = optim.Frugal(
        [W],
        lr=lr,
        weight_decay=wd,
        kappa=kappa,
        scale=scale,
        density=density,
        gap=T,
        selector=selector,
        reset=reset,
        rest=rest,
    )
    state: dict[str, Any] = {}
    w, P, left, mask = W.detach().clone(), torch.zeros(1), True, torch.zeros(1)
    m, n = shape
    for t, G in enumerate(gradients):
        (after,) = follow(optimizer, W, [G])
        if t % T == 0:
            state = {} if reset else state
            kept = optimizer.state[W]
            if selector == "svd":
                P, left = subspace(G, round(density * min(shape)))
            elif selector == "random":
                left, P = "P" in kept, kept["P"] if "P" in kept else kept["Q"]
            else:
                mask = torch.zeros(shape, dtype=torch.bool)
                index = kept["index"].long()
                assert len(index) == int(density * {"columns": n, "rows": m, "entries": m * n}[selector])
                if selector == "columns":
                    mask[:, index] = True
                elif selector == "rows":
                    mask[index] = True
                else:
                    mask.view(-1)[index] = True
        w = w * (1 - lr * wd)
        if selector in ("svd", "random"):
            low = P.T @ G if left else G @ P
            u = adam(state, low)
            up, inside = (P @ u, P @ low) if left else (u @ P.T, low @ P.T)
            residual = G - inside
        else:
            u = adam(state, torch.where(mask, G, 0.0))
            up, residual = torch.where(mask, u, 0.0), torch.where(mask, 0.0, G)
        moved = {"sign": residual.sign(), "sgd": residual, "none": torch.zeros_like(G)}[rest]
        w = w - lr * scale * up - lr * scale * kappa * moved
        if selector in ("columns", "rows", "entries") and not reset and t >= T:
            return  # moments of one support on another: the loop above keeps them by place, the authors by number
        close([after], [w], 1e-10)


def test_moments_stay_by_number_where_the_inner_does_not_begin_anew():
    W, gradients = start((6, 10)), stream((6, 10))
    optimizer = optim.Frugal([W], lr=0.05, density=0.5, gap=4, reset=False, rest="none")
    state: dict[str, Any] = {}
    w = W.detach().clone()
    for G in gradients:
        (after,) = follow(optimizer, W, [G])
        index = optimizer.state[W]["index"].long()
        w[:, index] -= 0.05 * adam(state, G[:, index])
        close([after], [w])


def test_density_0_moves_by_signs_and_keeps_nothing():
    W, (G, H, *_) = start((6, 10)), stream((6, 10))
    before = W.detach().clone()
    G[0, 0] = 0.0
    optimizer = optim.Frugal([W], lr=0.1, density=0.0, kappa=0.5, weight_decay=0.2)
    first, second = follow(optimizer, W, [G, H])
    assert torch.equal(first, before * (1 - 0.1 * 0.2) - 0.05 * G.sign())
    close([second], [first * (1 - 0.1 * 0.2) - 0.05 * H.sign()])
    assert not any(isinstance(value, Tensor) for value in optimizer.state[W].values())
    assert optim.state_bytes(optimizer) == 0


def test_inactive_columns_move_by_the_rate_or_not_at_all_and_active_ones_as_under_adam():
    W, gradients = start((6, 10)), stream((6, 10), 4)
    gradients[1][:, :] = torch.where(gradients[1].abs() < 0.5, 0.0, gradients[1])
    before = W.detach().clone()
    optimizer = optim.Frugal([W], lr=0.1, density=0.35, kappa=0.5, gap=99)
    seen = follow(optimizer, W, gradients)
    index = optimizer.state[W]["index"].long()
    assert len(index) == 3
    others = [j for j in range(10) if j not in index.tolist()]
    columns = nn.Parameter(before[:, index].clone())
    plain = follow(torch.optim.AdamW([columns], lr=0.1, weight_decay=0.0), columns, [G[:, index] for G in gradients])
    for t, (a, b) in enumerate(zip([before, *seen], seen, strict=False)):
        steps = (b - a)[:, others]
        assert set(steps.mul(1000).round().unique().tolist()) <= {-50.0, 0.0, 50.0}
        assert (0.0 in steps.mul(1000).round().unique().tolist()) == (t == 1)
        close([b[:, index]], [plain[t]])


def test_columns_are_drawn_anew_every_period():
    W = start((6, 10))
    optimizer = optim.Frugal([W], density=0.5, gap=3)
    drawn = []
    for G in stream((6, 10)):
        follow(optimizer, W, [G])
        drawn.append(tuple(optimizer.state[W]["index"].tolist()))
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3] == drawn[4] == drawn[5] != drawn[6]


@pytest.mark.parametrize("order", ["ascending", "descending", "random", "mirror"])
def test_blocks_are_active_equally_often_and_only_they_have_a_state(order):
    weights = [start((4, 3)) for _ in range(8)]
    optimizer = optim.Frugal(
        weights, torch.optim.AdamW, 0.1, density=0.25, selector="block", gap=2, order=order, kappa=0.5
    )
    times, turns = [0] * 8, []
    for step in range(8):
        before = [W.detach().clone() for W in weights]
        for number, W in enumerate(weights):
            W.grad = stream((4, 3), 8, seed=number)[step]
        optimizer.step()
        active = [number for number, W in enumerate(weights) if "exp_avg" in optimizer.state[W]]
        assert len(active) == 2
        for number, W in enumerate(weights):
            times[number] += number in active
            if number not in active:
                close([W.detach()], [before[number] - 0.05 * stream((4, 3), 8, seed=number)[step].sign()])
        turns.append(active)
    assert times == [2] * 8
    expected = {"ascending": [[0, 1], [2, 3], [4, 5], [6, 7]], "descending": [[6, 7], [4, 5], [2, 3], [0, 1]]}
    assert turns[::2] == expected.get(order, expected["ascending"] if order == "mirror" else turns[::2])
    assert turns[::2] == turns[1::2]


def test_blocks_go_to_and_fro_in_a_mirror_and_every_tensor_has_its_turn():
    assert [frugal.blocks(4, 0.25, "mirror", period) for period in range(8)] == [{0}, {1}, {2}, {3}, {3}, {2}, {1}, {0}]
    for seed in range(3):
        seen = [frugal.blocks(5, 0.4, "random", period, seed) for period in range(5)]
        assert sorted(number for each in seen for number in each) == sorted([*range(5)] * 2)
    assert frugal.blocks(4, 0.0, "ascending", 3) == set()
    assert frugal.blocks(4, 1.0, "descending", 3) == {0, 1, 2, 3}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_that_is_drawn_again_begins_anew(shape):
    W, gradients = start(shape), stream(shape)
    seen = follow(optim.Frugal([W], lr=0.1, density=1.0, selector="block", gap=3), W, gradients)
    other = start(shape)
    for period in range(3):
        adamw = torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
        close(seen[3 * period : 3 * period + 3], follow(adamw, other, gradients[3 * period : 3 * period + 3]))


@pytest.mark.parametrize("shape", SHAPES)
def test_frugal_with_svd_and_nothing_else_is_galore(shape):
    W, gradients = start(shape), stream(shape)
    around = optim.Frugal(
        [W], optim.PaperAdamW, 0.05, density=3 / min(shape), selector="svd", rest="none", reset=False, gap=4, scale=0.25
    )
    seen = follow(around, W, gradients)
    close(seen, galore(start(shape), gradients, 3, 4, 0.05, 0.25, 0.0))


@pytest.mark.parametrize(
    ("projection", "shape"),
    [(Lines(0.5, 1), (4, 6)), (Lines(0.5, 0), (4, 6)), (Entries(0.25), (4, 6)), (Subspace(2), (4, 6))],
)
def test_down_and_up_are_each_others_transpose_and_the_rest_is_what_is_missing(projection, shape):
    G, H = stream(shape, 2)
    kept = projection.draw(G, generator(0, 0, 0))
    R = projection.down(G, kept)
    assert tuple(R.shape) == projection.seen(shape)
    assert sum(t.numel() for t in kept.values()) == projection.kept(shape)
    up = projection.up(R, kept, shape)
    close([(projection.down(H, kept) * R).sum()], [(H * up).sum()])
    close([projection.rest(G, kept)], [G - up])
    close([projection.down(up, kept)], [R])
