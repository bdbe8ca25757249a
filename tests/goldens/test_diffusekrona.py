"""DiffuseKronA against torch.kron, its definition entry by entry, and HF PEFT's LoKr with two whole factors."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import intarsia as ia
from intarsia.analyze import spectrum
from intarsia.edits import Kronecker
from intarsia.methods import DiffuseKronA
from small import SITES, small_net, some_input, some_loss, state_of, stir


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_change_is_the_definition_and_the_forward_the_product():
    a1, a2, b1, b2 = 3, 2, 4, 5
    A, B, x = _random(a1, a2), _random(b1, b2, seed=1), _random(2, 7, a2 * b2, seed=2)
    edit = Kronecker((a1 * b1, a2 * b2), A, B, 0.5)
    delta = edit.delta(A)
    for i in range(a1):
        for j in range(a2):
            for p in range(b1):
                for q in range(b2):
                    assert float(delta[i * b1 + p, j * b2 + q]) == float(0.5 * A[i, j] * B[p, q])
    assert torch.equal(delta, 0.5 * torch.kron(A, B))
    torch.testing.assert_close(edit.times(x), F.linear(x, delta), rtol=0, atol=1e-12)


def test_ranks_multiply_and_square_factors_are_of_full_rank():
    A, B = _random(4, 3)[:, :1] @ _random(1, 3), _random(5, 2, seed=1)
    assert int(torch.linalg.matrix_rank(torch.kron(A, B))) == 1 * 2
    full = Kronecker((64, 64), _random(8, 8), _random(8, 8, seed=1), 1.0)
    assert int(torch.linalg.matrix_rank(full.delta(full.A))) == 64
    method = DiffuseKronA(a1=8, a2=8)
    assert method.trained_count((64, 64)) == 8**2 + (64 // 8) ** 2
    expected = torch.linalg.svdvals(full.delta(full.A))
    torch.testing.assert_close(spectrum(full), expected, rtol=1e-10, atol=1e-12)


def test_the_singular_values_of_a_thin_product():
    edit = Kronecker((12, 4), _random(6, 1), _random(2, 4, seed=1), -2.0)
    torch.testing.assert_close(spectrum(edit), torch.linalg.svdvals(edit.delta(edit.A)), rtol=1e-10, atol=1e-12)


def test_the_start():
    """A ~ N(0, 1 / a1^2), B = 0."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 640))
    ia.attach(net, DiffuseKronA(a1=320, a2=32))
    state = state_of(net, "0")
    assert not state.B.any()
    assert float(state.A.detach().std()) == pytest.approx(1 / 320, rel=0.03)


def test_the_same_factors_in_peft_give_the_same():
    """LoKr takes its sizes from its own factorisation; with whole factors (decompose_both off, a rank that is high) s = alpha / r = 1."""
    config = peft.LoKrConfig(r=64, alpha=64, decompose_factor=4, target_modules=list(SITES))
    other: Any = peft.get_peft_model(small_net(), config)
    model, pairs = small_net(), []
    layers = {site: other.get_submodule(f"base_model.model.{site}") for site in SITES}
    for site, layer in layers.items():
        a1, a2 = layer.lokr_w1["default"].shape
        ia.attach(model, DiffuseKronA(a1=a1, a2=a2), targets=site, name=site)
        ia.activate(model)
    with torch.no_grad():
        for site, layer in layers.items():
            stir(model, site, size=0.3)
            state = state_of(model, site, site)
            assert layer.lokr_w2["default"].shape == state.B.shape
            layer.lokr_w1["default"].copy_(state.A)
            layer.lokr_w2["default"].copy_(state.B)
            pairs += [(state.A, layer.lokr_w1["default"]), (state.B, layer.lokr_w2["default"])]
            delta = state.method.edit(state.raw()).delta(torch.zeros(()))
            torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-6, atol=1e-8)
    ia.activate(model, *SITES)
    assert sum(mine.numel() for mine, _ in pairs) == sum(their.numel() for _, their in pairs)
    torch.testing.assert_close(model(some_input()), other(some_input()), rtol=1e-4, atol=2e-6)
    some_loss(model, some_input()).backward()
    some_loss(other, some_input()).backward()
    for mine, their in pairs:
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=2e-6)


def test_what_does_not_divide_is_told_with_what_does():
    with pytest.raises(
        ia.IntarsiaError, match="up: a1=5 does not divide the layer's 24 outputs; the next lower divisor is 4"
    ):
        ia.attach(small_net(), DiffuseKronA(a1=5, a2=2))
    with pytest.raises(
        ia.IntarsiaError, match="up: a2=6 does not divide the layer's 16 inputs; the next lower divisor is 4"
    ):
        ia.attach(small_net(), DiffuseKronA(a1=4, a2=6))


@pytest.mark.parametrize(
    "other",
    [
        Kronecker((24, 16), _random(4, 2), _random(6, 8), 2.0),
        Kronecker((24, 16), _random(2, 4), _random(12, 4), 1.0),
        ia.edits.LowRank((24, 16), _random(24, 2), _random(2, 16), 1.0),
    ],
    ids=["scale", "sizes", "kind"],
)
def test_an_edit_of_another_config_is_refused(other):
    method, site = DiffuseKronA(a1=4, a2=2), ia.site.site_at(small_net(), "up")
    own = Kronecker((24, 16), _random(4, 2), _random(6, 8), 1.0)
    assert torch.equal(method.restore(own, site)["A"].double(), own.A.float().double())
    with pytest.raises(ia.IntarsiaError, match="up: the file has a .* edit that its own config does not make"):
        method.restore(other, site)
