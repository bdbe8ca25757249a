"""The same weights in HF PEFT give the same output and the same gradients."""

from __future__ import annotations

import functools
from typing import Any

import peft
import pytest
import torch
from peft.tuners.shira.layer import ShiraLayer

import intarsia as ia
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, stir, trained

# float32 through three layers, summed in another order
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-6)


def _theirs(config: Any) -> torch.nn.Module:
    model: torch.nn.Module = peft.get_peft_model(small_net(), config)
    return model


def _their_layer(model: torch.nn.Module, site: str) -> Any:
    return model.get_submodule(f"base_model.model.{site}")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ia.Lora(rank=3, alpha=5.0), {"r": 3, "lora_alpha": 5}),
        (ia.Lora(rank=4), {"r": 4, "lora_alpha": 8}),
        (ia.Lora(rank=3, alpha=5.0, scaling="rslora"), {"r": 3, "lora_alpha": 5, "use_rslora": True}),
        (ia.Dora(ia.Lora(rank=3, alpha=5.0)), {"r": 3, "lora_alpha": 5, "use_dora": True}),
    ],
    ids=["lora", "lora-default-alpha", "rslora", "dora"],
)
def test_low_rank_methods_equal_peft(ours, theirs):
    model = small_net()
    ia.attach(model, ours)
    stir(model)
    other = _theirs(peft.LoraConfig(target_modules=list(SITES), **theirs))
    pairs = []
    for site in SITES:
        state, layer = state_of(model, site), _their_layer(other, site)
        pairs += [(state.A, layer.lora_A["default"].weight), (state.B, layer.lora_B["default"].weight)]
        if theirs.get("use_dora"):
            pairs.append((state.magnitude, layer.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for mine, their in pairs:
            their.copy_(mine)
    x, x_other = (some_input().requires_grad_() for _ in range(2))
    close(model(x), other(x_other))
    some_loss(model, x).backward()
    some_loss(other, x_other).backward()
    close(x.grad, x_other.grad)
    for mine, their in pairs:
        assert mine.grad is not None
        assert mine.grad.abs().max() > 1e-4  # or there is nothing to compare
        close(mine.grad, their.grad)
    assert sum(p.numel() for p in trained(model)) == sum(p.numel() for p in trained(other))


def test_dora_starts_with_the_magnitude_of_peft():
    model = small_net()
    ia.attach(model, ia.Dora(ia.Lora(rank=2)))
    other = _theirs(peft.LoraConfig(target_modules=list(SITES), r=2, use_dora=True))
    for site in SITES:
        theirs = _their_layer(other, site).lora_magnitude_vector["default"].weight
        close(state_of(model, site).magnitude, theirs, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("branch", [False, True], ids=["live", "branch"])
def test_shira_equals_peft(branch):
    model = small_net()
    ia.attach(model, ia.Shira(density=40 / 384, scale=1.0))
    other = _theirs(peft.ShiraConfig(r=1, random_seed=7, init_weights=False, target_modules=list(SITES)))
    state = ia.adapter_state(model, "default")
    for site in SITES:
        layer: ShiraLayer = _their_layer(other, site)
        row, column = layer.shira_indices["default"].long()
        state[f"{site}/index"] = row * layer.in_features + column
        state[f"{site}/values"] = layer.shira_weight["default"].detach()
        assert state[f"{site}/values"].abs().min() > 0
    ia.load_adapter_state(model, "default", state)
    if branch:  # stacked on another, a sparse adapter computes beside the base
        ia.attach(model, ia.Lora(rank=1), name="under")
        ia.activate(model, "under", "default")
        assert all(layer_of(model, site).live is None for site in SITES)
    x, x_other = (some_input().requires_grad_() for _ in range(2))
    with torch.sparse.check_sparse_tensor_invariants(True):  # torch warns where one says neither yes nor no
        close(model(x), other(x_other))
        some_loss(model, x).backward()
        some_loss(other, x_other).backward()
    close(x.grad, x_other.grad)
    for site in SITES:
        mine, theirs = state_of(model, site).values.grad, _their_layer(other, site).shira_weight["default"].grad
        assert mine.abs().max() > 1e-3
        close(mine, theirs)
