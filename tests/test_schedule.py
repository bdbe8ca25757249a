"""Supports that move: which units go and come, by brute force; what is refused; what a failure leaves. The laws are in the contract."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import intarsia as ia
from intarsia import chain, schedule
from intarsia import model as models
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, trained

X = some_input(seed=7)


def _dense(model) -> dict[str, torch.Tensor]:
    """The gradient of the weights as they stand now, adapter and all, by plain autograd on a copy."""
    plain = small_net()
    for site in SITES:
        layer_of(plain, site).weight.data.copy_(layer_of(model, site).weight.data)
    some_loss(plain, X).backward()
    return {site: layer_of(plain, site).weight.grad for site in SITES}


@pytest.mark.parametrize("scorer", ["gradient", "snip"])
def test_the_least_changed_go_and_the_steepest_come(scorer):
    model = adapted(ia.Shira(density=0.1))
    gradients, expected = _dense(model), {}
    for site in SITES:
        state = state_of(model, site)
        old, scores = set(state.index.tolist()), gradients[site].abs().flatten()
        scores = scores * layer_of(model, site).weight.detach().abs().flatten() if scorer == "snip" else scores
        least = sorted(range(38), key=lambda i: abs(float(state.values[i].detach())))[:8]
        outside = [i for i in scores.argsort(descending=True).tolist() if i not in old][:8]
        expected[site] = sorted((old - {int(state.index[i]) for i in least}) | set(outside))
    assert ia.regrow(model, "default", None, data=[X], share=0.2, scorer=scorer, loss=some_loss) == dict.fromkeys(
        SITES, 8
    )
    for site in SITES:
        assert state_of(model, site).index.tolist() == expected[site]


def test_no_more_moves_than_there_is_room_for():
    model = adapted(ia.Shira(density=0.95))
    assert ia.regrow(model, "default", None, data=[X], share=0.5, loss=some_loss) == dict.fromkeys(SITES, 384 - 365)
    assert ia.regrow(model, "default", None, data=[X], share=0.0, loss=some_loss) == {}


def _trace(model, optimizer) -> list[Any]:
    moments = [t.clone() for p in trained(model) for t in optimizer.state[p].values()]
    return [models.digest(model), *(t.clone() for t in model.state_dict().values()), *moments]


@pytest.mark.parametrize("owner", [(schedule, "_write"), (chain, "write"), (chain.State, "replan"), (chain, "_set_in")])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_moves_nothing(owner: Any, at):
    model = adapted(ia.Shira(density=0.1), torch.bfloat16)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    some_loss(model, X.bfloat16()).backward()
    optimizer.step()
    before, calls, real = _trace(model, optimizer), [], getattr(*owner)

    def fail(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise ZeroDivisionError
        return real(*given)

    with mock.patch.object(owner[0], owner[1], fail), pytest.raises(ZeroDivisionError):
        ia.regrow(model, "default", optimizer, data=[X.bfloat16()], share=0.3, loss=some_loss)
    after = _trace(model, optimizer)
    assert after[0] == before[0]
    assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))
    some_loss(model, X.bfloat16()).backward()


def test_moving_goes_on_under_another_adapter():
    """The one above stays as it is; the dense gradient goes through it."""
    model = adapted(ia.Shira(density=0.1), name="low")
    ia.attach(model, ia.Lora(2), name="high")
    ia.activate(model, "low", "high")
    before = model(X)
    moved = ia.regrow(model, "low", None, data=[X], share=0.1, loss=some_loss)
    assert moved == dict.fromkeys(SITES, 4)
    assert ia.active_names(model) == ["low", "high"]
    assert not torch.equal(model(X), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 1.5}, "share=1.5 must be in"),
        ({"scorer": "wanda"}, "scorer='wanda' must be one of gradient, snip, fisher"),
        ({"name": "b"}, "no adapter 'b'"),
        ({"data": []}, "calibration data is empty"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    model = adapted(ia.Shira(density=0.1))
    call: dict[str, Any] = {"name": "default", "optimizer": None, "data": [X], "loss": some_loss} | given
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.regrow(model, **call)


def test_only_a_live_support_moves():
    model = adapted(ia.Lora(2))
    with pytest.raises(ia.IntarsiaError, match="'default' is lora, whose support cannot move"):
        ia.regrow(model, "default", None, data=[X], loss=some_loss)
    ia.attach(model, ia.Shira(density=0.1), name="top")
    ia.activate(model, "default", "top")
    with pytest.raises(ia.IntarsiaError, match="up: 'top' is not live"):
        ia.regrow(model, "top", None, data=[X], loss=some_loss)


def test_an_optimizer_that_cannot_follow_is_refused():
    model = adapted(ia.Shira(density=0.2, granularity="row"))
    optimizer = torch.optim.Adafactor(trained(model), lr=1e-2)
    some_loss(model, X).backward()
    optimizer.step()
    with pytest.raises(
        ia.IntarsiaError, match="Adafactor keeps .* cannot follow a support that moves; use AdamW or SGD"
    ):
        ia.regrow(model, "default", optimizer, data=[X], loss=some_loss)


def test_the_schedule_of_a_run():
    """Every so many steps; less and less; not at all in the last quarter."""
    method = ia.Shira(schedule="drop-and-grow", every=10, swap=0.4)
    shares = {step: method.moves(step, 100) for step in range(1, 101) if method.moves(step, 100)}
    assert list(shares) == [10, 20, 30, 40, 50, 60, 70]
    assert shares[30] == pytest.approx(0.4 * (1 - 30 / 75))
    assert not any(ia.Shira().moves(step, 100) for step in range(1, 101))
    assert [ia.Shira(scorer=s, schedule="drop-and-grow").grows_by() for s in ("snip", "random")] == ["snip", "gradient"]
