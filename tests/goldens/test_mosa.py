"""MoSA (the LoRA form) against its recipe with E dense copies and masked gradients, as the card of the method gives it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import intarsia as ia
from intarsia.edits import LowRank
from intarsia.methods import Mosa
from intarsia.support import draw
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, trained


def _train(model: torch.nn.Module, steps: int, first: int = 0, lr: float = 0.5) -> None:
    optimizer = torch.optim.SGD(trained(model), lr=lr)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        some_loss(model, some_input(torch.float64, seed=step)).backward()
        optimizer.step()


def _attached(method: Mosa, dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    model = small_net(dtype)
    ia.attach(model, method, targets="up")
    return model


@pytest.mark.parametrize("experts", [2, 3, 4, 7])
def test_masks_are_a_partition_into_equal_parts(experts):
    model = _attached(Mosa(rank=5, experts=experts))
    state = state_of(model, "up")
    for name in "AB":
        masks = [getattr(state, f"expert_{name}") == i for i in range(experts)]
        assert torch.equal(sum(mask.long() for mask in masks), torch.ones_like(getattr(state, name), dtype=torch.long))
        sizes = [int(mask.sum()) for mask in masks]
        assert max(sizes) - min(sizes) <= 1
    assert not torch.equal(state.expert_A.flatten()[:80], state.expert_B.flatten()[:80])


@pytest.mark.parametrize("share", ["none", "down", "up"])
def test_training_is_that_of_dense_copies_with_masked_gradients(share):
    """E copies of each split factor; a step uses one of each, and multiplies its gradient with its mask. SGD, float64."""
    method = Mosa(rank=3, experts=3, share=share)
    model = _attached(method)
    layer, state = layer_of(model, "up"), state_of(model, "up")
    start = {name: getattr(state, name).detach().clone() for name in "AB"}
    copies = {name: [start[name].clone() for _ in range(3)] for name in "AB"}
    other = small_net(torch.float64)
    drawn_at = []
    for step in range(24):
        drawn_at.append(tuple(int(i) for i in state.drawn))
        chosen = {n: copies[n][int(i) if n in {"none": "AB", "down": "B", "up": "A"}[share] else 0] for n, i in zip("AB", state.drawn, strict=True)}  # fmt: skip
        for P in chosen.values():
            P.requires_grad_(True)
        x = some_input(torch.float64, seed=step)
        h = F.linear(x, layer.weight + 2.0 * chosen["B"] @ chosen["A"], layer.bias)
        y = torch.tanh(h)
        for module in list(other)[2:]:
            y = module(y)
        loss = (y.double() - 0.3).square().mean()
        gradients = torch.autograd.grad(loss, list(chosen.values()))
        with torch.no_grad():
            for number, (name, gradient) in enumerate(zip(chosen, gradients, strict=True)):
                P = chosen[name].detach()
                split = hasattr(state, f"expert_{name}")
                mask = getattr(state, f"expert_{name}") == state.drawn[number] if split else torch.ones_like(P)
                P -= 0.5 * gradient * mask
        for P in chosen.values():
            P.requires_grad_(False)
        _train(model, 1, first=step)
    assert len(set(drawn_at)) > 4
    edit = method.edit(state.raw())
    assert isinstance(edit, LowRank)
    for name, found in (("A", edit.A), ("B", edit.B)):
        if not hasattr(state, f"expert_{name}"):
            torch.testing.assert_close(found, copies[name][0], rtol=0, atol=1e-14)
            continue
        for i, P in enumerate(copies[name]):  # expert i differs from the start inside its own mask only
            outside = getattr(state, f"expert_{name}") != i
            assert torch.equal(P[outside], start[name][outside])
            assert not torch.equal(P, start[name])
        torch.testing.assert_close(found, sum(copies[name]) / 3, rtol=0, atol=1e-14)


def test_one_expert_is_lora():
    models = [_attached(Mosa(rank=3, experts=1)), small_net(torch.float64)]
    ia.attach(models[1], ia.Lora(3), targets="up")
    with torch.no_grad():
        state_of(models[1], "up").A.copy_(state_of(models[0], "up").A)
    for model in models:
        _train(model, 6)
    for name in "AB":
        assert torch.equal(getattr(state_of(models[0], "up"), name), getattr(state_of(models[1], "up"), name))
    x = some_input(torch.float64)
    assert torch.equal(models[0](x), models[1](x))


def test_only_the_drawn_expert_gets_a_gradient():
    model = adapted(Mosa(rank=4), torch.float64)
    some_loss(model, some_input(torch.float64)).backward()
    for site in SITES:
        state = state_of(model, site)
        for number, name in enumerate("AB"):
            mine = getattr(state, f"expert_{name}") == state.drawn[number]
            gradient = getattr(state, name).grad
            assert gradient[mine].abs().max() > 1e-6
            assert not gradient[~mine].any()


def test_the_draws_are_uniform_independent_and_follow_from_the_state():
    key = torch.tensor([12345, 67890, 12346])
    drawn = torch.stack([draw(key, torch.tensor(step), 4) for step in range(4000)])
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == 3
    for column in range(3):
        assert (drawn[:, column].bincount() - 1000).abs().max() < 120
    pairs = (4 * drawn[:, 0] + drawn[:, 2]).bincount(minlength=16)
    assert (pairs - 250).abs().max() < 80
    follows = (4 * drawn[:-1, 0] + drawn[1:, 0]).bincount(minlength=16)
    assert (follows - 250).abs().max() < 80
    # Pinned: a run that goes on must draw what it would have drawn.
    assert draw(key, torch.tensor(7), 4).tolist() == [1, 3, 2]


def test_layers_draw_each_for_themselves():
    model = small_net()
    ia.attach(model, Mosa(rank=2))
    keys = {tuple(state_of(model, site).key.tolist()) for site in SITES}
    assert len(keys) == 3
    assert len({k for pair in keys for k in pair}) == 6


def test_a_resumed_run_is_the_run_itself():
    whole = _attached(Mosa(rank=3))
    _train(whole, 9)
    half = _attached(Mosa(rank=3))
    _train(half, 4)
    saved = {k: t.clone() for k, t in ia.adapter_state(half, "default").items()}
    again = _attached(Mosa(rank=3))
    ia.load_adapter_state(again, "default", saved)
    _train(again, 5, first=4)
    mine, theirs = ia.adapter_state(whole, "default"), ia.adapter_state(again, "default")
    assert int(state_of(again, "up").step) == 9
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_draw_belongs_to_an_optimizer_step():
    """Forward passes, accumulated gradients and other adapters' steps draw nothing new."""
    model = _attached(Mosa(rank=3))
    ia.attach(model, ia.Lora(2), name="other", targets="up")
    ia.activate(model, "default")
    state = state_of(model, "up")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for _ in range(3):
        some_loss(model, some_input(torch.float64)).backward()
    assert int(state.step) == 0
    optimizer.step()
    assert int(state.step) == 1
    ia.activate(model, "other")
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    some_loss(model, some_input(torch.float64)).backward()
    optimizer.step()
    assert int(state.step) == 1


def test_eval_mode_and_the_file_are_the_merged_adapter(tmp_path):
    model = _attached(Mosa(rank=3))
    _train(model, 8)
    x = some_input(torch.float64)
    training = model(x)
    evaluated = model.eval()(x)
    assert not torch.equal(training, evaluated)
    ia.save(model, tmp_path / "a")
    assert ia.read(tmp_path / "a").edits["up.weight"].kind == "low_rank"
    assert sum(t.numel() for t in ia.read(tmp_path / "a").tensors().values()) == 3 * (24 + 16)
    deck = ia.Deck(small_net(torch.float64))
    deck.add(tmp_path / "a")
    deck.use("a")
    torch.testing.assert_close(deck.model(x), evaluated, rtol=0, atol=1e-12)
    again = small_net(torch.float64).eval()
    ia.load(again, tmp_path / "a")
    assert torch.equal(again(x), evaluated)
    assert torch.equal(again.train()(x), evaluated)  # a new split around what was merged: nothing differs yet
