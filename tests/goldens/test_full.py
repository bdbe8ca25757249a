"""Full fine-tuning against a copy of the net whose weights torch trains itself."""

from __future__ import annotations

import copy

import pytest
import torch

import intarsia as ia
from intarsia import optim
from intarsia.methods import Full
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, trained


def optimizers(params: list[torch.nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    return {
        "sgd": torch.optim.SGD(params, lr=0.5, momentum=0.9),
        "adamw": torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0),
        "galore": optim.GaLore(params, lr=1e-2, rank=3, gap=3),
        "fira": optim.Fira(params, lr=1e-2, rank=3, gap=3),
        "frugal": optim.Frugal(params, lr=1e-2, gap=3),
    }


@pytest.mark.parametrize("name", ["sgd", "adamw", "galore", "fira", "frugal"])
def test_it_trains_the_weight_as_torch_does_and_the_gradient_is_the_weights(name):
    plain = small_net(torch.float64)
    for site in SITES:
        layer_of(plain, site).bias.requires_grad_(False)
    adapted = small_net(torch.float64)
    ia.attach(adapted, Full())
    steps = [(net, optimizers(trained(net))[name]) for net in (plain, adapted)]
    for step in range(8):
        for net, optimizer in steps:
            optimizer.zero_grad()
            some_loss(net, some_input(torch.float64, seed=step)).backward()
        for site in SITES:
            torch.testing.assert_close(
                state_of(adapted, site).values.grad, layer_of(plain, site).weight.grad, rtol=0, atol=1e-11
            )
        for _, optimizer in steps:
            optimizer.step()
        for site in SITES:
            torch.testing.assert_close(layer_of(adapted, site).weight, layer_of(plain, site).weight, rtol=0, atol=1e-10)
    moved = layer_of(adapted, "up").weight - layer_of(small_net(torch.float64), "up").weight
    assert float(moved.detach().abs().max()) > 1e-3


def test_the_base_returns_to_the_bit_and_the_file_has_the_change(tmp_path):
    model, before = small_net(torch.bfloat16), copy.deepcopy(small_net(torch.bfloat16).state_dict())
    ia.attach(model, Full())
    optimizer = optim.GaLore(trained(model), lr=0.1, rank=3)
    for step in range(3):
        optimizer.zero_grad()
        some_loss(model, some_input(torch.bfloat16, seed=step)).backward()
        optimizer.step()
    y = model(some_input(torch.bfloat16))
    ia.save(model, tmp_path / "full")
    ia.detach(model, "default")
    assert all(torch.equal(model.state_dict()[key], t) for key, t in before.items())
    adapter = ia.read(tmp_path / "full")
    assert {edit.kind for edit in adapter.edits.values()} == {"rows"}
    ia.load(model, tmp_path / "full")
    assert torch.equal(model(some_input(torch.bfloat16)), y)
