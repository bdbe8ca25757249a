"""Bone, its mini form and BAT against HF PEFT's MiSS, and against the block formulas written out in loops."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import intarsia as ia
from intarsia import chain
from intarsia.edits import BlockAffine, Tiled
from intarsia.interop.views import as_low_rank
from intarsia.methods import Bone
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, stir, trained

BONE, MINI, BAT = Bone(rank=3), Bone(rank=5, variant="mini", mini_rank=4), Bone(rank=4, variant="bat")
THEIRS = [
    (BONE, {"r": 3}),
    (Bone(rank=4), {"r": 4}),
    (Bone(rank=4, variant="mini", mini_rank=8), {"r": 4, "init_weights": "mini", "mini_r": 8}),
    (MINI, {"r": 5, "init_weights": "mini", "mini_r": 4}),
    (BAT, {"r": 4, "init_weights": "bat"}),
]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("ours", "theirs"), THEIRS, ids=str)
def test_the_same_tensors_in_peft_give_the_same(ours, theirs):
    model = small_net()
    ia.attach(model, ours)
    stir(model)
    config = peft.MissConfig(target_modules=list(SITES), **theirs)
    other: Any = peft.get_peft_model(small_net(), config)
    pairs = []
    for site in SITES:
        (mine,) = state_of(model, site).parameters()
        pairs.append((mine, other.get_submodule(f"base_model.model.{site}").miss_block["default"]))
        assert mine.shape == pairs[-1][1].shape
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
        assert mine.grad.abs().max() > 1e-4
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=2e-6)


def test_bone_is_its_loop_and_a_lora_with_a_fixed_factor():
    O, I, r = 7, 10, 4
    D = _random(r, O)
    edit = Tiled((O, I), D)
    expected = torch.tensor([[float(D[j % r, o]) for j in range(I)] for o in range(O)], dtype=torch.float64)
    assert torch.equal(edit.delta(expected), expected)
    A = torch.eye(r, dtype=torch.float64).repeat(1, 3)[:, :I]  # [1 1 ... 1], the last one cut
    assert torch.equal(D.mT @ A, expected)
    low = as_low_rank(edit)
    assert not isinstance(low, str)
    assert torch.equal(low.A, A)
    assert torch.equal(low.delta(expected), expected)
    x = _random(2, 3, I, seed=1)
    torch.testing.assert_close(edit.times(x), F.linear(x, expected), rtol=0, atol=1e-12)
    assert int(torch.linalg.matrix_rank(expected)) == r


def test_the_mini_form_is_its_loop():
    O, I, D = 8, 10, _random(4, 2)
    expected = torch.tensor([[float(D[j % 4, o % 2]) for j in range(I)] for o in range(O)], dtype=torch.float64)
    edit, x = Tiled((O, I), D), _random(5, I, seed=1)
    assert torch.equal(edit.delta(expected), expected)
    torch.testing.assert_close(edit.times(x), F.linear(x, expected), rtol=0, atol=1e-12)


def test_bat_is_its_loop_and_is_taken_back_by_the_inverse():
    O, I, r = 8, 12, 4
    W, B = _random(O, I), 0.1 * _random(O // r, r, r, seed=1)
    changed = BlockAffine((O, I), B).fold(W)
    for p in range(O // r):
        for q in range(I // r):
            block = W[p * r : (p + 1) * r, q * r : (q + 1) * r]
            found = changed[p * r : (p + 1) * r, q * r : (q + 1) * r]
            torch.testing.assert_close(found, block + block @ B[p] + B[p], rtol=0, atol=1e-12)
    blocks = changed.reshape(O // r, r, I // r, r).permute(2, 0, 1, 3)
    back = (blocks - B) @ torch.linalg.inv(torch.eye(r, dtype=torch.float64) + B)
    torch.testing.assert_close(back.permute(1, 2, 0, 3).reshape(O, I), W, rtol=0, atol=1e-10)
    tiled = torch.cat([block.repeat(1, I // r) for block in B])
    assert torch.equal(BlockAffine((O, I), B).fold(torch.zeros_like(W)), tiled)


def test_bat_passes_its_side_in_rank_and_bone_does_not():
    B = _random(8, 4, 4)
    assert int(torch.linalg.matrix_rank(BlockAffine((32, 32), B).delta(_random(32, 32, seed=1)))) == 32
    assert int(torch.linalg.matrix_rank(Tiled((32, 32), _random(4, 32)).delta(_random(1)))) == 4


@pytest.mark.parametrize("method", [BONE, MINI, BAT], ids=str)
def test_the_start_is_the_base_and_has_a_gradient(method):
    """The first gradient of D is that of the whole weight summed over the blocks of the inputs; of B, W^T times it added."""
    plain, model, x = small_net(torch.float64), small_net(torch.float64), some_input(torch.float64)
    ia.attach(model, method)
    assert torch.equal(model(x), plain(x))
    some_loss(plain, x).backward()
    some_loss(model, x).backward()
    r = method.rank
    for site in SITES:
        G, W = layer_of(plain, site).weight.grad, layer_of(plain, site).weight.detach()
        (parameter,) = state_of(model, site).parameters()
        if method.variant == "bat":
            expected = torch.zeros_like(parameter)
            for o in range(len(G) // r):
                for i in range(G.shape[1] // r):
                    g, w = (t[o * r : (o + 1) * r, i * r : (i + 1) * r] for t in (G, W))
                    expected[o] += g + w.T @ g
        else:
            expected = torch.zeros_like(parameter)
            for o in range(len(G)):
                for j in range(G.shape[1]):
                    expected[j % r, o % parameter.shape[1]] += G[o, j]
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-12)


def test_bat_keeps_nothing_of_the_size_of_the_weight_for_backward():
    model, kept = torch.nn.Sequential(torch.nn.Linear(64, 48)), []
    ia.attach(model, BAT)
    stir(model)
    x = torch.randn(3, 64, requires_grad=True)

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    assert all(t.numel() < 64 * 48 for t in kept)
    y.sum().backward()
    assert trained(model)[0].grad is not None


def test_bat_in_bfloat16_is_the_weight_rounded_once():
    model, x = adapted(BAT, torch.bfloat16), some_input(torch.bfloat16)
    layer = layer_of(model, "up")
    W = state_of(model, "up").method.edit(state_of(model, "up").raw()).fold(chain.base_weight(layer).float())
    assert torch.equal(layer(x), F.linear(x, W.bfloat16(), layer.bias))


def test_the_counts_and_what_does_not_fit():
    assert Bone().trained_count((576, 1536)) == 64 * 576
    assert Bone(variant="bat").trained_count((576, 1536)) == 64 * 576
    assert Bone(variant="mini", mini_rank=32).trained_count((576, 1536)) == 64 * 32
    assert ia.registry.build({"name": "bat", "rank": 4}) == BAT
    assert ia.registry.build({"name": "miss", "rank": 3}) == BONE
    for method, why in (
        (Bone(rank=17), "up: rank=17 is above 16"),
        (Bone(rank=5, variant="bat"), "up: rank=5 does not divide both sides of a 24 x 16 weight"),
        (Bone(rank=2, variant="mini", mini_rank=5), "up: mini_rank=5 does not divide 24"),
    ):
        with pytest.raises(ia.IntarsiaError, match=why):
            ia.attach(small_net(), method)
    with pytest.raises(ia.IntarsiaError, match="variant='bats' must be bone, mini or bat"):
        Bone(variant="bats")


def test_dora_takes_no_change_that_reads_the_weight():
    with pytest.raises(ia.IntarsiaError, match="a method that adds a delta"):
        ia.Dora(inner=BAT)
    model = small_net()
    ia.attach(model, ia.Dora(inner=BONE))
    assert torch.equal(model(some_input()), small_net()(some_input()))
