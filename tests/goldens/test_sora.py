"""SoRA against its card: the proximal step, the authors' threshold, gates at 0 and what is left of the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import intarsia as ia
from intarsia.allocators import reallocate
from intarsia.methods import Sora
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, stir, trained


def test_the_proximal_steps_end_at_the_soft_threshold():
    """min 1/2 (g - a)^2 + lambda |g| is at sign(a) max(|a| - lambda, 0), whatever the learning rate."""
    for lr in (0.1, 0.5):
        model = small_net(torch.float64)
        ia.attach(model, Sora(rank=6, lam=0.7), targets="up")
        gate = state_of(model, "up").gate
        a = torch.tensor([2.0, -1.5, 0.71, 0.7, 0.2, -0.5], dtype=torch.float64)
        optimizer = torch.optim.SGD([gate], lr=lr)
        for _ in range(400):
            optimizer.zero_grad()
            (0.5 * (gate - a).square().sum()).backward()
            optimizer.step()
        expected = torch.tensor([1.3, -0.8, 0.01, 0.0, 0.0, 0.0], dtype=torch.float64)
        torch.testing.assert_close(gate.detach(), expected, rtol=0, atol=1e-7)
        assert not gate[4:].any()  # exactly


def test_the_threshold_follows_the_learning_rate_of_the_step():
    model = small_net()
    ia.attach(model, Sora(rank=2, lam=2.0), targets="up")
    gate = state_of(model, "up").gate
    with torch.no_grad():
        gate.copy_(torch.tensor([1.0, -0.1]))
    optimizer = torch.optim.SGD([gate], lr=0.04)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for expected in ([0.92, -0.02], [0.88, 0.0]):
        gate.grad = torch.zeros(2)
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(gate.detach(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_the_threshold_of_the_authors_code():
    """Their three lines as they stand, on numbers around one and two thresholds."""
    start = torch.tensor([0.5, 0.21, 0.19, 0.11, 0.09, 0.0, -0.09, -0.11, -0.19, -0.21, -0.5])
    theirs = start.clone()
    theirs[theirs > 0.1] -= 0.1
    theirs[theirs < -0.1] += 0.1
    theirs[abs(theirs) < 0.1] = 0.0
    model = small_net()
    ia.attach(model, Sora(rank=11, lam=0.1, code_compat=True), targets="up")
    gate = state_of(model, "up").gate
    with torch.no_grad():
        gate.copy_(start)
    gate.grad = torch.zeros(11)
    torch.optim.SGD([gate], lr=1e-3).step()  # whatever the rate
    torch.testing.assert_close(gate.detach(), theirs, rtol=0, atol=1e-7)
    assert int((gate == 0).sum()) == 7


def test_ranks_at_0_leave_without_a_change_of_the_output(tmp_path):
    model = adapted(Sora(rank=5)).eval()
    with torch.no_grad():
        for site, zeros in zip(SITES, ([1], [0, 2, 4], [0, 1, 2, 3, 4]), strict=True):
            state_of(model, site).gate[zeros] = 0
    y, adapter = model(some_input()), ia.export(model)
    ranks = {"up": 4, "down": 2, "again": 0}
    for site, rank in ranks.items():
        edit = adapter.edits[f"{site}.weight"]
        assert edit.kind == "low_rank"
        assert sum(t.numel() for t in edit.tensors().values()) == rank * (24 + 16)
    ia.save(model, tmp_path / "a")
    other = small_net().eval()
    ia.load(other, tmp_path / "a")
    torch.testing.assert_close(other(some_input()), y, rtol=1e-6, atol=1e-6)
    assert {site: len(state_of(other, site, "a").gate) for site in SITES} == ranks
    assert ia.export(other, "a").digest == adapter.digest
    optimizer = torch.optim.AdamW(trained(other), lr=1e-2)
    some_loss(other.train(), some_input()).backward()
    optimizer.step()
    ia.save(other, tmp_path / "b", "a")
    served = small_net()
    deck = ia.Deck(served)
    deck.add(tmp_path / "b")
    deck.use("b")
    torch.testing.assert_close(served(some_input()), other.eval()(some_input()), rtol=1e-5, atol=1e-6)
    deck.off()


def test_without_lambda_and_with_gates_of_1_it_is_lora_step_by_step():
    gated, plain = small_net(), small_net()
    ia.attach(gated, Sora(rank=3, lam=0.0), seed=4)
    ia.attach(plain, ia.Lora(rank=3), seed=4)
    with torch.no_grad():
        for site in SITES:
            state_of(gated, site).gate.fill_(1.0)
    factors = [p for site in SITES for p in (state_of(gated, site).A, state_of(gated, site).B)]
    optimizers = [torch.optim.AdamW(factors, lr=1e-2), torch.optim.AdamW(trained(plain), lr=1e-2)]
    for step in range(5):
        for model, optimizer in zip((gated, plain), optimizers, strict=True):
            model.zero_grad()
            some_loss(model, some_input(seed=step)).backward()
            optimizer.step()
        for site in SITES:
            for name in "AB":
                torch.testing.assert_close(getattr(state_of(gated, site), name), getattr(state_of(plain, site), name))


def test_inside_dora_the_gates_are_made_0_as_well():
    model = small_net()
    inner: Any = {"name": "sora", "rank": 4, "lam": 50.0, "stages": 2, "last": 60.0}
    ia.attach(model, ia.Dora(inner=inner))
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    counts: Mapping[str, int] = {}
    for step in range(1, 5):
        some_loss(model, some_input(seed=step)).backward()
        optimizer.step()
        counts = reallocate(model, "default", step, 4)
    assert sum(counts.values()) < 8
    assert float(state_of(model, "up").lam) == 60.0
    for site, rank in counts.items():
        edit: Any = ia.export(model).edits[f"{site}.weight"]
        assert edit.inner.A.shape[0] == rank


def test_an_l1_loss_is_added_to_the_gradient_of_the_gates():
    found = []
    for l1 in (0.0, 0.25):
        model = small_net(torch.float64)
        ia.attach(model, Sora(rank=3, lam=0.0, l1=l1))
        stir(model)
        before = state_of(model, "up").gate.detach().clone()
        optimizer = torch.optim.SGD(trained(model), lr=1.0)
        some_loss(model, some_input(torch.float64)).backward()
        optimizer.step()
        found.append((state_of(model, "up").gate.detach(), before))
    torch.testing.assert_close(found[1][0], found[0][0] - 0.25 * found[0][1].sign(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "log_linear", "exp_linear"])
def test_the_stages_are_those_of_the_authors(schedule):
    first, last, count = 0.3, 0.9, 5
    theirs = {
        "linear": np.linspace(first, last, count),
        "log_linear": np.log(np.linspace(np.exp(first), np.exp(last), count)),
        "exp_linear": np.exp(np.linspace(np.log(first), np.log(last), count)),
    }[schedule]
    model = small_net()
    method = Sora(rank=2, lam=first, last=last, stages=count, schedule=schedule)
    ia.attach(model, method)
    np.testing.assert_allclose([method.lam_at(stage) for stage in range(count)], theirs, rtol=1e-12)
    seen, told = [float(state_of(model, "up").lam)], []
    counts: Mapping[str, int] = {}
    for step in range(1, 26):
        counts = reallocate(model, "default", step, 25)
        seen.append(float(state_of(model, "down").lam))
        told += [step] if counts else []
    np.testing.assert_allclose(seen[:25:5], theirs, rtol=1e-6)
    assert seen[4] == seen[0] != seen[5]
    assert told == [5, 10, 15, 20, 25]
    assert counts == dict.fromkeys(SITES, 2)


def test_a_rank_that_is_not_needed_ends_at_exactly_0():
    model = small_net()
    ia.attach(model, Sora(rank=8, lam=1.0), targets="up")
    goal = torch.randn(24, 2, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        2, 16, generator=torch.Generator().manual_seed(2)
    )
    W = layer_of(model, "up").weight.detach() + goal / 4
    optimizer = torch.optim.Adam(trained(model), lr=2e-2)
    for step in range(400):
        x: Tensor = some_input(torch.float32, 64, 16, seed=step)
        optimizer.zero_grad()
        (
            layer_of(model, "up")(x) - torch.nn.functional.linear(x, W, layer_of(model, "up").bias)
        ).square().mean().backward()
        optimizer.step()
    edit = ia.export(model).edits["up.weight"]
    assert 2 <= edit.tensors()["A"].shape[0] <= 4
    with pytest.raises(ia.IntarsiaError, match="last"):
        Sora(stages=3)
