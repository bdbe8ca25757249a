"""QWHA against the steps of its card, written out with a root of G, a dense solve and least squares channel by channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import intarsia as ia
from intarsia.edits.transforms import matrix
from intarsia.forms import shared_out
from intarsia.methods import Qwha
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, trained

O, I = 20, 24


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _case(seed: int = 0):
    """W, W rounded to 3 bits a row, and inputs that are not alike."""
    W = _random(O, I, seed=seed)
    step = W.abs().amax(1, keepdim=True) / 3
    x = (
        _random(200, I, seed=seed + 1)
        @ (_random(I, I, seed=seed + 2) / 5)
        * torch.linspace(0.2, 2, I, dtype=torch.float64)
    )
    return W, (W / step).round() * step, x


def _attached(method: Qwha, W: Tensor, Wq: Tensor, x: Tensor):
    net = torch.nn.Sequential(torch.nn.Linear(W.shape[1], W.shape[0], bias=False).double())
    layer_of(net, "0").weight.data.copy_(Wq)
    ia.attach(net, method, data=[x], loss=lambda model, batch: model(batch).sum(), original={"0": W})
    state = state_of(net, "0")
    return net, state, state.method.edit(state.raw()).delta(Wq)


def _card(W: Tensor, Wq: Tensor, x: Tensor, n: int, damping: float):
    """The steps 1 to 6 as they stand there. -> F before and after the refinement, R, B."""
    E, H = W - Wq, matrix(W.shape[1])
    G = x.T @ x / len(x)
    G = G + damping * G.diagonal().mean() * torch.eye(len(G), dtype=torch.float64)
    values, Q = torch.linalg.eigh(G)
    R = values.sqrt()[:, None] * Q.T
    B = R @ H / W.shape[1]
    T = R @ E.T
    full = torch.linalg.solve(B, T).T  # (O, I)
    weights = full.norm(dim=1)
    counts = [min(int(n * w / weights.sum()), W.shape[1]) for w in weights]
    while sum(counts) < n:
        free = [o for o, c in enumerate(counts) if c < W.shape[1]]
        each = (n - sum(counts)) // len(free)
        if each:
            for o in free:
                counts[o] = min(counts[o] + each, W.shape[1])
        else:
            for o in sorted(free, key=lambda o: counts[o])[: n - sum(counts)]:
                counts[o] += 1
    cut, refined = torch.zeros_like(full), torch.zeros_like(full)
    for o, count in enumerate(counts):
        S = (B.square().sum(0) * full[o].square()).argsort(descending=True)[:count].sort().values
        cut[o, S] = full[o, S]
        refined[o, S] = torch.linalg.lstsq(B[:, S], T[:, o : o + 1]).solution[:, 0]
    return cut, refined, R, H


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("damping", [1e-4, 1e-2])
def test_the_start_is_the_card_step_by_step(rank, damping):
    W, Wq, x = _case()
    cut, refined, R, H = _card(W, Wq, x, rank * (O + I), damping)
    _, state, delta = _attached(Qwha(rank=rank, damping=damping), W, Wq, x)
    F = torch.zeros(O * I, dtype=torch.float64)
    F[state.index] = state.values.detach() * 3000 / O**0.5  # any alpha is absorbed
    torch.testing.assert_close(F.view(O, I), refined, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(delta, refined @ H.T / I, rtol=1e-7, atol=1e-9)

    def left(F: Tensor) -> float:
        return float((R @ (W - Wq - F @ H.T / I).T).norm())

    assert left(refined) < left(cut) < left(torch.zeros_like(cut))


def test_all_coefficients_give_the_original_back():
    W, Wq, x = _random(24, 24), torch.zeros(24, 24, dtype=torch.float64), _case()[2]
    net, _, delta = _attached(Qwha(rank=12), W, Wq, x)  # 12 * 48 = 24 * 24
    torch.testing.assert_close(Wq + delta, W, rtol=0, atol=1e-9)
    torch.testing.assert_close(net(x), x @ W.T, rtol=0, atol=1e-8)


def test_with_inputs_alike_the_refined_values_are_the_truncated_ones():
    """G = 1: the columns of H are orthogonal."""
    W, Wq, _ = _case()
    x = torch.eye(I, dtype=torch.float64) * I**0.5
    _, state, _ = _attached(Qwha(rank=3, damping=0.0), W, Wq, x)
    full = (W - Wq) @ matrix(I)
    torch.testing.assert_close(state.values * 3000 / O**0.5, full.view(-1)[state.index], rtol=1e-9, atol=1e-12)


def test_the_budget_is_kept_exactly():
    for n, weights, most in (
        (37, [0.1, 5.0, 1.0, 0.0], 20),
        (80, [9.0, 1, 1, 1], 20),
        (7, [0.0, 0, 0], 9),
        (10, [1.0, 1, 1], 9),
    ):
        counts = shared_out(n, torch.tensor(weights, dtype=torch.float64), most)
        assert int(counts.sum()) == n
        assert int(counts.max()) <= most
    assert shared_out(80, torch.tensor([9.0, 1, 1, 1]), 20).tolist() == [20] * 4
    assert shared_out(10, torch.tensor([1.0, 1, 1]), 9).tolist() == [4, 3, 3]
    assert shared_out(8, torch.tensor([8.0, 1, 1, 0]), 5).tolist() == [5, 1, 1, 1]


def test_the_number_of_coefficients_is_n_before_and_after_training_and_parseval_holds():
    W, Wq, x = _case()
    net, state, delta = _attached(Qwha(rank=3), W, Wq, x)
    index, n = state.index.clone(), 3 * (O + I)
    assert len(index) == len(index.unique()) == n == state.values.numel() == Qwha(rank=3).trained_count((O, I))
    F = state.values.detach() * 3000 / O**0.5
    torch.testing.assert_close(F.square().sum() / I, delta.square().sum(), rtol=1e-12, atol=0)
    assert int(torch.linalg.matrix_rank(delta)) == O  # high rank, where LoRA of as many numbers has 3
    optimizer = torch.optim.AdamW(trained(net), lr=1e-2)
    for _ in range(3):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(state.index, index)
    assert int((state.values != 0).sum()) == n


def test_without_a_compressed_base_it_starts_as_the_base():
    model, method = small_net(torch.float64), Qwha(rank=2, start="weight")
    ia.attach(model, method)
    x = some_input(torch.float64)
    assert torch.equal(model(x), small_net(torch.float64)(x))
    some_loss(model, x).backward()
    for site in SITES:
        state, W = state_of(model, site), layer_of(model, site).weight.detach()
        assert state.values.grad.abs().max() > 0
        F = (W @ matrix(W.shape[1])).abs()
        for row in range(len(W)):  # the largest of each row
            there = state.index[(state.index >= row * W.shape[1]) & (state.index < (row + 1) * W.shape[1])] % W.shape[1]
            assert set(there.tolist()) == set(F[row].argsort(descending=True)[: len(there)].tolist())


def test_what_it_cannot_do_is_told():
    with pytest.raises(ia.IntarsiaError, match="original"):
        ia.attach(small_net(), Qwha(rank=2), data=[some_input()], loss=some_loss)
    with pytest.raises(
        ia.IntarsiaError, match=r"0: rank=30 asks for 720 coefficients of a 12 x 12 weight, which has 144"
    ):
        ia.attach(torch.nn.Sequential(torch.nn.Linear(12, 12)), Qwha(rank=30, start="weight"))
    with pytest.raises(ia.IntarsiaError, match="0: no Hadamard matrix of size 18 is known here"):
        ia.attach(torch.nn.Sequential(torch.nn.Linear(18, 12)), Qwha(rank=2, start="weight"))
