"""PaCA against the columns of dense gradients and against LoRA with a one-hot A."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import intarsia as ia
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, stir, trained, weights

STEPS = 50


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16), (2, 3, 2, 16)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parameterization", ["delta", "columns"])
@pytest.mark.parametrize("alpha", [12.0, 5.0])
def test_gradient_is_columns_of_the_dense_gradient_exactly(shape, bias, parameterization, alpha):
    """grad = s G[:, I] in float64, and dL/dx is the dense layer's to the bit: the same products of the same numbers."""
    model = small_net(torch.float64, bias)
    layer = layer_of(model, "up")
    ia.attach(model, ia.Paca(rank=3, alpha=alpha, parameterization=parameterization), targets="up")
    stir(model)
    dense = layer.weight.detach().clone().requires_grad_()
    x, gy = some_input(torch.float64, *shape), some_input(torch.float64, *shape[:-1], 24, seed=3)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, reference = layer(mine), F.linear(theirs, dense, layer.bias)
    assert torch.equal(y, reference)
    y.backward(gy)
    reference.backward(gy)
    assert dense.grad is not None
    assert mine.grad is not None
    assert theirs.grad is not None
    assert torch.equal(mine.grad, theirs.grad)
    state = state_of(model, "up")
    # The matrix product sums the same terms, in blocks that may depend on the number of columns: 1e-15, not the bit.
    torch.testing.assert_close(state.values.grad, alpha / 3 * dense.grad[:, state.index], rtol=1e-14, atol=1e-15)


def test_delta_trains_as_lora_with_a_one_hot_frozen_A():
    """B is D and s is alpha / r: the same trajectory over 50 AdamW steps, weight decay included."""
    paca, lora = small_net(torch.float64), small_net(torch.float64)
    ia.attach(paca, ia.Paca(rank=3, alpha=6.0))
    ia.attach(lora, ia.Lora(rank=3, alpha=6.0))
    with torch.no_grad():
        for site in SITES:
            A = state_of(lora, site).A
            A.zero_()[torch.arange(3), state_of(paca, site).index] = 1.0
            A.requires_grad_(False)
    optimizers = [torch.optim.AdamW(trained(model), lr=3e-3, weight_decay=0.1) for model in (paca, lora)]
    x = some_input(torch.float64, 8, 16)
    for step in range(STEPS):
        x = some_input(torch.float64, 8, 16, seed=step)
        for model, optimizer in zip((paca, lora), optimizers, strict=True):
            optimizer.zero_grad()
            some_loss(model, x).backward()
            optimizer.step()
        for site in SITES:
            torch.testing.assert_close(state_of(paca, site).values, state_of(lora, site).B, rtol=0, atol=1e-12)
    assert state_of(paca, "up").values.abs().max() > 0.03
    torch.testing.assert_close(paca(x), lora(x), rtol=0, atol=1e-12)
    start = weights(small_net(torch.float64))
    for site, found in weights(paca).items():
        index = state_of(paca, site).index
        change = found - start[site]
        outside = torch.ones(change.shape[1], dtype=torch.bool).index_fill(0, index, False)
        assert torch.equal(found[:, outside], start[site][:, outside])
        assert int(torch.linalg.matrix_rank(change, rtol=1e-10)) <= 3
    kept = [entry for state in optimizers[0].state.values() for key, entry in state.items() if key != "step"]
    assert sum(entry.numel() for entry in kept) == 2 * 3 * (24 + 16 + 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [6.0, 5.0, None])
def test_columns_start_exactly_whatever_the_scale(dtype, alpha):
    """The card promises this for powers of two; here it holds for every scale."""
    model, x = small_net(dtype), some_input(dtype)
    before = model(x)
    ia.attach(model, ia.Paca(rank=3, alpha=alpha, parameterization="columns"))
    assert torch.equal(model(x), before)
    for site, weight in weights(small_net(dtype)).items():
        assert torch.equal(layer_of(model, site).weight, weight)
        state, wide = state_of(model, site), weight.float()
        s = 5 / 3 if alpha == 5.0 else (2.0 if alpha else ia.Paca(rank=3).scale_at(tuple(weight.shape)))
        torch.testing.assert_close(state.values * s, wide[:, state.index], rtol=1e-6, atol=0)


def test_columns_and_delta_take_the_same_steps():
    """One plain SGD step moves W by s^2 lr G[:, I] in both, and weight decay is where they part."""
    start = weights(small_net(torch.float64))
    found = {}
    for parameterization in ("delta", "columns"):
        for decay in (0.0, 0.1):
            model = small_net(torch.float64)
            ia.attach(model, ia.Paca(rank=3, alpha=6.0, parameterization=parameterization))
            optimizer = torch.optim.SGD(trained(model), lr=0.1, weight_decay=decay)
            some_loss(model, some_input(torch.float64)).backward()
            optimizer.step()
            found[parameterization, decay] = weights(model)["up"], state_of(model, "up").index
    dense = small_net(torch.float64)
    some_loss(dense, some_input(torch.float64)).backward()
    gradient = layer_of(dense, "up").weight.grad
    expected = start["up"].clone()
    index = found["delta", 0.0][1]
    expected[:, index] -= 2.0**2 * 0.1 * gradient[:, index]
    for parameterization in ("delta", "columns"):
        torch.testing.assert_close(found[parameterization, 0.0][0], expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(found["delta", 0.1][0], expected, rtol=0, atol=1e-13)  # decay of zero is zero
    shrunk = expected.clone()
    shrunk[:, index] -= 2.0 * 0.1 * 0.1 * start["up"][:, index] / 2.0
    torch.testing.assert_close(found["columns", 0.1][0], shrunk, rtol=0, atol=1e-13)


@pytest.mark.parametrize("branch", ["live", "lora"])
def test_numbers_kept_for_backward(branch):
    """PaCA keeps T r of x; LoRA keeps x and A x: T (I + r)."""
    model, x = small_net(), some_input(torch.float32, 7, 16).requires_grad_()
    ia.attach(model, ia.Paca(rank=3) if branch == "live" else ia.Lora(rank=3), targets="up")
    layer = layer_of(model, "up")
    there = {
        t.untyped_storage().data_ptr() for t in (layer.weight, layer.bias, *state_of(model, "up").tensors().values())
    }
    kept = {}

    def pack(tensor):
        if (address := tensor.untyped_storage().data_ptr()) not in there:
            kept[address] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(kept.values()) == (7 * 3 if branch == "live" else 7 * (16 + 3))


@pytest.mark.parametrize("select", ["weight_norm", "grad_norm"])
def test_columns_are_chosen_by_norm(select):
    batches = [some_input(seed=1), some_input(seed=2)]
    model, dense = small_net(), small_net()
    ia.attach(model, ia.Paca(rank=3, select=select), data=batches, loss=some_loss)
    for x in batches:
        some_loss(dense, x).backward()
    for site in SITES:
        weight = layer_of(dense, site).weight
        norms = (weight if select == "weight_norm" else weight.grad).detach().norm(dim=0)
        assert state_of(model, site).index.tolist() == sorted(norms.topk(3).indices.tolist())
