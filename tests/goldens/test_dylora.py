"""DyLoRA against its card: every prefix is a LoRA of its own, in the output, in the gradients and in the file."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import intarsia as ia
from intarsia import compress
from intarsia.cli.app import app
from intarsia.methods import Dylora
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, trained


def _at(model: torch.nn.Module, b: int) -> None:
    for site in SITES:
        state_of(model, site).drawn.fill_(b)


def _plain(model: torch.nn.Module, b: int, scale: float, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A net with LoRA of rank b, its factors cut out by hand."""
    other = small_net(dtype)
    ia.attach(other, ia.Lora(rank=b, alpha=scale, scaling="none"))
    with torch.no_grad():
        for site in SITES:
            state_of(other, site).A.copy_(state_of(model, site).A[:b])
            state_of(other, site).B.copy_(state_of(model, site).B[:, :b])
    return other


@pytest.mark.parametrize("update", ["full", "frozen"])
@pytest.mark.parametrize(
    ("scaling", "scale"), [("paper", lambda b: 12 / b), ("code", lambda b: 12 / 4 * (4 / b) ** 0.5)]
)
def test_at_every_rank_it_is_the_lora_of_the_first_rows(scaling, scale, update):
    model, base = small_net(torch.float64), small_net(torch.float64)
    ia.attach(model, Dylora(rank=4, alpha=12.0, scaling=scaling, update=update))
    x = some_input(torch.float64)
    for b in range(1, 5):
        _at(model, b)
        assert torch.equal(model(x), base(x))  # B = 0 at the start
    model = adapted(Dylora(rank=4, alpha=12.0, scaling=scaling, update=update), torch.float64)
    for b in range(1, 5):
        _at(model, b)
        plain = _plain(model, b, scale(b))
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
        model.zero_grad()
        some_loss(model, x).backward()
        some_loss(plain, x).backward()
        for site in SITES:
            mine, theirs = state_of(model, site), state_of(plain, site)
            first = b - 1 if update == "frozen" else 0
            torch.testing.assert_close(mine.A.grad[first:b], theirs.A.grad[first:], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(mine.B.grad[:, first:b], theirs.B.grad[:, first:], rtol=1e-10, atol=1e-12)
            assert not mine.A.grad[b:].any()
            assert not mine.B.grad[:, b:].any()
            assert not mine.A.grad[:first].any()
            assert not mine.B.grad[:, :first].any()
    torch.testing.assert_close(model.eval()(x), _plain(model, 4, 3.0)(x), rtol=1e-12, atol=1e-12)


def test_where_only_the_highest_rank_is_drawn_it_is_lora_step_by_step():
    nested, plain = small_net(), small_net()
    ia.attach(nested, Dylora(rank=3, lowest=3), seed=4)
    ia.attach(plain, ia.Lora(rank=3), seed=4)
    optimizers = [torch.optim.AdamW(trained(model), lr=1e-2) for model in (nested, plain)]
    for step in range(5):
        for model, optimizer in zip((nested, plain), optimizers, strict=True):
            optimizer.zero_grad()
            some_loss(model, some_input(seed=step)).backward()
            optimizer.step()
        for site in SITES:
            for name in "AB":
                torch.testing.assert_close(getattr(state_of(nested, site), name), getattr(state_of(plain, site), name))


def test_the_prefixes_are_nested():
    """With alpha / b, b delta(b) - (b - 1) delta(b - 1) is one rank, and delta(b) - delta(b - 1) is b of them."""
    adapter = ia.export(adapted(Dylora(rank=5), torch.float64))
    deltas = {
        b: compress.to_prefix(adapter, b).edits["up.weight"].delta(torch.zeros(24, 16, dtype=torch.float64))
        for b in range(1, 6)
    }
    for b in range(2, 6):
        assert int(torch.linalg.matrix_rank(b * deltas[b] - (b - 1) * deltas[b - 1], rtol=1e-10)) == 1
        assert int(torch.linalg.matrix_rank(deltas[b] - deltas[b - 1], rtol=1e-10)) == b


def test_one_rank_is_drawn_for_all_layers_and_follows_from_step_and_seed():
    model, other = small_net(), small_net()
    ia.attach(model, Dylora(rank=4))
    ia.attach(other, Dylora(rank=4, seed=1))
    drawn: list[list[int]] = [[], []]
    for one, found in zip((model, other), drawn, strict=True):
        optimizer = torch.optim.SGD(trained(one), lr=0.0)
        for _ in range(60):
            ranks = {int(state_of(one, site).drawn) for site in SITES}
            assert len(ranks) == 1
            found.append(ranks.pop())
            some_loss(one, some_input()).backward()
            optimizer.step()
    assert drawn[0] != drawn[1]
    assert set(drawn[0]) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("method", "chances"),
    [
        (Dylora(rank=4), {1: 1 / 4, 2: 1 / 4, 3: 1 / 4, 4: 1 / 4}),
        (Dylora(rank=6, unit=2, lowest=3, decay=0.5), {4: 2 / 3, 6: 1 / 3}),
        (Dylora(rank=3, decay=0.5), {1: 4 / 7, 2: 2 / 7, 3: 1 / 7}),
    ],
    ids=["uniform", "units", "geometric"],
)
def test_ranks_come_as_often_as_they_should(method, chances):
    found = Counter(int(method._draw(torch.tensor(step))) for step in range(3000))
    assert set(found) == set(chances)
    for rank, chance in chances.items():
        assert found[rank] / 3000 == pytest.approx(chance, abs=0.03)


def test_frozen_leaves_the_other_ranks_to_the_bit():
    """Under AdamW with weight decay, whose moments and decay move what has no gradient."""
    model = adapted(Dylora(rank=4, update="frozen"))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.3)
    for step in range(12):
        b = int(state_of(model, "up").drawn)
        before = {k: t.clone() for k, t in ia.adapter_state(model, "default").items()}
        optimizer.zero_grad()
        some_loss(model, some_input(seed=step)).backward()
        optimizer.step()
        for site in SITES:
            A, B = state_of(model, site).A, state_of(model, site).B
            others = [number for number in range(4) if number != b - 1]
            assert torch.equal(A[others], before[f"{site}/A"][others])
            assert torch.equal(B[:, others], before[f"{site}/B"][:, others])
            assert not torch.equal(A[b - 1], before[f"{site}/A"][b - 1])


@pytest.mark.parametrize("update", ["full", "frozen"])
def test_a_resumed_run_draws_on(update):
    def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            some_loss(model, some_input(seed=step)).backward()
            optimizer.step()

    whole, half, again = (small_net() for _ in range(3))
    optimizers = []
    for model in (whole, half, again):
        ia.attach(model, Dylora(rank=4, update=update))
        optimizers.append(torch.optim.AdamW(trained(model), lr=1e-2))
    run(whole, optimizers[0], 0, 12)
    run(half, optimizers[1], 0, 5)
    ia.load_adapter_state(again, "default", {k: t.clone() for k, t in ia.adapter_state(half, "default").items()})
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    run(again, optimizers[2], 5, 12)
    mine, theirs = ia.adapter_state(whole, "default"), ia.adapter_state(again, "default")
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("scaling", ["paper", "code"])
def test_every_rank_can_be_taken_out_of_a_saved_adapter(tmp_path, scaling):
    model = adapted(Dylora(rank=6, unit=2, scaling=scaling))
    ia.save(model, tmp_path / "whole")
    x = some_input()
    other: Any = None
    for b in (2, 4, 6):
        command = ["compress", str(tmp_path / "whole"), str(tmp_path / f"r{b}"), "--to", "prefix", "--rank", str(b)]
        assert CliRunner().invoke(app, command).exit_code == 0
        _at(model, b)
        other = small_net()
        ia.load(other, tmp_path / f"r{b}")
        assert json.loads((tmp_path / f"r{b}" / "adapter.json").read_text())["method"]["name"] == "lora"
        assert tuple(state_of(other, "up", f"r{b}").A.shape) == (b, 16)
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.eval()(x), other(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ia.IntarsiaError, match="rank=3 was not trained; expected one of 2, 4, 6"):
        compress.to_prefix(ia.read(tmp_path / "whole"), 3)
    plain = small_net()
    ia.attach(plain, ia.Lora(2))
    with pytest.raises(ia.IntarsiaError, match="the first ranks of lora are no adapter of their own"):
        compress.to_prefix(ia.export(plain), 1)
    assert layer_of(plain, "up").active == ("default",)
