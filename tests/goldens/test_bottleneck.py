"""Bottleneck adapters against the formula of the authors' code, and what they are where nothing bends: LoRA and weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intarsia as ia
from intarsia.methods import Bottleneck
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of

ACTIVATIONS: dict[str, Any] = {
    "tanh": nn.Tanh(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "identity": nn.Identity(),
}


class Authors(nn.Module):
    """A layer as the code of LLM-Adapters (AGI-Edgerunners/LLM-Adapters) computes it, by its adapter_type and scaling: the formula
    written down here once more, not its code."""

    def __init__(self, layer: nn.Linear, adapter_type: str, state: Any, activation: str, scaling: float) -> None:
        super().__init__()
        self.layer, self.adapter_type, self.scaling = layer, adapter_type, scaling
        self.act_fn = ACTIVATIONS[activation]
        self.adapter_down = nn.Linear(state.down.shape[1], state.down.shape[0], bias=False)
        self.adapter_up = nn.Linear(state.up.shape[1], state.up.shape[0], bias=False)
        self.adapter_down.weight = nn.Parameter(state.down.detach().clone())
        self.adapter_up.weight = nn.Parameter(state.up.detach().clone())

    def forward(self, x: Tensor) -> Any:
        weight, bias = self.layer.weight.detach(), self.layer.bias.detach()
        if self.adapter_type == "mh_adapter":
            residual = x
            output = self.adapter_up(self.act_fn(self.adapter_down(x))) * self.scaling
            return F.linear(output + residual, weight, bias)
        if self.adapter_type == "output_adapter":
            result = F.linear(x, weight, bias)
            residual = result
            output = self.adapter_up(self.act_fn(self.adapter_down(result))) * self.scaling
            return output + residual
        result = F.linear(x, weight, bias)
        return result + self.adapter_up(self.act_fn(self.adapter_down(x))) * self.scaling


TYPES = {"before": "mh_adapter", "after": "output_adapter", "parallel": "parallel_adapter"}


@pytest.mark.parametrize("place", TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_gradients_are_the_authors(place, activation):
    model = adapted(Bottleneck(4, place, activation, scale=1.5), torch.float64)
    theirs = small_net(torch.float64)
    for site in SITES:
        layer = Authors(layer_of(theirs, site), TYPES[place], state_of(model, site), activation, 1.5)
        theirs.set_submodule(site, layer)
    found, expected = (some_loss(net, some_input(torch.float64)) for net in (model, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    expected.backward()
    for site in SITES:
        state, other = state_of(model, site), layer_of(theirs, site)
        torch.testing.assert_close(state.down.grad, other.adapter_down.weight.grad, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(state.up.grad, other.adapter_up.weight.grad, rtol=1e-9, atol=1e-14)


def test_a_trained_scale_multiplies_what_is_added():
    model, other = (adapted(Bottleneck(4, scale=2.0, train_scale=trains), torch.float64) for trains in (True, False))
    for site in SITES:
        state, plain = state_of(model, site), state_of(other, site)
        with torch.no_grad():
            state.gain.fill_(0.25)
            state.down.copy_(plain.down)
            state.up.copy_(4 * plain.up)
    torch.testing.assert_close(
        model(some_input(torch.float64)), other(some_input(torch.float64)), rtol=1e-12, atol=1e-14
    )


# ------------------------------------------------------------------ where nothing bends
def test_without_an_activation_the_parallel_one_is_a_lora():
    model, lora = adapted(Bottleneck(4, activation="identity", scale=1.5), torch.float64), small_net(torch.float64)
    ia.attach(lora, ia.Lora(4, alpha=6.0))  # alpha / r = 1.5
    with torch.no_grad():
        for site in SITES:
            state, theirs = state_of(model, site), state_of(lora, site)
            theirs.A.copy_(state.down)
            theirs.B.copy_(state.up)
    torch.testing.assert_close(
        model(some_input(torch.float64)), lora(some_input(torch.float64)), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("place", ["after", "before"])
@pytest.mark.parametrize("through_a_deck", [False, True])
def test_without_an_activation_series_are_products_of_weights(place, through_a_deck):
    """After: (I + s Up Down) W, and the bias too; before: W (I + s Up Down)."""
    model = adapted(Bottleneck(4, place, "identity", scale=0.5), torch.float64).eval()
    x, layer, state = some_input(torch.float64), layer_of(model, "up"), state_of(model, "up")
    W, b = layer.weight.detach(), layer.bias.detach()
    P = torch.eye(24 if place == "after" else 16, dtype=torch.float64) + 0.5 * state.up @ state.down
    expected = F.linear(x, P @ W, P @ b) if place == "after" else F.linear(x, W @ P, b)
    if through_a_deck:
        deck = ia.Deck(small_net(torch.float64))
        deck.add(a=ia.export(model))
        deck.use("a")
        layer = layer_of(deck.model, "up")
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-13)


# ------------------------------------------------------------------ start and count
def test_mam_starts_as_the_base_and_bert_does_not():
    x = some_input()
    for start, same in (("mam", True), ("bert", False)):
        for place in TYPES:
            net = small_net()
            before = net(x)
            ia.attach(net, Bottleneck(8, place, start=start))
            assert torch.equal(net(x), before) is same, (start, place)


def test_starts_are_those_of_the_authors():
    model = nn.Sequential(nn.Linear(400, 300))
    ia.attach(model, Bottleneck(32))
    down, bound = state_of(model, "0").down.detach(), 1 / math.sqrt(400)
    assert not state_of(model, "0").up.any()
    assert float(down.abs().max()) <= bound
    assert float(down.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    model = nn.Sequential(nn.Linear(400, 300))
    ia.attach(model, Bottleneck(32, start="bert"))
    down, up = (getattr(state_of(model, "0"), name).detach() for name in ("down", "up"))
    for matrix in (down, up):
        assert float(matrix.std()) == pytest.approx(0.02, rel=0.03)
        assert abs(float(matrix.mean())) < 0.001
    assert float((down.flatten()[:9600] * up.flatten()).mean()) == pytest.approx(0, abs=2e-5)  # not the same draws


@pytest.mark.parametrize(
    ("place", "count"), [("after", 2 * 5 * 24), ("before", 2 * 5 * 16), ("parallel", 5 * (16 + 24))]
)
def test_counts_are_the_formulas(place, count):
    assert Bottleneck(5, place).trained_count((24, 16)) == count
    assert Bottleneck(5, place, train_scale=True).trained_count((24, 16)) == count + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 0), ("place", "above"), ("activation", "swish"), ("start", "zero"), ("scale", 0.0), ("scale", math.inf)],
)
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(ia.IntarsiaError, match=f"bottleneck: {field}="):
        Bottleneck(**{field: value})


@pytest.mark.parametrize(
    "other",
    [
        {"width": 4},
        {"place": "after"},
        {"activation": "relu"},
        {"scale": 2.0},
        {"train_scale": True},
        {"name": "lora", "rank": 3},
    ],
)
def test_a_file_of_another_config_is_refused(other, tmp_path):
    saved = ia.export(adapted(Bottleneck(3)), called="a")
    config = other if "name" in other else dict(saved.method) | other
    ia.store.write(dataclasses.replace(saved, method=config), tmp_path / "a")
    model = small_net()
    with pytest.raises(ia.IntarsiaError, match=r"up: the file has .*config"):
        ia.load(model, tmp_path / "a")
    assert type(layer_of(model, "up")) is nn.Linear


# ------------------------------------------------------------------ what the bend is for
def _left(method: ia.Method, target: nn.Module) -> float:
    """Share of a correction of a layer that is left after training, by squares."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=g)
    model = nn.Sequential(nn.Linear(16, 16))
    base = model(x).detach()
    with torch.no_grad():
        wanted = target(x)
    ia.attach(model, method)
    loss, optimizer = torch.zeros(()), torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (model(x) - base - wanted).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach() / wanted.square().mean())


def test_it_learns_a_correction_that_bends_and_ties_with_lora_on_one_that_does_not():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        down, up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
        nn.init.normal_(down.weight)
    bent, straight = nn.Sequential(down, nn.Tanh(), up), nn.Sequential(down, up)
    lora = ia.Lora(4, alpha=4.0)  # as many numbers, and s = 1
    assert lora.trained_count((16, 16)) == Bottleneck(4).trained_count((16, 16))
    found = {name: (_left(method, bent), _left(method, straight)) for name, method in
             {"bottleneck": Bottleneck(4), "no bend": Bottleneck(4, activation="identity"), "lora": lora}.items()}  # fmt: skip
    assert found["bottleneck"][0] < 0.5 * found["lora"][0]
    assert found["no bend"][1] < 0.01
    assert found["lora"][1] < 0.01
