"""IST against its card: the draws, one update by hand, what a step leaves alone, and damping that leaves no trace."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import intarsia as ia
from intarsia import allocators, chain
from intarsia.allocators import Draws, Ist, Turns, damped, layer_of
from intarsia.methods import Bottleneck, Rosa
from small import SITES, adapted, small_net, some_input, some_loss, stir, trained
from small import layer_of as layer_at


class Blocks(nn.Module):
    """Eight blocks of two layers, with dropout that eval mode turns off."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(12, 12), "down": nn.Linear(12, 12), "drop": nn.Dropout(0.1)})
            for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            block: Any = layer
            x = x + block["down"](block["drop"](block["up"](x)).tanh())
        return x


def blocks(method: ia.Method, count: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Blocks(count)
    ia.attach(model, method)
    return model


def test_the_update_by_hand():
    """Two trials, {0, 1} and {2, 3}, losses ln 2 and ln 4: rewards 1/2 and 1/4, and the scores are 10 * 1/8 * 1/4."""
    ist = Ist(candidates=2)
    state = ist.begin(4)
    ist.learn(state, [(0, 1), (2, 3)], [math.log(2), math.log(4)])
    torch.testing.assert_close(state["scores"], torch.tensor([0.3125, 0.3125, -0.3125, -0.3125], dtype=torch.float64))
    p = torch.sigmoid(state["scores"])
    ist.learn(state, [(0, 2), (0, 3)], [0.0, math.log(2)])  # p is that of before, for both trials
    expected = torch.tensor([0.3125, 0.3125, -0.3125, -0.3125], dtype=torch.float64)
    expected += 10 * torch.tensor([0.25 - 0.25, 0, 0.25, -0.25], dtype=torch.float64) * p * (1 - p)
    torch.testing.assert_close(state["scores"], expected, rtol=0, atol=1e-12)


def test_where_every_layer_is_in_every_trial_the_scores_stay():
    ist = Ist(suppressed=1.0)
    state = ist.begin(5)
    trials = ist.trials(state, 11, Draws(0))
    assert trials == [(0, 1, 2, 3, 4)] * 3
    ist.learn(state, trials, [0.1, 2.0, 0.7])
    assert float(state["scores"].abs().max()) < 1e-12


def test_the_draws_follow_the_scores():
    """Without replacement and in proportion: against the chances of all orders in which two of four may come."""
    weights = [0.1, 0.2, 0.3, 0.4]
    exact = dict.fromkeys(itertools.combinations(range(4), 2), 0.0)
    for first, second in itertools.permutations(range(4), 2):
        exact[min(first, second), max(first, second)] += weights[first] * weights[second] / (1 - weights[first])
    found = Counter(Draws(1).some(weights, 2, "test", number) for number in range(20_000))
    for pair, chance in exact.items():
        assert found[pair] / 20_000 == pytest.approx(chance, abs=0.012)
    assert Draws(1).some(weights, 2, "test", 5) == Draws(1).some(weights, 2, "test", 5)


def test_at_the_start_all_layers_are_alike_and_a_high_score_is_trained_rarely():
    ist = Ist()
    state = ist.begin(8)
    drawn = [ist.choose(state, step, Draws(0)) for step in range(1, 4001)]
    assert {len(each) for each in drawn} == {2}
    counts = Counter(number for each in drawn for number in each)
    assert all(abs(counts[number] / 4000 - 0.25) < 0.03 for number in range(8))
    state["scores"][3] = 4.0
    counts = Counter(number for step in range(1, 1001) for number in ist.choose(state, step, Draws(0)))
    assert counts[3] < 0.2 * min(counts[number] for number in range(8) if number != 3)
    damp = Counter(
        number for step in range(10, 4001, 10) for t in ist.trials(state, step + 1, Draws(0)) for number in t
    )
    assert damp[3] > max(damp[number] for number in range(8) if number != 3)


def test_trials_come_when_they_are_due_and_differ():
    ist = Ist(interval=4)
    state = ist.begin(8)
    due = [step for step in range(1, 14) if ist.trials(state, step, Draws(0))]
    assert due == [5, 9, 13]
    trials = ist.trials(state, 5, Draws(0))
    assert len(set(trials)) == 3
    assert all(len(trial) == 4 for trial in trials)
    assert not any(Ist(interval=0).trials(state, step, Draws(0)) for step in range(1, 40))


def test_a_layer_is_named_up_to_its_first_number():
    assert layer_of("model.layers.3.self_attn.q_proj") == "model.layers.3"
    assert layer_of("encoder.block.11.layer.1.DenseReluDense.wo") == "encoder.block.11"
    assert layer_of("0") == "0"
    assert layer_of("lm_head") == "lm_head"
    assert layer_of("conv1.proj") == "conv1.proj"


METHODS = [
    ia.Lora(2),
    ia.Dora(),
    ia.Shira(density=0.2),
    ia.Paca(rank=2),
    Rosa(rank=2, density=0.1, scorer="magnitude"),
    Bottleneck(width=3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_layers_that_have_no_turn_keep_their_numbers_and_moments_to_the_bit(method):
    model = blocks(method)
    stir(model)
    turns = Turns(model, "default", Ist(interval=3, batch=4), seed=1)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
    seen = set()
    for step in range(1, 9):
        before = {k: t.clone() for k, t in ia.adapter_state(model, "default").items()}
        moments = {id(p): {k: t.clone() for k, t in kept.items()} for p, kept in optimizer.state.items()}

        def loss(step: int = step) -> torch.Tensor:
            return some_loss(model, some_input(torch.float32, 4, 12, seed=100 + step))

        chosen = turns.begin(step, loss)
        assert len(chosen) == 2  # of eight
        some_loss(model, some_input(torch.float32, 4, 12, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen |= set(chosen)
        for key, tensor in ia.adapter_state(model, "default").items():
            if layer_of(key.split("/")[0]) not in chosen:
                assert torch.equal(tensor, before[key]), key
        for site, state in ia.model.states(model, "default").items():
            for p in state.parameters():
                assert p.requires_grad == (layer_of(site) in chosen)
                if layer_of(site) not in chosen and p in optimizer.state:
                    assert all(torch.equal(t, moments[id(p)][k]) for k, t in optimizer.state[p].items())
    assert len(seen) > 4
    turns.end()
    assert all(p.requires_grad for state in ia.model.states(model, "default").values() for p in state.parameters())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_damped_layer_makes_that_share_of_its_change_and_afterwards_nothing_has_been(method):
    model = adapted(method).eval()
    x = some_input()
    before, bits = model(x), {k: t.clone() for k, t in model.state_dict().items()}
    layer = layer_at(model, "down")
    live = layer.live
    hidden = model[1](model[0](x)).detach()
    y = layer(hidden).detach()
    with damped(model, "default", ["down"], 0.25):
        found = layer(hidden)
        assert layer.live is None
    ia.activate(model)
    base = layer(hidden)
    ia.activate(model, "default")
    torch.testing.assert_close(found, base + 0.25 * (y - base), rtol=1e-5, atol=1e-6)
    assert float((y - base).abs().max()) > 1e-3
    assert layer.live == live
    assert torch.equal(model(x), before)
    assert all(torch.equal(t, bits[k]) for k, t in model.state_dict().items())


def test_a_loss_that_fails_leaves_the_model_as_it_was():
    model = adapted(ia.Shira(density=0.2))
    turns = Turns(model, "default", Ist(interval=1, suppressed=0.5))
    before = model(some_input())

    def fail() -> float:
        assert not model.training
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        turns.begin(2, fail)
    assert model.training
    assert torch.equal(model(some_input()), before)
    assert not any(layer._forward_hooks for layer in chain.adapted_layers(model).values())


def test_what_is_left_of_an_earlier_turn_is_not_stepped_by():
    """Gradients that were set to 0 and not taken away would be decayed and moved by the optimizer."""
    model = blocks(ia.Lora(2))
    turns, optimizer = (
        Turns(model, "default", Ist(interval=0)),
        torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.5),
    )
    for step in range(1, 5):
        chosen = turns.begin(step)
        for site, state in ia.model.states(model, "default").items():
            assert layer_of(site) in chosen or all(p.grad is None for p in state.parameters())
        some_loss(model, some_input(torch.float32, 4, 12, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def test_turns_go_on_from_a_checkpoint_to_the_bit():
    def run(model: nn.Module, turns: Turns, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last + 1):

            def loss(step: int = step) -> torch.Tensor:
                return some_loss(model, some_input(torch.float32, 4, 12, seed=-step))

            turns.begin(step, loss)
            torch.manual_seed(step)  # of the dropout
            some_loss(model, some_input(torch.float32, 4, 12, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh() -> tuple[Any, Any, Any]:
        model = blocks(ia.Lora(2))
        return model, Turns(model, "default", Ist(interval=2), seed=5), torch.optim.AdamW(trained(model), lr=1e-2)

    whole, half, again = fresh(), fresh(), fresh()
    run(*whole, 1, 12)
    run(*half, 1, 7)
    ia.load_adapter_state(again[0], "default", {k: t.clone() for k, t in ia.adapter_state(half[0], "default").items()})
    again[1].load_state_dict(half[1].state_dict())
    again[2].load_state_dict(half[2].state_dict())
    run(*again, 8, 12)
    assert float(whole[1].state["scores"].abs().max()) > 0
    assert torch.equal(whole[1].state["scores"], again[1].state["scores"])
    mine, theirs = (ia.adapter_state(one[0], "default") for one in (whole, again))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_what_cannot_be_is_said():
    model = small_net()
    ia.attach(model, ia.Lora(2), name="low")
    ia.attach(model, ia.Lora(2), name="high")
    ia.activate(model, "low", "high")
    with pytest.raises(ia.IntarsiaError, match="'low' is not the highest active adapter"):
        Turns(model, "low", Ist())
    turns = Turns(model, "high", Ist(interval=1))
    assert turns.layers == SITES
    with pytest.raises(ia.IntarsiaError, match="measures losses before step 2"):
        turns.begin(2)
    with pytest.raises(ia.IntarsiaError, match="expected"):
        turns.load_state_dict({"scores": torch.zeros(2)})
    for config, words in (
        ({"name": "its"}, "unknown allocator 'its'.*ist"),
        ({"name": "ist", "shore": 1}, "ist has no field 'shore'.*share"),
        ({"name": "ist", "share": 0}, "share=0.0 must be above 0"),
        ({"name": "ist", "candidates": 1}, "candidates=1 must be 2 or more"),
        ({"share": 1}, "an allocator is given as"),
    ):
        with pytest.raises(ia.IntarsiaError, match=words):
            allocators.build(config)
    assert allocators.build({"name": "ist", "mu": "1e1"}) == Ist()
    assert allocators.build(Ist(share=0.5).config()) == Ist(share=0.5)


def test_the_callback_of_transformers_does_both():
    from types import SimpleNamespace

    from intarsia.methods import Snella
    from intarsia.train.allocation import Allocation

    model = small_net()
    ia.attach(model, Snella(rank=2, every=2))
    turns, told, losses = Turns(model, "default", Ist(interval=2, share=0.4)), [], []

    def loss(step: int) -> torch.Tensor:
        losses.append(step)
        return some_loss(model, some_input(seed=step))

    with pytest.raises(ia.IntarsiaError, match="pass loss"):
        Allocation(model, turns=turns)
    callback = Allocation(
        model, turns=turns, loss=loss, report=lambda step, counts: told.append((step, sum(counts.values())))
    )
    optimizer = torch.optim.Adam(trained(model), lr=1e-2)
    at = SimpleNamespace(global_step=0, max_steps=5)
    for _ in range(5):
        callback.on_step_begin(None, at, None)
        assert sum(p.requires_grad for p in model.parameters()) == 3  # one layer of three: A, B, mix
        some_loss(model, some_input()).backward()
        optimizer.step()
        optimizer.zero_grad()
        at.global_step += 1
        callback.on_step_end(None, at, None)
    callback.on_train_end(None, at, None)
    assert losses == [3, 3, 3, 5, 5, 5]
    assert [step for step, _ in told] == [1, 2, 4, 5]
    assert told[-1][1] == round(0.1 * 3 * 384)
