"""How low-rank updates start: against HF PEFT, and the closed forms of the papers."""

from __future__ import annotations

import sys
from typing import Any

import peft
import pytest
import torch

import intarsia as ia
from intarsia.inits import initialiser
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, stir, trained


def _theirs(**config) -> Any:
    return peft.get_peft_model(small_net(), peft.LoraConfig(target_modules=list(SITES), **config))


def _layer(model: torch.nn.Module, site: str) -> Any:
    return model.get_submodule(f"base_model.model.{site}")


def test_pissa_is_peft_s():
    """The same product at the start, and the same output and gradients once the factors have moved alike."""
    model, other = small_net(), _theirs(r=3, lora_alpha=6, init_lora_weights="pissa")
    ia.attach(model, ia.Lora(3, 6.0, start="pissa"))
    x = some_input()
    for site in SITES:
        mine, their = state_of(model, site), _layer(other, site)
        A, B = their.lora_A["default"].weight, their.lora_B["default"].weight
        torch.testing.assert_close(mine.B @ mine.A, B @ A, rtol=1e-4, atol=1e-6)
        # A singular vector's sign is nobody's: PEFT's factors go on from ours.
        with torch.no_grad():
            A.copy_(mine.A), B.copy_(mine.B)
    assert torch.equal(model(x), small_net()(x))
    torch.testing.assert_close(other(x), small_net()(x), rtol=1e-4, atol=1e-5)
    stir(model)
    for site in SITES:
        mine, their = state_of(model, site), _layer(other, site)
        with torch.no_grad():
            their.lora_A["default"].weight.copy_(mine.A), their.lora_B["default"].weight.copy_(mine.B)
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)
    some_loss(model, x).backward(), some_loss(other, x).backward()
    for site in SITES:
        mine, their = state_of(model, site), _layer(other, site)
        torch.testing.assert_close(mine.A.grad, their.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(mine.B.grad, their.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_is_exported_as_peft_converts_it(tmp_path):
    """Trained alike, PEFT's own conversion to a LoRA of the unchanged base and our export hold the same product, of rank 2 r."""
    from peft.utils.save_and_load import load_peft_weights

    from intarsia.interop import peft_lora

    model, other = small_net(), _theirs(r=3, lora_alpha=6, init_lora_weights="pissa")
    ia.attach(model, ia.Lora(3, 6.0, start="pissa"))
    for site in SITES:  # a singular vector's sign is nobody's: ours start as PEFT's
        mine, their = state_of(model, site), _layer(other, site)
        with torch.no_grad():
            for name, tensor in (("A", their.lora_A["default"].weight), ("B", their.lora_B["default"].weight)):
                getattr(mine, name).copy_(tensor), getattr(mine, f"{name}0").copy_(tensor)
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(tmp_path / "first")
    other.peft_config["default"].init_lora_weights = "pissa"
    stir(model)
    for site in SITES:
        mine, their = state_of(model, site), _layer(other, site)
        with torch.no_grad():
            their.lora_A["default"].weight.copy_(mine.A), their.lora_B["default"].weight.copy_(mine.B)
    other.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    peft_lora.write(ia.export(model), small_net(), tmp_path / "ours")
    ours, theirs = (load_peft_weights(str(tmp_path / which)) for which in ("ours", "theirs"))
    for site in SITES:
        key = f"base_model.model.{site}.lora_{{}}.weight"
        assert (
            ours[key.format("A")].shape == theirs[key.format("A")].shape == (6, layer_of(model, site).weight.shape[1])
        )
        products = [found[key.format("B")] @ found[key.format("A")] for found in (ours, theirs)]
        torch.testing.assert_close(*products, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_pissa_takes_the_principal_part(scaling):
    """s B A = U_r S_r V_r^T, and B^T B = A A^T = S_r / s."""
    model = small_net(torch.float64)
    ia.attach(model, ia.Lora(4, 3.0, scaling, start="pissa"))
    for site in SITES:
        state, W = state_of(model, site), layer_of(model, site).weight
        s = state.method.scale
        values = torch.linalg.svdvals(W)
        left = torch.linalg.svdvals(W - s * state.B @ state.A)
        torch.testing.assert_close(left[: len(values) - 4], values[4:])
        for gram in (state.B.mT @ state.B, state.A @ state.A.mT):
            torch.testing.assert_close(gram, torch.diag(values[:4] / s))


def test_a_subtracted_start_keeps_its_digits_in_bfloat16():
    """Of a change a thousandth of the start bfloat16 keeps two digits, and not the rounding of what was subtracted."""
    model = small_net(torch.bfloat16)
    ia.attach(model, ia.Lora(4, start="pissa"))
    stir(model, size=1e-4)
    state, x = state_of(model, "up"), some_input(torch.bfloat16)
    found = state.method.branch(state.cast(torch.bfloat16), x).detach().double()
    A, B, A0, B0 = (t.detach().double() for t in (state.A, state.B, state.A0, state.B0))
    expected = x.double() @ (2 * (B @ A - B0 @ A0)).mT
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


@initialiser("ones", "gradient", subtracted=True)
def ones(method, site, start):
    start.given("gradient")
    return {"A": torch.ones(method.rank, site.shape[1]), "B": torch.ones(site.shape[0], method.rank)}


@initialiser("short")
def short(method, site, start):
    return {"A": torch.ones(method.rank, 3), "B": torch.zeros(site.shape[0], method.rank)}


def test_an_initialiser_of_another_package():
    model, x = small_net(), some_input()
    with pytest.raises(ia.IntarsiaError, match="needs calibration data"):
        ia.attach(model, ia.Lora(2, start=f"{__name__}:ones"))
    ia.attach(model, ia.Lora(2, start=f"{__name__}:ones"), data=[x], loss=some_loss)
    assert torch.equal(model(x), small_net()(x))
    assert bool((state_of(model, "up").A == 1).all())


def test_a_file_imports_no_initialiser(tmp_path, monkeypatch):
    """What it made is in the file; whoever loads it need not have it."""
    model = small_net()
    ia.attach(model, ia.Lora(2, start=f"{__name__}:ones"), data=[some_input()], loss=some_loss)
    stir(model)
    folder = ia.save(model, tmp_path / "a")
    head = (folder / "adapter.json").read_text()
    monkeypatch.setattr(sys.modules[initialiser.__module__], "imported", lambda *_: pytest.fail("it was imported"))
    other = small_net()
    ia.load(other, folder)
    assert f"{__name__}:ones" in head
    assert torch.equal(other(some_input()), model(some_input()))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("pisa", r"lora: start='pisa' must be one of"),
        (f"{__name__}:short", r"up: the initialiser .* gave \(2, 3\) for A; expected finite \(2, 16\)"),
        (f"{__name__}:small_net", r"is not declared as one; put @initialiser"),
        (f"{__name__}:none", r"has no attribute 'none'; expected 'package.module:function'"),
    ],
)
def test_what_is_no_initialiser(start, message):
    model = small_net()
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.attach(model, ia.Lora(2, start=start))
    assert ia.attached_names(model) == []


def test_needs_are_known_by_name():
    with pytest.raises(
        ia.IntarsiaError,
        match="an initialiser cannot need 'gradeint'; did you mean|an initialiser cannot need 'gradeint'",
    ):
        initialiser("x", "gradeint")


# ------------------------------------------------------------------ penalties, and the learning rate
def test_a_penalty_is_part_of_every_step_and_the_rate_is_told(monkeypatch):
    """One SGD step with penalty c ||A||^2 is the step of the loss with it; after_step is given the rate of A's group."""
    rates = []
    monkeypatch.setattr(ia.Lora, "penalty", lambda self, p: 0.5 * 0.3 * p.A.square().sum())
    monkeypatch.setattr(ia.Lora, "after_step", lambda self, p, lr: rates.append(lr))
    model = small_net(torch.float64)
    ia.attach(model, ia.Lora(2))
    stir(model)
    before = state_of(model, "up").A.detach().clone()
    some_loss(model, some_input(torch.float64)).backward()
    G = state_of(model, "up").A.grad.clone()
    groups = [
        {"params": [p], "lr": 0.1 if name.endswith("A") else 0.7}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    torch.optim.SGD(groups, lr=9.0).step()
    torch.testing.assert_close(state_of(model, "up").A.detach(), before - 0.1 * (G + 0.3 * before))
    assert rates == [0.1] * 3
    assert len(trained(model)) == 6
