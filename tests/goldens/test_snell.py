"""SNELL and SNELLA against their equations, written out in loops, and against what their authors' code is known to give."""

from __future__ import annotations

import math

import pytest
import torch

import intarsia as ia
from intarsia.edits import Kernel, merge, sparsify
from intarsia.methods import Snell, Snella
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, stir

O, I, Q = 64, 48, 4


def _factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(2, n, Q, generator=generator, dtype=torch.float64) for n in (I, O))
    return A, B


def _attached(method: ia.Method, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (O, I)):
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0]).to(dtype))
    ia.attach(model, method)
    return model, state_of(model, "0")


def _change(model: torch.nn.Module) -> torch.Tensor:
    state = state_of(model, "0")
    change: torch.Tensor = state.method.delta(state.raw())
    return change.detach()


def test_the_kernel_is_its_definition():
    A, B = _factors()
    D = merge(A, B)
    for i in range(0, O, 7):
        for j in range(I):
            first = math.sqrt(sum(float(B[0, i, k] - A[0, j, k]) ** 2 for k in range(Q)))
            second = math.sqrt(sum(float(B[1, i, k] - A[1, j, k]) ** 2 for k in range(Q)))
            assert float(D[i, j]) == pytest.approx(0.1 * first - 0.1 * second, abs=1e-14)


def test_swapped_pieces_negate_and_equal_pieces_give_zero():
    A, B = _factors()
    assert torch.equal(merge(A.flip(0), B.flip(0)), -merge(A, B))
    assert not merge(A[:1].expand(2, -1, -1), B[:1].expand(2, -1, -1)).any()


def test_the_rank_is_full_before_and_after():
    """64 x 48 with r = 8: rank 48, where LoRA of the same count has 8."""
    A, B = _factors()
    D = merge(A, B)
    assert int(torch.linalg.matrix_rank(D)) == 48
    assert int(torch.linalg.matrix_rank(sparsify(D, math.ceil(0.9 * O * I), "soft"))) == 48
    assert int(torch.linalg.matrix_rank(merge(A, B, "linear"))) == 8


@pytest.mark.parametrize("rule", ["soft", "square", "hard"])
@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.99])
def test_the_number_of_zeros(rule, sparsity):
    A, B = _factors()
    zeros = math.ceil(sparsity * O * I)
    found = sparsify(merge(A, B), zeros, rule)
    assert int((found == 0).sum()) == zeros
    assert Snell(sparsity=sparsity).zeros_at((O, I)) == zeros


def test_the_threshold_of_the_authors_code_zeroes_one_less():
    """torch.quantile at 0.9 of 64 x 48: floor(0.9 (3072 - 1)) + 1 = 2764; the paper's rule: ceil(0.9 * 3072) = 2765."""
    size = merge(*_factors()).abs()
    assert int((size <= torch.quantile(size.flatten(), 0.9)).sum()) == 2764
    assert int((sparsify(size, math.ceil(0.9 * O * I), "soft") == 0).sum()) == 2765


@pytest.mark.parametrize("rule", ["soft", "square", "hard"])
def test_the_values_and_the_gradient(rule):
    """Equation 5 and its kin entry by entry: survivors get factor * g, and those that are 0 get nothing."""
    D = merge(*_factors()).requires_grad_()
    zeros = 2000
    t = sorted(D.detach().abs().flatten().tolist())[zeros - 1]
    found = sparsify(D, zeros, rule)
    g = torch.randn(O, I, dtype=torch.float64)
    found.backward(g)
    assert D.grad is not None
    for i in range(0, O, 5):
        for j in range(I):
            d = float(D.detach()[i, j])
            factor = {"soft": max(abs(d) - t, 0), "square": abs(d) * (abs(d) > t), "hard": float(abs(d) > t)}[rule]
            assert float(found.detach()[i, j]) == pytest.approx(d * factor, abs=1e-15)
            assert float(D.grad[i, j]) == pytest.approx(factor * float(g[i, j]), abs=1e-15)


def test_without_a_threshold_the_factor_would_square():
    """Why ``sparsity=0`` leaves the rule out: at t = 0 it gives d |d|, not d."""
    D = merge(*_factors())
    assert torch.equal(sparsify(D, 0, "soft"), D * D.abs())
    model, state = _attached(Snell(sparsity=0.0))
    assert torch.equal(_change(model), merge(state.A, state.B).detach())


def test_the_linear_kernel_is_lora():
    """D = B A^T: the same output and gradients as LoRA with alpha = r and the factors side by side."""
    snell, state = _attached(Snell(kernel="linear", sparsity=0.0))
    lora, other = _attached(ia.Lora(8, 8.0))
    with torch.no_grad():
        lora[0].weight.copy_(snell[0].weight)
        lora[0].bias.copy_(snell[0].bias)
        other.A.copy_(torch.cat([state.A[0], state.A[1]], 1).T)
        other.B.copy_(torch.cat([state.B[0], state.B[1]], 1))
    x = some_input(torch.float64, 5, I)
    torch.testing.assert_close(snell(x), lora(x), rtol=0, atol=1e-13)
    for model in (snell, lora):
        model(x).sin().sum().backward()
    torch.testing.assert_close(torch.cat([state.A.grad[0], state.A.grad[1]], 1).T, other.A.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([state.B.grad[0], state.B.grad[1]], 1), other.B.grad, rtol=0, atol=1e-12)


def test_it_starts_as_its_authors_do():
    """A ~ U(-1, 1) / sqrt(I r / 2) and B ~ U(-1, 1) / sqrt(O r / 2); the first change is tiny, and not 0."""
    model, state = _attached(Snell(), torch.float32, (400, 300))
    for factor, n in ((state.A, 300), (state.B, 400)):
        bound = 1 / math.sqrt(n * 4)
        assert 0.99 * bound < float(factor.detach().abs().max()) <= bound
        assert float(factor.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert 0 < float(_change(model).abs().max()) < 1e-4
    assert 0 < float(merge(state.A, state.B).detach().abs().max()) < 1e-2


@pytest.mark.parametrize("name", ["snell", "snella"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_zero_start_is_the_base_to_the_bit(name, dtype):
    model, x = small_net(dtype), some_input(dtype)
    before = model(x)
    ia.attach(model, ia.registry.build({"name": name, "rank": 4, "zero_start": True}))
    assert torch.equal(model(x), before)
    stir(model)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["snell", "snella"])
def test_nothing_dense_is_kept_for_backward(name):
    """Between forward and backward: x, the factors, and what the base layer keeps; no tensor of O x I."""
    model, state = _attached(ia.registry.build({"name": name, "rank": 4}), torch.float32, (96, 80))
    there = {t.untyped_storage().data_ptr() for t in model.parameters()}
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    x = some_input(torch.float32, 3, 80).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert kept
    assert max(kept) == x.untyped_storage().nbytes() < 96 * 80 * 4
    y.sum().backward()
    assert state.A.grad.any()


def test_the_count_is_that_of_lora():
    for shape in ((64, 48), (4096, 11008)):
        assert Snell(rank=8).trained_count(shape) == ia.Lora(8).trained_count(shape)
        assert Snella(rank=8).trained_count(shape) == 8 * sum(shape) + 3


def test_the_mixed_kernel_is_its_definition():
    A, B = _factors()
    D = merge(A, B)
    alpha, gamma, beta = 0.7, 1.3, -0.02
    found = merge(A, B, mix=torch.tensor([alpha, gamma, beta], dtype=torch.float64))
    for j in range(0, I, 5):
        exps = [math.exp(float(D[i, j]) / gamma) for i in range(O)]
        for i in range(0, O, 9):
            expected = float(D[i, j]) + alpha * exps[i] / sum(exps) + beta
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-14)


def test_the_mixed_kernel_with_nothing_mixed_in_is_the_plain_one():
    A, B = _factors()
    assert torch.equal(merge(A, B, mix=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)), merge(A, B))


def test_a_saved_kernel_is_two_thin_factors_and_folds_to_the_same_change(tmp_path):
    model = small_net()
    ia.attach(model, Snell(rank=4))
    stir(model, size=0.3)
    adapter = ia.read(ia.save(model, tmp_path / "a"))
    for site in SITES:
        edit, state = adapter.edits[f"{site}.weight"], state_of(model, site)
        assert isinstance(edit, Kernel)
        assert sum(t.numel() for t in edit.tensors().values()) == 4 * sum(edit.shape)
        assert torch.equal(edit.delta(layer_of(model, site).weight), state.method.delta(state.raw()))
        quick = edit.sparse()
        assert torch.equal(quick.delta(layer_of(model, site).weight), edit.delta(layer_of(model, site).weight))
        assert edit.touched == quick.touched == int((edit.delta(layer_of(model, site).weight) != 0).sum())


@pytest.mark.parametrize("target", ["dense", "sparse"])
def test_the_kernel_fits_better_than_a_low_rank_product(target):
    """The paper's figure 4a in small, at equal count: a dense Gaussian target, and one with 10 % of its entries (hard rule)."""
    torch.manual_seed(0)
    n = 64
    goal = torch.randn(n, n)
    zeros = 0
    if target == "sparse":
        goal = goal * (torch.rand(n, n) < 0.1)
        zeros = math.ceil(0.9 * n * n)
    errors = {}
    for kernel in ("distance", "linear"):
        A = torch.nn.Parameter(torch.randn(2, n, 4) * 0.5)
        B = torch.nn.Parameter(torch.randn(2, n, 4) * 0.5)
        gain = torch.nn.Parameter(torch.tensor(10.0 if kernel == "distance" else 1.0))
        optimizer = torch.optim.Adam([A, B, gain], lr=2e-2)
        loss = torch.zeros(())
        for _ in range(1500):
            loss = (gain * sparsify(merge(A, B, kernel), zeros, "hard" if zeros else "none") - goal).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors[kernel] = float(loss.detach())
    assert errors["distance"] < errors["linear"]


def test_training_lowers_the_loss():
    for name in ("snell", "snella"):
        model = small_net()
        ia.attach(model, ia.registry.build({"name": name, "rank": 4, "rule": "hard"}))
        x = some_input()
        first = float(some_loss(model, x).detach())
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(40):
            optimizer.zero_grad()
            some_loss(model, x).backward()
            optimizer.step()
        assert float(some_loss(model, x).detach()) < 0.7 * first
