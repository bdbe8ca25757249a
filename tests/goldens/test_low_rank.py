"""LoRA, rsLoRA and DoRA against their papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import intarsia as ia
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, stir


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
def test_scale(rank):
    assert ia.Lora(rank=rank, alpha=7.0).scale == 7.0 / rank
    assert ia.Lora(rank=rank, alpha=7.0, scaling="rslora").scale == 7.0 / math.sqrt(rank)
    assert ia.Lora(rank=rank).scale == 2.0


def test_rslora_is_lora_with_another_alpha():
    """rsLoRA(alpha, r) = LoRA(alpha sqrt(r), r): output and gradients to the bit, r a power of four."""
    models = [adapted(ia.Lora(4, 6.0, "rslora"), torch.float64), adapted(ia.Lora(4, 12.0), torch.float64)]
    losses = [some_loss(model, some_input(torch.float64)) for model in models]
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for site in SITES:
        for name in ("A", "B"):
            one, other = (getattr(state_of(model, site), name).grad for model in models)
            assert torch.equal(one, other)


def test_rslora_steps_do_not_shrink_with_the_rank():
    """One SGD step from B = 0, fixed rate: ||dy|| over random A stays as it is for rsLoRA, falls as 1 / r for LoRA."""
    sizes = {}
    x = some_input(torch.float64, 1, 256)  # one token: dy = s^2 lr |A x|^2 gy, nothing that averages
    for scaling in ("rslora", "lora"):
        for rank in (4, 64, 256):
            norms = []
            for seed in range(8):
                model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False).double())
                before = model(x)
                ia.attach(model, ia.Lora(rank, 16.0, scaling), seed=seed)
                (model(x) * some_input(torch.float64, 1, 256, seed=9)).sum().backward()
                state = state_of(model, "0")
                with torch.no_grad():
                    state.B.sub_(1e-3 * state.B.grad)
                    norms.append(float((model(x) - before).norm()))
            sizes[scaling, rank] = sum(norms) / len(norms)
    for rank in (64, 256):
        assert sizes["rslora", rank] / sizes["rslora", 4] == pytest.approx(1.0, rel=0.25)
        assert sizes["lora", rank] / sizes["lora", 4] == pytest.approx(4 / rank, rel=0.25)


def test_lora_starts_as_its_authors_do():
    """A ~ U(-1/sqrt(I), 1/sqrt(I)), which is Kaiming uniform with a = sqrt(5); B = 0."""
    model = torch.nn.Sequential(torch.nn.Linear(400, 30))
    ia.attach(model, ia.Lora(16))
    A, B = state_of(model, "0").A.detach(), state_of(model, "0").B
    assert not B.any()
    assert 0.99 / 20 < A.abs().max() <= 1 / 20
    assert float(A.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    assert A.mean().abs() < 0.002


def _dora(detach: bool) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stirred DoRA layer, its V = W + s B A, and dL/dV by its own rule and by plain autograd through W' = m V / c."""
    model = adapted(ia.Dora(ia.Lora(2), detach_norm=detach), torch.float64, targets="up")
    layer, state = layer_of(model, "up"), state_of(model, "up")
    x, gy = some_input(torch.float64, 9, 16), some_input(torch.float64, 9, 24, seed=4)
    V = (layer.weight + 2.0 * state.B @ state.A).detach().requires_grad_()
    c = V.norm(dim=1, keepdim=True)
    whole = state.magnitude[:, None] * V / (c.detach() if detach else c)
    y = F.linear(x, whole, layer.bias)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    dense = whole.detach().requires_grad_()
    F.linear(x, dense, layer.bias).backward(gy)
    layer(x).backward(gy)
    y.backward(gy, inputs=[V])
    assert V.grad is not None
    assert dense.grad is not None
    return model, V, V.grad, dense.grad


def test_the_full_gradient_of_dora_is_orthogonal_to_its_direction():
    model, V, gradient, _ = _dora(detach=False)
    torch.testing.assert_close((gradient * V).sum(1), torch.zeros(24, dtype=torch.float64), rtol=0, atol=1e-12)
    state = state_of(model, "up")
    torch.testing.assert_close(state.B.grad, 2.0 * gradient @ state.A.T, rtol=0, atol=1e-11)
    torch.testing.assert_close(state.A.grad, 2.0 * state.B.T @ gradient, rtol=0, atol=1e-11)


def test_the_gradient_of_dora_takes_the_norm_as_a_constant():
    """dL/dV = (m / c) dL/dW', and dL/dm = <dL/dW', V> / c. A norm that is not detached passes every law but this."""
    model, V, _, whole = _dora(detach=True)
    state, c = state_of(model, "up"), V.detach().norm(dim=1)
    gradient = (state.magnitude / c)[:, None] * whole
    torch.testing.assert_close(state.B.grad, 2.0 * gradient @ state.A.T, rtol=0, atol=1e-11)
    torch.testing.assert_close(state.A.grad, 2.0 * state.B.T @ gradient, rtol=0, atol=1e-11)
    torch.testing.assert_close(state.magnitude.grad, (whole * V.detach()).sum(1) / c, rtol=0, atol=1e-11)


@pytest.mark.parametrize("inner", [ia.Lora(2), ia.Shira(density=0.1), ia.Paca(2)], ids=lambda m: m.name)
def test_row_norms_of_dora_are_its_magnitude(inner):
    model = adapted(ia.Dora(inner), torch.float64)
    for site in SITES:
        state = state_of(model, site)
        W, _ = state.method.fold(state.raw(), layer_of(model, site).weight, None)
        torch.testing.assert_close(W.norm(dim=1), state.magnitude.abs(), rtol=1e-12, atol=0)


def test_dora_with_the_norms_of_its_inner_method_is_the_inner_method():
    lora, dora = small_net(torch.float64), small_net(torch.float64)
    ia.attach(lora, ia.Lora(2))
    stir(lora)
    ia.attach(dora, ia.Dora(ia.Lora(2)))
    with torch.no_grad():
        for site in SITES:
            mine, theirs = state_of(dora, site), state_of(lora, site)
            mine.A.copy_(theirs.A)
            mine.B.copy_(theirs.B)
            mine.magnitude.copy_((layer_of(lora, site).weight + 2.0 * theirs.B @ theirs.A).norm(dim=1))
    x = some_input(torch.float64)
    torch.testing.assert_close(dora(x), lora(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dora_lengths_train_in_float32_on_a_half_base(dtype):
    """A change of a length by 3/1000 is less than bfloat16's last place, and must not be lost in the forward."""
    model, x = small_net(dtype), some_input(dtype)
    ia.attach(model, ia.Dora(ia.Lora(2)), targets="up")
    layer = layer_of(model, "up")
    W, _ = state_of(model, "up").method.fold(state_of(model, "up").raw(), layer.weight.float(), None)
    before = layer(x)
    with torch.no_grad():
        state_of(model, "up").magnitude.mul_(1.003)
    after = layer(x)
    assert not torch.equal(after, before)
    exact = F.linear(x.float(), W * 1.003, layer.bias.float())
    assert (after.float() - exact).abs().mean() < (before.float() - exact).abs().mean()
