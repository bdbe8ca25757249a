"""HUT against HF PEFT's HiRA, and against the row and column scalings that it is where r = 1."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import intarsia as ia
from intarsia import chain
from intarsia.edits import LowRank, Multiplied
from intarsia.methods import Hut
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, stir, trained


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_same_factors_in_peft_give_the_same():
    model = small_net()
    ia.attach(model, Hut(rank=3))
    stir(model, size=0.2)
    other: Any = peft.get_peft_model(small_net(), peft.HiraConfig(r=3, target_modules=list(SITES)))
    pairs = []
    for site in SITES:
        state, layer = state_of(model, site), other.get_submodule(f"base_model.model.{site}")
        pairs += [(state.A, layer.hira_A["default"]), (state.B, layer.hira_B["default"])]
    with torch.no_grad():
        for mine, their in pairs:
            their.copy_(mine)
    x, x_other = (some_input().requires_grad_() for _ in range(2))
    torch.testing.assert_close(model(x), other(x_other), rtol=1e-4, atol=2e-6)
    some_loss(model, x).backward()
    some_loss(other, x_other).backward()
    torch.testing.assert_close(x.grad, x_other.grad, rtol=1e-4, atol=2e-6)
    for mine, their in pairs:
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=2e-6)


def test_the_gradients_of_the_card():
    """G the gradient of W', M = s G * W: dL/dU_B = M U_A^T, dL/dU_A = U_B^T M."""
    model, x, gy = adapted(Hut(rank=2, alpha=3.0), torch.float64), _random(5, 16, seed=1), _random(5, 24, seed=2)
    layer, state = layer_of(model, "up"), state_of(model, "up")
    (layer(x) * gy).sum().backward()
    M = 1.5 * (gy.T @ x) * chain.base_weight(layer).detach()
    torch.testing.assert_close(state.B.grad, M @ state.A.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.A.grad, state.B.T @ M, rtol=0, atol=1e-12)


def test_pure_of_rank_one_scales_rows_and_columns():
    W, u, v = _random(6, 9), _random(6, 1, seed=1), _random(1, 9, seed=2)
    found = Multiplied((6, 9), LowRank((6, 9), u, v, 1.0), 0.0).fold(W)
    assert torch.equal(found, W * (u @ v))
    torch.testing.assert_close(found, torch.diag(u[:, 0]) @ W @ torch.diag(v[0]), rtol=0, atol=1e-14)
    ones = torch.ones(1, 9, dtype=torch.float64)
    outputs = Multiplied((6, 9), LowRank((6, 9), u, ones, 1.0), 0.0).fold(W)  # (IA)^3 at a layer's output
    x = _random(3, 9, seed=3)
    torch.testing.assert_close(x @ outputs.T, (x @ W.T) * u[:, 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", [Hut(rank=2, alpha=6.0), Hut(rank=2, form="pure")], ids=str)
def test_starts_as_the_base_and_unmerged_is_merged(method):
    model, x = small_net(torch.float64), some_input(torch.float64)
    ia.attach(model, method)
    assert torch.equal(model(x), small_net(torch.float64)(x))
    stir(model, size=0.2)
    fused = small_net(torch.float64)
    deck = ia.Deck(fused)
    deck.add(a=ia.export(model))
    deck.use("a")
    torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)
    deck.off()
    assert torch.equal(fused(x), small_net(torch.float64)(x))


@pytest.mark.parametrize("form", ["one", "pure"])
def test_what_is_zero_stays_zero(form):
    """A 2:4 pattern survives training, in the weight that is set in too."""
    model, pruned = small_net(), small_net()
    for net in (model, pruned):
        for site in SITES:
            W = layer_of(net, site).weight.data.view(-1, 4)
            W.scatter_(1, W.abs().argsort(dim=1)[:, :2], 0.0)
    zeros = {site: layer_of(model, site).weight.detach() == 0 for site in SITES}
    ia.attach(model, Hut(rank=2, form=form))
    optimizer = torch.optim.Adam(trained(model), lr=0.05)
    for _ in range(5):
        some_loss(model, some_input()).backward()
        optimizer.step()
        optimizer.zero_grad()
    deck = ia.Deck(pruned)
    deck.add(a=ia.export(model))
    deck.use("a")
    for site in SITES:
        W = layer_of(pruned, site).weight
        assert torch.equal(W == 0, zeros[site])
        assert int(zeros[site].sum()) == W.numel() // 2


def test_the_rank_of_the_change_passes_r():
    W, low = _random(20, 20), LowRank((20, 20), _random(20, 1, seed=1), _random(1, 20, seed=2), 1.0)
    assert int(torch.linalg.matrix_rank(Multiplied((20, 20), low).delta(W))) == 20
    thin = W[:, :2] @ W[:2]
    two = LowRank((20, 20), _random(20, 3, seed=1), _random(3, 20, seed=2), 1.0)
    assert int(torch.linalg.matrix_rank(Multiplied((20, 20), two).delta(thin))) == 6  # rank(W) r at most


def test_only_one_matrix_is_made_and_none_is_kept():
    """One product with W' a forward; between forward and backward nothing of the weight's size."""
    model, kept = torch.nn.Sequential(torch.nn.Linear(64, 48)), []
    ia.attach(model, Hut(rank=2))
    stir(model)
    x = torch.randn(3, 64, requires_grad=True)

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x).sum().backward()
    assert all(t.numel() < 64 * 48 for t in kept)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ia.IntarsiaError, match="alpha=2.0 must be none where form is pure"):
        Hut(alpha=2.0, form="pure")
    with pytest.raises(ia.IntarsiaError, match="up: rank=17 is above 16"):
        ia.attach(small_net(), Hut(rank=17))
