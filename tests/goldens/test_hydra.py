"""Hydra against its formula, LoRA and PEFT in the special cases; and its bias, which an edit of its own changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

import intarsia as ia
from intarsia.edits import Sequential
from intarsia.interop import peft_lora
from intarsia.methods import Hydra


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10, bias=bias), nn.Tanh(), nn.Linear(10, 4, bias=bias)).double()


def stirred(method, bias=True):
    model = net(bias)
    ia.attach(model, method)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def state_of(model, name="0"):
    return model.get_submodule(name).adapters["default"]


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_papers(bias):
    model, base = stirred(Hydra(2, 3, scale=0.7), bias), net(bias)
    h = X
    for number in ("0", "2"):
        p = state_of(model, number)
        layer = base.get_submodule(number)
        h0 = layer(h)
        h = h0 + 0.7 * (h @ p.D_p.T @ p.U_p.T) + 0.7 * (h0 @ p.D_s.T @ p.U_s.T)
        h = torch.tanh(h) if number == "0" else h
    torch.testing.assert_close(model(X), h, rtol=1e-12, atol=1e-12)


def test_without_the_sequential_branch_it_is_pefts_lora():
    model = stirred(Hydra(2, 0, scale=1.5))
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], lora_dropout=0.0)
    other = get_peft_model(net(), config)
    for name in ("0", "2"):
        layer = other.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = state_of(model, name).D_p.detach().clone()
        layer.lora_B["default"].weight.data = state_of(model, name).U_p.detach().clone()
    torch.testing.assert_close(model(X), other(X), rtol=1e-12, atol=1e-12)


def test_rank_and_spaces_of_the_change():
    model = stirred(Hydra(1, 2))
    W, p = net()[0].weight.detach(), state_of(model)
    change = model.get_submodule("0").adapters["default"].method.fold(p.raw(), W, None)[0] - W
    assert int(torch.linalg.matrix_rank(change)) == 3
    p.U_p.data.zero_()
    behind = p.method.fold(p.raw(), W, None)[0] - W
    onto_columns = p.U_s @ torch.linalg.pinv(p.U_s)
    rows = p.D_s @ W
    onto_rows = torch.linalg.pinv(rows) @ rows
    torch.testing.assert_close(onto_columns @ behind, behind)
    torch.testing.assert_close(behind @ onto_rows, behind)
    nothing, bias = p.method.fold(p.raw(), torch.zeros_like(W), torch.zeros(10, dtype=W.dtype))
    assert not nothing.any()
    assert not bias.any()


def test_count_is_the_formula():
    model = stirred(Hydra(2, 3))
    trained = sum(p.numel() for p in state_of(model).parameters())
    assert trained == 2 * (6 + 10) + 2 * 3 * 10 == Hydra(2, 3).trained_count((10, 6))


def test_the_bias_is_set_in_saved_and_taken_out_again(tmp_path):
    model = stirred(Hydra(2, 3, scale=0.7)).eval()
    expected = model(X)
    folder = ia.save(model, tmp_path / "hydra")
    fresh = net().eval()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    deck = ia.Deck(fresh)
    deck.add(folder)
    deck.use("hydra")
    torch.testing.assert_close(fresh(X), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(deck["hydra"].edits["0.bias"], Sequential)
    p, b = state_of(model), net()[0].bias
    torch.testing.assert_close(fresh[0].bias, b + 0.7 * (p.U_s @ (p.D_s @ b)))
    deck.use("hydra", strength=0.5)
    torch.testing.assert_close(fresh[0].bias, b + 0.35 * (p.U_s @ (p.D_s @ b)))
    deck.off()
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    again = net().eval()
    ia.load(again, folder)
    torch.testing.assert_close(again(X), expected, rtol=0, atol=0)


def test_a_layer_without_a_bias_has_no_edit_of_it():
    model = stirred(Hydra(1, 1), bias=False)
    assert set(ia.model.export(model).edits) == {"0.weight", "2.weight"}


def test_a_bias_that_is_not_there_is_named(tmp_path):
    folder = ia.save(stirred(Hydra(1, 1)), tmp_path / "hydra")
    with pytest.raises(ia.IntarsiaError, match=r"0\.bias: the model has no such weight"):
        ia.Deck(net(bias=False)).add(folder, any_base=True)


def test_a_peft_folder_does_not_take_it(tmp_path):
    model = stirred(Hydra(1, 1))
    adapter = ia.model.export(model)
    ia.activate(model)
    with pytest.raises(ia.IntarsiaError, match=r"changes 0\.bias, and a PEFT folder holds changes of weights alone"):
        peft_lora.write(adapter, model, tmp_path / "out")


def test_the_gradient_of_the_bias_below_counts():
    # An upstream adapter's output goes through the sequential branch as well: dL/dx has both paths.
    model = stirred(Hydra(2, 2))
    x = X.clone().requires_grad_()
    model[0](x).sum().backward()
    layer, p = net()[0], state_of(model)
    W, b = p.method.fold(p.raw(), layer.weight.detach(), layer.bias.detach())
    y = X.clone().requires_grad_()
    folded = F.linear(y, W, b)
    torch.testing.assert_close(folded, model[0](X))
    folded.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
