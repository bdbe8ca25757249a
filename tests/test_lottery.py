"""The lottery ticket: the oracles of LT-SFT, by brute force on a small net."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import intarsia as ia
from intarsia import model as models
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, trained, weights

METHOD = ia.Shira(density=0.1, scorer="movement", budget="model")
TOTAL = round(0.1 * 3 * 384)


def _train(model: nn.Module, steps: int = 5, lr: float = 1e-2) -> None:
    optimizer = torch.optim.SGD(trained(model), lr=lr)
    for seed in range(steps):
        optimizer.zero_grad()
        some_loss(model, some_input(seed=seed)).backward()
        optimizer.step()


def _moved_by_hand() -> dict[str, torch.Tensor]:
    """|theta1 - theta0| of the weights after the dense phase, trained without any of our code."""
    model, start = small_net(), weights(small_net())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    _train(model)
    return {site: (layer_of(model, site).weight.detach() - start[site]).abs() for site in SITES}


def _support(model: nn.Module) -> set[tuple[str, int]]:
    return {(site, i) for site in models.states(model, "default") for i in state_of(model, site).index.tolist()}


def test_the_support_is_where_the_dense_phase_moved_most():
    model = small_net()
    digest, bits = models.digest(model), {k: t.clone() for k, t in model.state_dict().items()}
    ia.lottery(model, METHOD, _train)
    every = sorted(
        (-float(m), n, i) for n, site in enumerate(SITES) for i, m in enumerate(_moved_by_hand()[site].flatten())
    )
    assert _support(model) == {(SITES[n], i) for _, n, i in every[:TOTAL]}
    assert models.digest(model) == digest  # rewound
    assert torch.equal(model(some_input()), small_net()(some_input()))
    _train(model)
    ia.activate(model)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in bits.items())


def test_after_the_sparse_phase_exactly_the_support_differs():
    model, start = small_net(), weights(small_net())
    ia.lottery(model, METHOD, _train)
    support = _support(model)
    _train(model, lr=1e-1)
    differ = {
        (s, i)
        for s in SITES
        for i in (layer_of(model, s).weight.detach() != start[s]).flatten().nonzero()[:, 0].tolist()
    }
    assert differ <= support
    assert len(support) == TOTAL
    assert len(differ) > 0.9 * TOTAL  # a float32 weight may round back
    for site in SITES:
        assert torch.equal(layer_of(model, site).bias, layer_of(small_net(), site).bias)


@pytest.mark.parametrize(
    "method", [METHOD, ia.Shira(density=0.2, scorer="movement", granularity="column")], ids=["model", "columns"]
)
def test_more_iterations_give_nested_supports(method, monkeypatch):
    model, seen, changes = small_net(), [], []

    def train(net: nn.Module) -> None:
        if ia.attached_names(net):
            seen.append({s: set(state_of(net, s).index.tolist()) for s in models.states(net, "default")})
        _train(net)
        if ia.attached_names(net):
            changes.append(net(some_input()).detach())

    ia.lottery(model, method, train, iterations=2)
    last = {s: set(state_of(model, s).index.tolist()) for s in models.states(model, "default")}
    assert len(seen) == 1
    assert all(seen[0][site] <= last[site] for site in seen[0])
    counts = [sum(map(len, each.values())) for each in (seen[0], last)]
    assert counts[1] == sum(map(len, last.values())) > counts[0] >= counts[1] // 2 - 3
    # what the first part learned is still there
    torch.testing.assert_close(model(some_input()), changes[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(changes[0], small_net()(some_input()))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_leaves_no_trace(at):
    model, calls = small_net(), []
    model.get_submodule("down").requires_grad_(False)
    digest, flags = models.digest(model), [p.requires_grad for p in model.parameters()]

    def train(net: nn.Module) -> None:
        _train(net)
        calls.append(1)
        if len(calls) == at:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ia.lottery(model, METHOD, train, iterations=2)
    assert models.digest(model) == digest
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not ia.attached_names(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ia.lottery(m, ia.Shira(), _train), "does not choose by movement; expected one like Shira"),
        (lambda m: ia.lottery(m, METHOD, lambda net: None), "the first training moved the weights by 0"),
        (lambda m: ia.lottery(m, METHOD, _train, iterations=0), "iterations=0 must be 1 or more"),
        (lambda m: ia.attach(m, METHOD, data=[some_input()]), "chooses by movement, .*: call intarsia.lottery"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    model = small_net()
    with pytest.raises(ia.IntarsiaError, match=message):
        call(model)
    assert not ia.attached_names(model)


def test_two_tickets_add_up_in_any_order():
    """Apply a, then b: the same weights as b, then a; and off gives the base back."""
    model, deck = small_net(), ia.Deck(small_net())
    digest = models.digest(small_net())
    for name, steps in (("a", 3), ("b", 4)):
        ia.lottery(model, METHOD, partial(_train, steps=steps), name=name)
        _train(model, steps=steps)
        deck.add(ia.export(model, name))
        ia.detach(model, name)
    deck.fuse(a=1.0, b=1.0)
    one = weights(deck.model)
    deck.fuse(b=1.0, a=1.0)
    assert all(torch.equal(one[site], weights(deck.model)[site]) for site in SITES)
    deck.off()
    assert models.digest(deck.model) == digest
