"""LoRA-RITE: what it promises of a pair, its closed forms, and a loop written down from the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intarsia as ia
from intarsia import optim
from small import small_net, some_input, some_loss, state_of, stir, trained

M, N, R = 9, 7, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(T: Tensor | None = None, r: int = R, m: int = M, n: int = N) -> tuple[nn.Parameter, nn.Parameter]:
    """B T and T^-1 A."""
    B, A = normal(m, r, seed=1), normal(r, n, seed=2)
    return (
        (nn.Parameter(B), nn.Parameter(A))
        if T is None
        else (nn.Parameter(B @ T), nn.Parameter(torch.linalg.inv(T) @ A))
    )


def rite(*pairs: tuple[nn.Parameter, nn.Parameter], **given: Any) -> optim.LoraRite:
    return optim.LoraRite([{"params": [p for each in pairs for p in each], "paired": True}], **({"lr": 0.05} | given))


def fit(B: nn.Parameter, A: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    """B A towards a matrix, on other data in every step. -> B A."""
    target = normal(B.shape[0], A.shape[1], seed=3)
    for step in range(steps):
        x = normal(16, A.shape[1], seed=100 + step)
        optimizer.zero_grad()
        (x @ (B @ A - target).T).square().mean().backward()
        optimizer.step()
    return (B @ A).detach()


T = normal(R, R, seed=4) + 2 * torch.eye(R, dtype=torch.float64)


@pytest.mark.parametrize("given", [{}, {"drop": 0.0, "clip": 0.0}, {"clip": 0.1}], ids=str)
def test_the_product_does_not_depend_on_how_it_is_split(given):
    products = [fit(B, A, rite((B, A), **given), 30) for B, A in (pair(), pair(T))]
    torch.testing.assert_close(*products, rtol=0, atol=1e-12)
    assert (products[0] - (pair()[0] @ pair()[1])).abs().max() > 0.5
    plain = [fit(B, A, torch.optim.AdamW([B, A], lr=0.05), 30) for B, A in (pair(), pair(T))]
    assert (plain[0] - plain[1]).abs().max() > 0.1


@pytest.mark.parametrize("c", [1e-3, 7.0, 1e4])
def test_nor_on_how_large_a_factor_is(c):
    products = [fit(B, A, rite((B, A)), 10) for B, A in (pair(), pair(c * torch.eye(R, dtype=torch.float64)))]
    torch.testing.assert_close(*products, rtol=0, atol=1e-11)


def test_square_factors_span_everything_and_v_has_a_closed_form():
    B, A = pair(r=5, m=5, n=5)
    G = normal(5, 5, seed=6)
    optimizer = rite((B, A), drop=0.0, clip=0.0)
    U_B, U_A = torch.linalg.qr(B.detach())[0], torch.linalg.qr(A.detach().mT)[0]
    B.grad, A.grad = G @ A.detach().mT, B.detach().mT @ G
    optimizer.step()
    for factor, u in ((A, G.mT @ U_B), (B, G @ U_A)):
        torch.testing.assert_close(u.norm(), G.norm())
        torch.testing.assert_close(optimizer.state[factor]["second"], u.mT @ u / 5, rtol=0, atol=1e-12)


def loop(B: Tensor, A: Tensor, gradients: list[Tensor], lr: float, wd: float, clip: float) -> tuple[Tensor, Tensor]:
    """The steps of the card, for the gradient G of the product."""
    b1, b2, eps = 0.9, 0.999, 1e-6
    A = A.T
    (m, r), n = B.shape, len(A)
    V_A, V_B, M_A, M_B = (
        torch.zeros(r, r).double(),
        torch.zeros(r, r).double(),
        torch.zeros(n, r).double(),
        torch.zeros(m, r).double(),
    )
    old_A = old_B = None
    for t, G in enumerate(gradients, 1):
        gA, gB = G.T @ B, G @ A
        U_B, R_B = torch.linalg.qr(B)
        U_A, R_A = torch.linalg.qr(A)
        u_A, u_B = gA @ torch.linalg.pinv(R_B), gB @ torch.linalg.pinv(R_A)
        u_A = u_A * 0 if (u_A**2).mean() ** 0.5 > 1 else u_A
        u_B = u_B * 0 if (u_B**2).mean() ** 0.5 > 1 else u_B
        total = float(((u_A**2).sum() + (u_B**2).sum()) ** 0.5)
        if total > clip:
            u_A, u_B = u_A * clip / total, u_B * clip / total
        P_A = U_B.T @ old_B if old_B is not None else torch.zeros(r, r).double()
        P_B = U_A.T @ old_A if old_A is not None else torch.zeros(r, r).double()
        old_A, old_B = U_A, U_B
        d1, d2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        V_A = (1 - d2) * u_A.T @ u_A / n + d2 * P_A @ V_A @ P_A.T
        V_B = (1 - d2) * u_B.T @ u_B / m + d2 * P_B @ V_B @ P_B.T
        S = []
        for u, V in ((u_A, V_A), (u_B, V_B)):
            w, Q = torch.linalg.eigh((V + V.T) / 2)
            S.append(u @ Q @ torch.diag(1 / (w.clamp_min(0).sqrt() + eps)) @ Q.T)
        M_A = d1 * M_A @ P_A.T + (1 - d1) * S[0]
        M_B = d1 * M_B @ P_B.T + (1 - d1) * S[1]
        step_A, step_B = M_A @ torch.linalg.pinv(R_B).T, M_B @ torch.linalg.pinv(R_A).T
        A, B = A - lr * (step_A + wd * A), B - lr * (step_B + wd * B)
    return B, A.T


@pytest.mark.parametrize(("wd", "clip", "size"), [(0.0, 1.0, 0.1), (0.1, 1.0, 0.1), (0.0, 0.2, 0.1), (0.0, 1.0, 1.05)])
def test_it_is_the_loop_of_the_paper(wd, clip, size):
    B, A = pair()
    gradients = [size * normal(M, N, seed=10 + t) for t in range(12)]
    expected = loop(B.detach(), A.detach(), gradients, 0.05, wd, clip)
    optimizer = rite((B, A), weight_decay=wd, clip=clip)
    dropped = 0
    for G in gradients:
        B.grad, A.grad = G @ A.detach().mT, B.detach().mT @ G
        dropped += float((G @ torch.linalg.qr(A.detach().mT)[0]).square().mean()) > 1
        optimizer.step()
        for factor in (A, B):
            V = optimizer.state[factor]["second"]
            assert torch.equal(V, V.mT)
            assert float(torch.linalg.eigvalsh(V).min()) > -1e-15
    torch.testing.assert_close((B.detach(), A.detach()), expected, rtol=0, atol=1e-10)
    assert (dropped in range(2, 11)) == (size > 1)


def test_the_norm_is_of_all_pairs_together():
    """What is clipped by one large pair is smaller in all of them."""
    G = 0.3 * normal(M, N, seed=6)

    def moments(*sizes: float) -> list[Tensor]:
        pairs = [pair() for _ in sizes]
        optimizer = rite(*pairs, drop=0.0)
        for (B, A), size in zip(pairs, sizes, strict=True):
            B.grad, A.grad = size * G @ A.detach().mT, size * B.detach().mT @ G
        optimizer.step()
        return [optimizer.state[B]["second"] for B, _ in pairs]

    def norm(*sizes: float) -> float:
        B, A = pair()
        U_B, U_A = torch.linalg.qr(B.detach())[0], torch.linalg.qr(A.detach().mT)[0]
        one = float((G.mT @ U_B).square().sum() + (G @ U_A).square().sum())
        return float(sum(size**2 * one for size in sizes) ** 0.5)

    U_A = torch.linalg.qr(pair()[1].detach().mT)[0]
    u = G @ U_A
    for sizes in ((0.1,), (1.0,), (1.0, 3.0)):
        shrink = min(1.0, 1 / norm(*sizes))
        for V, size in zip(moments(*sizes), sizes, strict=True):
            torch.testing.assert_close(V, (shrink * size) ** 2 * u.mT @ u / M, rtol=1e-9, atol=1e-15)
    assert norm(0.1) < 1 < norm(1.0)


def test_a_pair_without_gradient_stays_and_from_b_0_a_waits_for_one_step():
    still, (B, A) = pair(), pair()
    with torch.no_grad():
        B.zero_()
    optimizer = rite(still, (B, A))
    before = [p.detach().clone() for p in (*still, A)]
    for p in still:
        p.grad = torch.zeros_like(p)
    for step in range(2):
        G = 0.1 * normal(M, N, seed=6)
        B.grad, A.grad = G @ A.detach().mT, B.detach().mT @ G
        optimizer.step()
        assert torch.equal(A.detach(), before[2]) == (step == 0)
        assert bool(B.abs().max() > 0)
    assert torch.equal(still[0], before[0])
    assert torch.equal(still[1], before[1])
    still[0].grad = None
    steps = optimizer.state[still[1]]["pair_step"]
    optimizer.step()
    assert optimizer.state[still[1]]["pair_step"] == steps


def test_a_model_gives_its_pairs_and_the_others_go_to_adamw():
    net = small_net()
    ia.attach(net, ia.Dora(ia.Lora(rank=2)))
    stir(net, size=0.3)
    optimizer = optim.build("lora-rite").build(net, 1e-2)
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"][:2]] == [(24, 2), (2, 16)]
    for _ in range(2):
        optimizer.zero_grad()
        some_loss(net, some_input()).backward()
        optimizer.step()
    state, magnitude = optimizer.state, state_of(net, "up").magnitude
    assert {"exp_avg", "exp_avg_sq", "step"} == state[magnitude].keys()
    sizes = {
        key: tuple(value.shape) for key, value in state[state_of(net, "up").B].items() if isinstance(value, Tensor)
    }
    assert sizes == {"moment": (24, 2), "second": (2, 2), "basis": (16, 2)}
    assert len(state) == len(trained(net))


def test_a_group_that_is_no_pairs_is_refused():
    B, A = pair()
    for params in ([B], [A, B], [B, nn.Parameter(torch.zeros(N))]):
        with pytest.raises(ia.IntarsiaError, match=r"a paired group is B \(m, r\), A \(r, n\), B, A"):
            optim.LoraRite([{"params": params, "paired": True}])
