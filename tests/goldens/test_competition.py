"""SNELLA's competition between layers against its formulas, a hand example, and a net of which one layer has to change."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import intarsia as ia
from intarsia.allocators import reallocate
from intarsia.methods import Snella
from intarsia.support import proportional
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, trained

SIZES = {"up": 24 * 16, "down": 16 * 24, "again": 24 * 16}


def _steps(model: torch.nn.Module, first: int, last: int, steps: int, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(trained(model), lr=lr)
    for step in range(first, last + 1):
        optimizer.zero_grad()
        some_loss(model, some_input(seed=step)).backward()
        optimizer.step()
        reallocate(model, "default", step, steps)


def test_the_budget_falls_by_a_cubic():
    method = Snella(sparsity=0.9, start_sparsity=0.2, warmup=0.1, hold=0.3)
    found = [method.budget(step, 1000, 10_000) for step in range(1, 1001)]
    assert found[0] == found[99] == 8000  # to the end of the warm-up
    assert found[699] == found[-1] == 1000  # from where it holds
    assert all(a >= b for a, b in itertools.pairwise(found))
    assert found[399] == 1000 + 7000 // 8  # half way


def test_the_budget_of_a_run_without_a_fall():
    """warmup + hold = 1: a step down, and no division by zero."""
    method = Snella(sparsity=0.5, warmup=0.5, hold=0.5)
    assert [method.budget(step, 4, 100) for step in (1, 2, 3, 4)] == [100, 100, 50, 50]


def test_a_layer_with_all_the_score_is_capped_and_the_rest_spread():
    sizes = {"a": 100, "b": 300, "c": 600}
    assert proportional({"a": 1.0, "b": 0.0, "c": 0.0}, sizes, 400) == {"a": 100, "b": 100, "c": 200}
    assert sum(proportional({"a": 0.7, "b": 0.2, "c": 0.1}, sizes, 777).values()) == 777


def test_equal_scores_are_snell_with_one_sparsity():
    model = small_net()
    ia.attach(model, Snella(rank=4, sparsity=0.9, every=1))
    for site in SITES:
        for name in ("importance_A", "importance_B", "spread_A", "spread_B"):
            getattr(state_of(model, site), name).fill_(0.5)
    counts = reallocate(model, "default", 100, 100)
    assert sum(counts.values()) == round(0.1 * 3 * 384)
    assert set(counts.values()) <= {38, 39}
    for site in SITES:
        assert int(state_of(model, site).zeros) == 384 - counts[site]


def test_the_scores_are_smoothed_sensitivity_and_uncertainty():
    """A constant I: its mean goes to I and its uncertainty to 0. Two steps by hand otherwise."""
    model = small_net(torch.float64)
    ia.attach(model, Snella(rank=2), targets="up")
    state = state_of(model, "up")
    state.A.grad = torch.full_like(state.A, 2.0) / state.A.detach().abs()  # so that |A * grad| = 2 everywhere
    p = state.raw()
    with torch.no_grad():
        state.method.before_step(p)
        torch.testing.assert_close(state.importance_A, torch.full_like(state.A, 0.15 * 2), rtol=1e-12, atol=0)
        torch.testing.assert_close(state.spread_A, torch.full_like(state.A, 0.15 * (2 - 0.3)), rtol=1e-12, atol=0)
        state.method.before_step(p)
        mean = 0.85 * 0.3 + 0.15 * 2
        torch.testing.assert_close(state.importance_A, torch.full_like(state.A, mean), rtol=1e-12, atol=0)
        spread = 0.85 * 0.15 * 1.7 + 0.15 * (2 - mean)
        torch.testing.assert_close(state.spread_A, torch.full_like(state.A, spread), rtol=1e-12, atol=0)
        assert state.method.score(state) == pytest.approx(
            mean * spread, rel=1e-12
        )  # B has no gradient yet: its part is 0
        for _ in range(400):
            state.method.before_step(p)
    torch.testing.assert_close(state.importance_A, torch.full_like(state.A, 2.0), rtol=1e-9, atol=0)
    assert float(state.spread_A.max()) < 1e-9
    state.A.grad.fill_(torch.nan)
    with torch.no_grad():
        state.method.before_step(p)
    assert state.importance_A.isfinite().all()


def test_scores_are_gathered_by_the_optimizers_step_and_by_no_other():
    model = small_net()
    ia.attach(model, Snella(rank=2), targets="up")
    state = state_of(model, "up")
    some_loss(model, some_input()).backward()
    assert not state.importance_A.any()
    expected = 0.15 * (state.A * state.A.grad).abs().detach()
    torch.optim.SGD(trained(model), lr=0.1).step()
    torch.testing.assert_close(state.importance_A, expected, rtol=1e-6, atol=0)  # of the factors before the step


def test_the_zeros_of_each_layer_are_what_it_was_given():
    model = small_net()
    ia.attach(model, Snella(rank=4, sparsity=0.7, every=5))
    _steps(model, 1, 30, 30)
    total = 0
    for site in SITES:
        state = state_of(model, site)
        zeros = int((state.method.delta(state.raw()) == 0).sum())
        assert zeros == int(state.zeros)
        total += 384 - zeros
    assert total == round(0.3 * 3 * 384)
    assert len({int(state_of(model, site).zeros) for site in SITES}) > 1


def test_it_competes_when_it_is_due():
    model = small_net()
    ia.attach(model, Snella(rank=4, every=10, warmup=0.2))
    even = reallocate(model, "default", 1, 100)
    assert set(even.values()) == {384}  # start_sparsity is 0
    assert reallocate(model, "default", 7, 100) == {}
    assert reallocate(model, "default", 50, 100)
    assert reallocate(model, "default", 100, 100)
    with pytest.raises(ia.IntarsiaError, match="step 101 of 100"):
        reallocate(model, "default", 101, 100)
    ia.attach(model, ia.Lora(2), name="other")
    assert reallocate(model, "other", 1, 100) == {}


def test_a_resumed_run_competes_as_the_run_itself():
    whole, half, again = (small_net() for _ in range(3))
    for model in (whole, half, again):
        ia.attach(model, Snella(rank=4, every=4))
    _steps(whole, 1, 20, 20)
    _steps(half, 1, 9, 20)
    ia.load_adapter_state(again, "default", {k: t.clone() for k, t in ia.adapter_state(half, "default").items()})
    _steps(again, 10, 20, 20)
    mine, theirs = ia.adapter_state(whole, "default"), ia.adapter_state(again, "default")
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def _net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers: list[Any] = [torch.nn.Linear(24, 24) for _ in range(3)]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])


def test_the_layer_that_has_to_change_gets_the_most():
    """The target is the net with another middle layer."""
    goal, model = _net(), _net()
    with torch.no_grad():
        layer_of(goal, "2").weight.copy_(torch.randn(24, 24, generator=torch.Generator().manual_seed(3)) / 24**0.5)
    ia.attach(model, Snella(rank=8, sparsity=0.8, rule="hard", every=10), targets=["0", "2", "4"])
    optimizer = torch.optim.Adam(trained(model), lr=2e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 101):
        x = torch.randn(32, 24, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x), goal(x).detach()).backward()
        optimizer.step()
        reallocate(model, "default", step, 100)
    kept = {site: 576 - int(state_of(model, site).zeros) for site in ("0", "2", "4")}
    assert kept["2"] > 1.2 * max(kept["0"], kept["4"])
