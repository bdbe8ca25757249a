"""SMoRA against a loop over tokens and ranks, a mixture of LoRAs, plain LoRA, and what its balancing promises."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import intarsia as ia
from intarsia import edits
from intarsia import model as models
from intarsia.edits import GATES, Routed
from intarsia.methods import Smora
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, trained


def _by_hand(x: Tensor, state: Any, k: int, gate: str, scale: float) -> Tensor:
    """What is added, token by token and rank by rank, in plain numbers."""
    A, B, router, b = (tensor.detach().double() for tensor in (state.A, state.B, state.router, state.b))
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        z = [float(w @ token) for w in router]
        chosen = sorted(range(len(z)), key=lambda i: -(z[i] + float(b[i])))[:k]
        total = sum(math.exp(z[i]) for i in chosen)
        y = torch.zeros(B.shape[0], dtype=torch.float64)
        for i in chosen:
            g = {
                "softmax": k * math.exp(z[i]) / total,
                "logit": z[i],
                "sigmoid": 1 / (1 + math.exp(-z[i])),
                "binary": 1.0,
            }[gate]
            y += scale * g * float(A[i] @ token) * B[:, i]
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("through_a_deck", [False, True])
def test_forward_is_the_loop(gate, k, through_a_deck):
    model = adapted(Smora(6, k, alpha=3.0, gate=gate), torch.float64)
    state, x = state_of(model, "up"), some_input(torch.float64)
    with torch.no_grad():
        state.b.copy_(torch.tensor([0.3, -0.2, 0.0, 0.5, -0.4, 0.1]))
    layer = layer_of(model, "up")
    expected = F.linear(x, layer.weight, layer.bias) + _by_hand(x, state, k, gate, 3.0 / k)
    if through_a_deck:
        deck = ia.Deck(small_net(torch.float64))
        deck.add(a=ia.export(model))
        deck.use("a")
        layer = layer_of(deck.model, "up")
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-13)


def test_gradients_are_those_of_the_dense_formula():
    """With the choice held fixed: autograd through B (g * A x), g = k softmax over the chosen."""
    model, x = adapted(Smora(6, 2), torch.float64), some_input(torch.float64)
    state, layer = state_of(model, "up"), layer_of(model, "up")
    free = {name: getattr(state, name).detach().clone().requires_grad_() for name in ("A", "B", "router")}
    z = x @ free["router"].T
    mask = torch.full_like(z, -torch.inf).scatter(-1, z.topk(2).indices, 0.0)
    g = 2 * (z + mask).softmax(-1)
    expected = F.linear(x, layer.weight.detach(), layer.bias.detach()) + 2.0 * (g * (x @ free["A"].T)) @ free["B"].T
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    for name, tensor in free.items():
        torch.testing.assert_close(getattr(state, name).grad, tensor.grad, rtol=1e-9, atol=1e-13)


def test_all_ranks_and_an_indifferent_router_are_a_lora():
    """k = r, W_g = 0, of which every gate is 1."""
    model, lora, x = adapted(Smora(4, 4, alpha=6.0)), small_net(), some_input()
    ia.attach(lora, ia.Lora(4, alpha=6.0))
    with torch.no_grad():
        for site in SITES:
            state, theirs = state_of(model, site), state_of(lora, site)
            state.router.zero_()
            theirs.A.copy_(state.A)
            theirs.B.copy_(state.B)
    torch.testing.assert_close(model(x), lora(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_exactly_k_ranks_act_and_the_change_has_rank_k(k):
    state = state_of(adapted(Smora(5, k, gate="sigmoid"), torch.float64), "up")
    g = Routed(state.A, state.B, state.router, state.b, k, "sigmoid")
    x = some_input(torch.float64)
    gates, which = g.route(x)
    assert gates.shape == which.shape == (4, 3, k)
    assert all(len(set(row)) == k for row in which.view(-1, k).tolist())
    assert bool((gates > 0).all())
    for token in x.view(-1, 16)[:4]:
        values, ranks = g.route(token)
        gate = torch.zeros(5, dtype=torch.float64).scatter(0, ranks, values)
        change = g.B @ (gate[:, None] * g.A)
        assert int(torch.linalg.matrix_rank(change)) == k
        torch.testing.assert_close(g(token), change @ token, rtol=1e-12, atol=1e-14)


def test_a_mixture_of_loras_is_one_lora_with_gates_by_block():
    """Experts (A_n, B_n) with gates G_n are stacked A, B with g = G_n on block n (the paper's equivalence)."""
    generator = torch.Generator().manual_seed(0)
    N, r, x = 3, 2, some_input(torch.float64)
    A, B = (torch.randn(N, *shape, generator=generator, dtype=torch.float64) for shape in ((r, 16), (24, r)))
    G = torch.rand(4, 3, N, generator=generator, dtype=torch.float64)
    mixture = sum(G[..., n : n + 1] * (x @ A[n].T @ B[n].T) for n in range(N))
    zeros = torch.zeros(N * r, 16, dtype=torch.float64)
    stacked = A.reshape(-1, 16), torch.cat(list(B), 1)
    one = Routed(*stacked, zeros, zeros[:, 0], N * r, "logit")
    which = torch.arange(N * r).expand(4, 3, -1)
    torch.testing.assert_close(one.mixed(x, G.repeat_interleave(r, -1), which), mixture, rtol=1e-12, atol=1e-13)
    blocks = Routed(*stacked, zeros[:N], zeros[:N, 0], N, "logit")
    torch.testing.assert_close(blocks.mixed(x, G, which[..., :N]), mixture, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------ balance
def _favouring_rank_0(speed: float = 0.05) -> Any:
    net = nn.Sequential(nn.Linear(16, 24))
    ia.attach(net, Smora(6, 2, speed=speed))
    with torch.no_grad():  # z_0 = 3 x_0 and some, the others less
        state_of(net, "0").router[0, 0] = 3.0
        state_of(net, "0").B.normal_(generator=torch.Generator().manual_seed(1))
    return net


def _load(net: Any, x: Tensor) -> Tensor:
    state = state_of(net, "0")
    _, which = Routed(state.A, state.B, state.router, state.b, 2, "softmax").route(x)
    return which.flatten().bincount(minlength=6) / (which.numel() // 2)


def test_the_balance_follows_the_rule():
    net, x = _favouring_rank_0(speed=0.25), some_input(torch.float32, 64, 16).abs()
    state = state_of(net, "0")
    load = _load(net, x)
    assert float(load[0]) > 0.9
    optimizer = torch.optim.SGD(trained(net), lr=0.0)
    (net(x) ** 2).mean().backward()
    optimizer.step()
    torch.testing.assert_close(state.b.detach(), 0.25 * torch.sign(2 / 6 - load), rtol=0, atol=0)
    assert state.b.grad is None
    before = state.b.detach().clone()
    optimizer.step()  # nothing was seen in between
    assert torch.equal(state.b, before)


def test_a_favoured_rank_is_brought_down_to_its_share():
    net, x = _favouring_rank_0(speed=0.01), some_input(torch.float32, 256, 16).abs()
    optimizer = torch.optim.AdamW(trained(net), lr=0.0, weight_decay=0.1)
    before = _load(net, x)
    for _ in range(300):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = _load(net, x)
    assert float(before.max() / before.mean()) > 2.5
    assert float(after.max() / after.mean()) < 1.15
    assert float((after - 2 / 6).abs().max()) < 0.05


@pytest.mark.parametrize("way", ["whole", "accumulated", "reentrant", "checkpointed", "clipped", "rows"])
def test_the_counts_are_those_of_the_batch_however_it_is_computed(way):
    """The same b after a step: in parts of unequal size, recomputed in backward, clipped, or as rows of a batch beside another's."""
    net, x = _favouring_rank_0(), some_input(torch.float32, 32, 5, 16)
    optimizer = torch.optim.SGD(trained(net), lr=0.0)
    expected = 0.05 * torch.sign(2 / 6 - _load(net, x))
    if way == "accumulated":
        for part in x.split([7, 25]):
            net(part).square().sum().backward()
    elif way in ("reentrant", "checkpointed"):
        out: Any = checkpoint(net, x.clone().requires_grad_(), use_reentrant=way == "reentrant")
        out.square().sum().backward()
    elif way == "rows":
        ia.attach(net, Smora(6, 2), name="other", seed=1)
        with ia.rows(net, ["default"] * 32 + ["other"] * 32):
            net(torch.cat([x, -x])).square().sum().backward()
    else:
        (net(x).square().sum() * 1e6).backward()
    if way == "clipped":
        norm = torch.nn.utils.clip_grad_norm_(trained(net), 1e-3)
        assert math.isfinite(float(norm))
    optimizer.step()
    assert torch.equal(state_of(net, "0").b, expected)


def test_padding_does_not_count():
    net, x = _favouring_rank_0(speed=0.25), some_input(torch.float32, 8, 6, 16)
    optimizer = torch.optim.SGD(trained(net), lr=0.0)
    expected = 0.25 * torch.sign(2 / 6 - _load(net, x[:, :4]))
    x[:, 4:] = 10 * x[0, 0]
    net(x)[:, :4].square().sum().backward()
    optimizer.step()
    assert torch.equal(state_of(net, "0").b, expected)


def test_the_balance_is_not_moved_in_eval_mode_nor_by_weight_decay():
    net, x = _favouring_rank_0().eval(), some_input(torch.float32, 64, 16)
    optimizer = torch.optim.AdamW(trained(net), lr=0.1, weight_decay=0.5)
    with torch.no_grad():
        state_of(net, "0").b.fill_(1.0)
    net(x).square().mean().backward()
    optimizer.step()
    assert torch.equal(state_of(net, "0").b, torch.ones(6))


def test_the_choice_is_by_z_plus_b_and_the_gate_by_z_alone():
    state = state_of(adapted(Smora(6, 2), torch.float64), "up")
    x = some_input(torch.float64)
    far = torch.tensor([100.0, 0, 0, 0, 0, 100.0], dtype=torch.float64)
    gates, which = Routed(state.A, state.B, state.router, far, 2, "softmax").route(x)
    assert set(which.flatten().tolist()) == {0, 5}
    z = (x @ state.router.T).gather(-1, which)
    torch.testing.assert_close(gates, 2 * z.softmax(-1), rtol=1e-12, atol=0)


# ------------------------------------------------------------------ start, count, files, errors
@pytest.mark.parametrize(("gate", "count"), [("softmax", 6 * (24 + 32)), ("binary", 6 * (24 + 16))])
def test_counts_are_the_formulas(gate, count):
    assert Smora(6, 2, gate=gate).trained_count((24, 16)) == count
    net = adapted(Smora(6, 2, gate=gate))
    assert sum(p.numel() for p in state_of(net, "up").learned().values()) == count


def test_a_binary_router_stays_as_drawn_and_is_loaded_so(tmp_path):
    net = adapted(Smora(6, 2, gate="binary"))
    before = state_of(net, "up").router.clone()
    optimizer = torch.optim.SGD(trained(net), lr=0.1)
    some_loss(net, some_input()).backward()
    optimizer.step()
    assert torch.equal(state_of(net, "up").router, before)
    other = small_net()
    ia.load(other, ia.save(net, tmp_path / "a"), "x")
    assert not isinstance(state_of(other, "up", "x").router, nn.Parameter)
    assert torch.equal(other.eval()(some_input()), net.eval()(some_input()))


def test_starts_are_drawn_apart():
    net = nn.Sequential(nn.Linear(400, 300))
    ia.attach(net, Smora(64, 8))
    state = state_of(net, "0")
    for name in ("A", "router"):
        assert float(getattr(state, name).detach().std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert float((state.A * state.router).detach().mean()) == pytest.approx(0, abs=2e-5)
    assert not state.B.any()
    assert not state.b.any()


def test_b_keeps_its_bits_in_files_and_decks_of_fewer(tmp_path):
    net = adapted(Smora(6, 2)).eval()
    exact = torch.tensor([0.001, 1.001, -0.003, 0.0, 2.0001, 0.1])
    with torch.no_grad():
        state_of(net, "up").b.copy_(exact)
    adapter = ia.read(ia.save(net, tmp_path / "a", values="bfloat16"))
    insert: Any = adapter.edits["up.weight"]
    assert torch.equal(insert.inserted.b, exact)
    assert not torch.equal(insert.inserted.A, state_of(net, "up").A)
    ready = insert.ready(0.5, lambda: torch.zeros(24, 16), torch.bfloat16).inserted
    assert torch.equal(ready.b, exact)
    assert ready.A.dtype == torch.bfloat16
    assert models.states(net, "default")["up"].cast(torch.bfloat16).b.dtype == torch.float32  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("active", 0), ("active", 65), ("gate", "top"), ("speed", -1.0), ("alpha", 0.0), ("speed", math.inf)],
)
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(ia.IntarsiaError, match=f"smora: {field}="):
        Smora(**{field: value})


@pytest.mark.parametrize(
    ("tensors", "facts", "word"),
    [({"A": torch.zeros(4, 15)}, {}, "A is"), ({"B": torch.zeros(4, 24)}, {}, "B is"), ({"router": torch.zeros(4, 15)}, {}, "router is"),
     ({"b": torch.zeros(4, 1)}, {}, "b is"),
     ({"b": torch.zeros(3), "router": torch.zeros(3, 16)}, {}, "multiple"), ({"b": torch.zeros(())}, {}, "router is"), ({"b": torch.tensor([0, 0, math.nan, 0])}, {}, "not finite"), ({}, {"active": 5}, "active"),
     ({}, {"active": None}, "active"), ({}, {"gate": "top"}, "gate"), ({"more": torch.zeros(1)}, {}, "tensors")],
)  # fmt: skip
def test_a_file_that_makes_none_is_refused(tensors, facts, word):
    good = {"A": torch.zeros(4, 16), "B": torch.zeros(24, 4), "router": torch.zeros(4, 16), "b": torch.zeros(4)}
    said = {
        "type": "insert",
        "what": "mixture of ranks",
        "place": "parallel",
        "scale": 1.0,
        "active": 2,
        "gate": "softmax",
    }
    edits.build_edit("insert", (24, 16), good, said)
    with pytest.raises(ia.IntarsiaError, match=word):
        edits.build_edit("insert", (24, 16), good | tensors, said | facts)


def test_a_file_of_another_config_is_refused(tmp_path):
    saved = ia.export(adapted(Smora(4, 2)), called="a")
    others: list[dict[str, Any]] = [{"rank": 5}, {"active": 1}, {"gate": "sigmoid"}]
    for number, other in enumerate(others):
        ia.store.write(dataclasses.replace(saved, method=dict(saved.method) | other), tmp_path / str(number))
        with pytest.raises(ia.IntarsiaError, match=r"up: the file has .*config"):
            ia.load(small_net(), tmp_path / str(number))


def test_scaled_and_followed_by_a_matrix():
    state, x = state_of(adapted(Smora(6, 2), torch.float64), "up"), some_input(torch.float64)
    g = Routed(state.A, state.B, state.router, state.b, 2, "softmax")
    W = some_input(torch.float64, 7, 24, seed=5)
    torch.testing.assert_close(g.times(-0.3)(x), -0.3 * g(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(g.through(W)(x), g(x) @ W.T, rtol=1e-12, atol=1e-13)
    assert g.multiplications == 6 * (16 + 24 + 16) + 6
