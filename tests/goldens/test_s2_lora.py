"""S2-LoRA: shared factors, sparse coefficients; against closed forms, an unshared copy and HF PEFT's AdaLoRA. And sharing itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch

import intarsia as ia
from intarsia import store
from intarsia.methods import S2Lora
from intarsia.model import load_adapter_state, plan
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, stir, trained

close = torch.testing.assert_close
PLAIN = S2Lora(3, orthogonal=0.0, sparse=0.0)


def _on(method: ia.Method = PLAIN, dtype: torch.dtype = torch.float64, stirred: bool = True) -> torch.nn.Module:
    model = small_net(dtype)
    ia.attach(model, method)
    if stirred:
        stir(model)
    return model


def _dense(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Dense gradients at the folded weights."""
    plain = small_net(torch.float64)
    for site in SITES:
        state = state_of(model, site)
        with torch.no_grad():
            layer_of(plain, site).weight += state.B * state.C @ state.A
    some_loss(plain, some_input(torch.float64)).backward()
    return {site: layer_of(plain, site).weight.grad for site in SITES}


def _one(model: torch.nn.Module) -> None:
    """up and again, of one shape, hold the same two parameters; down has its own."""
    up, down, again = (state_of(model, site) for site in SITES)
    assert up.A is again.A
    assert up.B is again.B
    assert up.C is not again.C
    assert down.A is not up.A


# ------------------------------------------------------------------ the method
def test_the_first_step_moves_the_coefficients_alone():
    """lam = 0: no gradient reaches P and Q, and that of lam is diag(P^T G Q^T)."""
    model, x = _on(stirred=False), some_input(torch.float64)
    assert torch.equal(model(x), small_net(torch.float64)(x))
    G = _dense(model)
    some_loss(model, x).backward()
    for site in SITES:
        state = state_of(model, site)
        assert not state.A.grad.any()
        assert not state.B.grad.any()
        close(state.C.grad, (state.B.mT @ G[site] @ state.A.mT).diagonal())


def test_shared_gradients_are_the_sums_of_unshared_ones():
    model = _on()
    G = _dense(model)
    some_loss(model, some_input(torch.float64)).backward()
    up, again = state_of(model, "up"), state_of(model, "again")
    close(up.B.grad, sum(G[site] @ (state_of(model, site).C[:, None] * up.A).mT for site in ("up", "again")))
    close(up.A.grad, sum((up.B * state_of(model, site).C).mT @ G[site] for site in ("up", "again")))
    assert up.B.grad is again.B.grad


def test_the_rank_is_that_of_the_coefficients():
    model = _on()
    with torch.no_grad():
        state_of(model, "up").C[1] = 0.0
    edit = ia.export(model).edits["up.weight"]
    D = edit.delta(torch.zeros(24, 16, dtype=torch.float64))
    assert int(torch.linalg.matrix_rank(D)) == 2
    assert int(torch.linalg.matrix_rank(ia.export(model).edits["again.weight"].delta(D))) == 3


def test_alone_it_is_adalora_s_layer():
    """HF PEFT's SVD layer without pruning, of the same numbers, gives the same output and gradients."""
    model: Any = small_net()
    ia.attach(model, PLAIN, targets="up")
    stir(model)
    config = peft.AdaLoraConfig(target_modules=["up"], init_r=3, target_r=3, lora_alpha=3, total_step=10)
    other: Any = peft.get_peft_model(small_net(), config)
    mine, layer = state_of(model, "up"), other.get_submodule("base_model.model.up")
    theirs = {"A": layer.lora_A["default"], "B": layer.lora_B["default"], "C": layer.lora_E["default"]}
    with torch.no_grad():
        for name, their in theirs.items():
            their.copy_(getattr(mine, name).view(their.shape))
    x = some_input()
    close(model(x), other(x), rtol=1e-4, atol=1e-5)  # which divides by r + 1e-5
    some_loss(model, x).backward(), some_loss(other.base_model.model, x).backward()
    for name, their in theirs.items():
        close(getattr(mine, name).grad.view(their.shape), their.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("threshold", ["proximal", "subgradient"])
def test_a_step_with_penalties_is_the_formula(threshold):
    """SGD: P and Q take c1 d||P^T P - 1||^2 once, however many sites share them; lam the soft threshold, or c2 sign(lam)."""
    model = _on(S2Lora(3, 0.2, 0.05, threshold))
    before = {site: {k: t.detach().clone() for k, t in state_of(model, site).tensors().items()} for site in SITES}
    some_loss(model, some_input(torch.float64)).backward()
    G = {site: {k: getattr(state_of(model, site), k).grad.clone() for k in "ABC"} for site in SITES}
    torch.optim.SGD(trained(model), lr=0.1).step()
    one = torch.eye(3, dtype=torch.float64)
    for site in SITES:
        state, old, g = state_of(model, site), before[site], G[site]
        P, Q, lam = old["B"], old["A"], old["C"]
        close(state.B.detach(), P - 0.1 * (g["B"] + 0.2 * 4 * P @ (P.mT @ P - one)))
        close(state.A.detach(), Q - 0.1 * (g["A"] + 0.2 * 4 * (Q @ Q.mT - one) @ Q))
        if threshold == "proximal":
            there = lam - 0.1 * g["C"]
            close(state.C.detach(), there.sign() * (there.abs() - 0.1 * 0.05).clamp_min(0))
        else:
            close(state.C.detach(), lam - 0.1 * (g["C"] + 0.05 * lam.sign()))


def test_coefficients_become_exactly_zero_and_stay_so_in_the_file(tmp_path):
    model = _on(S2Lora(8, sparse=2.0))
    optimizer = torch.optim.Adam(trained(model), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        some_loss(model, some_input(torch.float64)).backward()
        optimizer.step()
    zero = {site: state_of(model, site).C == 0 for site in SITES}
    assert any(mask.any() for mask in zero.values())
    other = small_net(torch.float64)
    ia.load(other, ia.save(model, tmp_path / "a"))
    assert all(torch.equal(state_of(other, site, "a").C == 0, mask) for site, mask in zero.items())


# ------------------------------------------------------------------ sharing
def test_one_parameter_for_all_sites_of_a_shape():
    """After attaching, copying, pickling, loading, switching; optimizers see it once, and the plan counts it once."""
    model = _on()
    _one(model)
    _one(copy.deepcopy(model))
    _one(pickle.loads(pickle.dumps(model)))
    _one(model.to(torch.bfloat16).to(torch.float64))
    ia.activate(model)
    ia.activate(model, "default")
    _one(model)
    assert len(trained(model)) == 3 + 2 * 2
    planned = plan(small_net(), PLAIN)
    assert planned == {"up": 3 + 3 * 40, "down": 3 + 3 * 40, "again": 3}
    assert sum(planned.values()) == sum(p.numel() for p in trained(model)) == 3 * 3 + 2 * 3 * 40


def test_a_file_holds_shared_tensors_once(tmp_path):
    """Its second bearer says where the first one is, and both are one tensor in memory again."""
    model = small_net()
    ia.attach(model, S2Lora(8))
    stir(model)
    folder = ia.save(model, tmp_path / "a")
    adapter = ia.read(folder)
    assert adapter.edits["up.weight"].tensors()["A"] is adapter.edits["again.weight"].tensors()["A"]
    numbers = 4 * (2 * 8 * 40 + 3 * 8)
    assert numbers <= (folder / store.TENSORS).stat().st_size <= numbers + 1500
    assert '"format": 2' in (folder / store.HEAD).read_text()
    other = small_net()
    ia.load(other, folder)
    up, again = (state_of(other, site, "a") for site in ("up", "again"))
    assert up.A is again.A
    assert torch.equal(other(some_input()), model(some_input()))


def test_a_file_whose_sites_disagree_is_refused(tmp_path):
    model = small_net()
    ia.attach(model, PLAIN)
    with torch.no_grad():  # not what sharing can come to
        state = state_of(model, "again")
        state.A = torch.nn.Parameter(state.A + 1)
    folder, other = ia.save(model, tmp_path / "a"), small_net()
    with pytest.raises(ia.IntarsiaError, match="A of again is to be that of up, and has other numbers"):
        ia.load(other, folder)
    assert ia.attached_names(other) == []


def test_a_checkpoint_holds_shared_tensors_once():
    model, other = _on(), _on(stirred=False)
    saved = ia.adapter_state(model, "default")
    assert set(saved) == {"up/A", "up/B", "up/C", "down/A", "down/B", "down/C", "again/C"}
    load_adapter_state(other, "default", saved)
    _one(other)
    assert torch.equal(other(some_input(torch.float64)), model(some_input(torch.float64)))
    saved["again/A"] = saved["up/A"]
    with pytest.raises(ia.IntarsiaError, match="unexpected again/A"):
        load_adapter_state(other, "default", saved)


def test_two_adapters_share_nothing():
    model = _on()
    ia.attach(model, PLAIN, name="other", seed=1)
    assert state_of(model, "up").A is not state_of(model, "up", "other").A
    assert not torch.equal(state_of(model, "up").A, state_of(model, "up", "other").A)


def test_dora_shares_what_its_inner_method_shares():
    model = small_net()
    ia.attach(model, ia.Dora(S2Lora(2, threshold="subgradient")))
    assert state_of(model, "up").A is state_of(model, "again").A
    assert sum(plan(small_net(), ia.Dora(S2Lora(2))).values()) == sum(p.numel() for p in trained(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "s2-lora: rank=0 must be 1 or more"),
        ({"sparse": -1.0}, "s2-lora: sparse=-1.0 must be 0 or more"),
        ({"orthogonal": float("nan")}, "s2-lora: orthogonal=nan must be 0 or more"),
        ({"threshold": "hard"}, "s2-lora: threshold='hard' must be proximal or subgradient"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        S2Lora(**fields)
