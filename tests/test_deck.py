"""The deck: whatever is set in, fused, failed or interrupted, taking out gives back the very bits."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import random
import threading
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import intarsia as ia
from intarsia.deck import crew
from intarsia.deck import deck as deck_module
from intarsia.deck import inserts as inserts_module
from intarsia.deck import plan as plan_module
from intarsia.deck import writer as writer_module
from intarsia.edits import Insert, LowRank, Sparse, Sum, add, columns, elements, positions, scale
from intarsia.methods import Bottleneck
from intarsia.store import Base, tensor_digest
from intarsia.support import named_granularity
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, weights

METHODS: dict[str, ia.Method] = {
    "elements": ia.Shira(density=0.1),
    "largest": ia.Shira(density=0.2, scorer="magnitude"),
    "columns": ia.Paca(3),
    "low_rank": ia.Lora(2),
    "lengths": ia.Dora(ia.Lora(2)),
    "sparse_lengths": ia.Dora(ia.Shira(density=0.1)),
}
INSERTS: dict[str, ia.Method] = {
    "parallel": Bottleneck(3, scale=2.0),
    "after": Bottleneck(3, "after", "gelu", train_scale=True),
    "before": Bottleneck(3, "before"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@functools.cache
def _adapters(dtype: torch.dtype) -> dict[str, ia.Adapter]:
    return {
        name: ia.export(adapted(method, dtype, seed=number), called=name)
        for number, (name, method) in enumerate(METHODS.items())
    }


def _deck(dtype: torch.dtype = torch.float32, *names: str, **given: Any) -> ia.Deck:
    deck = ia.Deck(small_net(dtype), **given)
    deck.add(*[adapter for name, adapter in _adapters(dtype).items() if not names or name in names])
    return deck


@functools.cache
def _inserts(dtype: torch.dtype) -> dict[str, ia.Adapter]:
    """Adapters with inserts beside all three layers, and ``mixed``, which changes entries of their weights too."""
    made = {
        name: ia.export(adapted(method, dtype, seed=number), called=name)
        for number, (name, method) in enumerate(INSERTS.items())
    }
    parts = made["after"].edits, _adapters(dtype)["elements"].edits
    edits = {weight: add(parts[0][weight], parts[1][weight]) for weight in parts[0]}
    return made | {"mixed": ia.Adapter("mixed", edits, made["after"].base, {"name": "by hand"})}


def _deck_of_all(dtype: torch.dtype = torch.float32, **given: Any) -> ia.Deck:
    deck = _deck(dtype, **given)
    deck.add(*_inserts(dtype).values())
    return deck


def _bits(model: torch.nn.Module) -> str:
    """What stands in memory, adapters or not."""
    return ia.digest(model)


def _standing(model: torch.nn.Module) -> tuple[str, str, Any]:
    """What stands in memory, what comes out, and what each layer is."""
    with torch.no_grad():
        y = model(some_input(next(model.parameters()).dtype))
    return _bits(model), tensor_digest(y), [(type(layer), sorted(vars(layer))) for layer in model.children()]


class Faults:
    """Raises at chosen calls of the steps of a switch, before or after the step itself was done."""

    STEPS = (
        (writer_module, "put_row"),
        (writer_module, "native_merge"),
        (plan_module, "put"),
        (plan_module, "summed"),
        (deck_module, "place"),
        (inserts_module, "put_beside"),
        (inserts_module, "take_away"),
    )

    def __init__(self, at: set[int], late: bool, error: type[BaseException]):
        self.at, self.late, self.error, self.calls, self.raised = at, late, error, 0, 0

    def __enter__(self) -> Faults:
        self.patches = [mock.patch.object(owner, name, self._wrap(getattr(owner, name))) for owner, name in self.STEPS]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()

    def _wrap(self, real: Any) -> Any:
        def step(*args: Any) -> Any:
            self.calls += 1
            now = self.calls in self.at
            if now and not self.late:
                self.raised += 1
                raise self.error("planted")
            done = real(*args)
            if now:
                self.raised += 1
                raise self.error("planted")
            return done

        return step


def _random_switch(deck: ia.Deck, chance: random.Random) -> Any:
    names = chance.sample(deck.names, chance.randint(1, 4))
    kind = chance.choice(["use", "use", "fuse", "fuse", "off", "strength"])
    if kind == "use":
        return functools.partial(deck.use, names[0])
    if kind == "strength":
        return functools.partial(deck.use, names[0], chance.choice([0.0, -1.0, 0.25, 1.25]))
    if kind == "fuse":
        return functools.partial(deck.fuse, {name: chance.uniform(-1, 1) for name in names})
    return deck.off


@pytest.mark.parametrize(
    ("dtype", "writer"),
    [*zip(DTYPES, ["torch"] * 3, strict=True), (torch.bfloat16, "native"), (torch.float32, "staged")],
    ids=str,
)
def test_a_thousand_switches_with_failures_give_the_base_back(dtype, writer):
    """use, off and fuse at random over all kinds of edits; in every third call something raises in the middle, once or
    twice (in the giving back too), an error or Ctrl-C, before or after the step was done."""
    if writer == "native":
        pytest.importorskip("numba")
    deck, chance = _deck_of_all(dtype, writer=writer), random.Random(str(dtype))
    start, untouched = ia.digest(deck.model), _standing(deck.model)
    failed = mended = 0
    for _ in range(1000):
        switch = _random_switch(deck, chance)
        if chance.random() < 0.33:
            before, active = _standing(deck.model), deck.active
            at = {chance.randint(1, 5)} | ({chance.randint(1, 15)} if chance.random() < 0.5 else set())
            error = chance.choice([ZeroDivisionError, KeyboardInterrupt])
            with Faults(at, chance.random() < 0.5, error) as faults:
                try:
                    switch()
                except (ZeroDivisionError, KeyboardInterrupt):
                    failed += 1
                else:
                    assert not faults.raised
            if faults.raised == 1:
                assert deck.active == active
                assert _standing(deck.model) == before
            if faults.raised == 2:
                mended += 1
                deck.off()
                assert _standing(deck.model) == untouched
        else:
            switch()
    assert failed > 150
    assert mended > 5
    deck.off()
    assert _standing(deck.model) == untouched
    assert deck.verify() == start


class Switching(RuleBasedStateMachine):
    """What is in the weights depends on what is set in, and on nothing that was set in before."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.deck = _deck_of_all(self.dtype)
        self.seen: dict[Any, Any] = {(): _standing(self.deck.model)}

    names = st.sampled_from(sorted([*METHODS, *INSERTS, "mixed"]))
    strengths = st.sampled_from([-1.0, 0.5, 1.0, 1.25])

    @rule(name=names, strength=strengths)
    def use(self, name, strength):
        self.deck.use(name, strength)
        assert self.deck.active == {name: strength}

    @rule(shares=st.dictionaries(names, strengths, min_size=1, max_size=3))
    def fuse(self, shares):
        self.deck.fuse(dict(sorted(shares.items())))
        assert self.deck.active == shares

    @rule()
    def off(self):
        self.deck.off()
        assert self.deck.active == {}

    @rule()
    def prefetch(self):
        for name in METHODS:
            self.deck.prefetch(name).result()

    @rule(strength=strengths)
    def strength(self, strength):
        if self.deck.active:
            names = set(self.deck.active)
            self.deck.strength(strength)
            assert set(self.deck.active) == names

    @rule(name=names, at=st.integers(1, 10), late=st.booleans())
    def fail(self, name, at, late):
        active = self.deck.active
        with Faults({at}, late, KeyboardInterrupt) as faults:
            try:
                self.deck.use(name)
            except KeyboardInterrupt:
                assert self.deck.active == active
        assert faults.raised or self.deck.active == {name: 1.0}

    @rule(name=names, weight=st.sampled_from([float("nan"), float("inf"), True, None, "1", 1e39]))
    def refuse(self, name, weight):
        active = self.deck.active
        with pytest.raises(ia.IntarsiaError, match="finite"):
            self.deck.use(name, weight)
        assert self.deck.active == active

    @rule()
    def verify(self):
        active = self.deck.active
        assert self.deck.verify() == self.deck.base_digest
        assert self.deck.active == active

    @invariant()
    def same_setting_same_bits(self):
        setting, found = tuple(self.deck.active.items()), _standing(self.deck.model)
        assert self.seen.setdefault(setting, found) == found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_of_calls_gives_the_same_bits(dtype):
    machine = type("Switching", (Switching,), {"dtype": dtype})
    run_state_machine_as_test(machine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None))


def test_threads_that_switch_at_once_do_no_harm():
    deck = _deck_of_all()
    start = _standing(deck.model)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            _random_switch(deck, chance)()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    deck.off()
    assert _standing(deck.model) == start


# ------------------------------------------------------------------ what is set in
def _by_hand(dtype: torch.dtype, edits: dict[str, Any]) -> ia.Adapter:
    """An adapter of the small net from its edits, as if it had been trained on it."""
    return ia.Adapter("x", edits, Base(ia.digest(small_net(dtype)), str(dtype)), {"name": "shira"})


def test_sums_are_exact_on_the_union():
    """Overlapping elements add up, others keep their own, the rest of the weight keeps its bits: in float64, exactly."""
    W = layer_of(small_net(torch.float64), "up").weight.detach().clone().view(-1)
    values = some_input(torch.float64, 6)
    one = elements((24, 16), torch.tensor([3, 50, 383]), values[:3])
    two = elements((24, 16), torch.tensor([0, 50, 51]), values[3:])
    deck = ia.Deck(small_net(torch.float64))
    deck.add(a=_by_hand(torch.float64, {"up.weight": one}), b=_by_hand(torch.float64, {"up.weight": two}))
    deck.fuse(a=0.6, b=-0.3)
    expected = W.clone()
    for i, total in {
        3: 0.6 * values[0],
        50: 0.6 * values[1] + -0.3 * values[4],
        383: 0.6 * values[2],
        0: -0.3 * values[3],
        51: -0.3 * values[5],
    }.items():
        expected[i] = W[i] + total
    assert torch.equal(layer_of(deck.model, "up").weight.view(-1), expected)
    assert layer_of(deck.model, "down").weight.equal(layer_of(small_net(torch.float64), "down").weight)


def test_sums_of_columns_are_exact_on_the_union():
    W = layer_of(small_net(torch.float64), "up").weight.detach().clone()
    values = some_input(torch.float64, 24, 4)
    one = columns((24, 16), torch.tensor([1, 7]), values[:, :2].contiguous())
    two = columns((24, 16), torch.tensor([7, 9]), values[:, 2:].contiguous())
    deck = ia.Deck(small_net(torch.float64))
    deck.add(a=_by_hand(torch.float64, {"up.weight": one}), b=_by_hand(torch.float64, {"up.weight": two}))
    deck.fuse({"a": 2.0, "b": 0.5})
    W[:, 1] += 2.0 * values[:, 0]
    W[:, 7] += 2.0 * values[:, 1] + 0.5 * values[:, 2]
    W[:, 9] += 0.5 * values[:, 3]
    assert torch.equal(layer_of(deck.model, "up").weight, W)


@pytest.mark.parametrize("names", [("elements", "columns"), ("elements", "low_rank"), ("lengths", "columns")], ids=str)
def test_fusions_of_different_kinds_are_the_sum_of_their_changes(names):
    deck, base = _deck(torch.float32), weights(small_net())
    alone = {}
    for name in names:
        alone[name] = {s: deck[name].edits[f"{s}.weight"].fold(base[s].double()) - base[s].double() for s in SITES}
    deck.fuse({names[0]: 0.7, names[1]: -0.4})
    for site, found in weights(deck.model).items():
        expected = base[site].double() + 0.7 * alone[names[0]][site] - 0.4 * alone[names[1]][site]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_strength_goes_in_a_straight_line_from_the_base(name):
    deck, base = _deck(), weights(small_net())
    deck.use(name)
    whole = weights(deck.model)
    for strength in (0.0, 0.5, -1.0, 2.0):
        deck.use(name, strength)
        for site, found in weights(deck.model).items():
            expected = base[site].double() + strength * (whole[site].double() - base[site].double())
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_adapters_leave_the_rest_of_the_weight_alone(dtype):
    deck, base = _deck(dtype), weights(small_net(dtype))
    deck.fuse(elements=1.0, largest=-0.5)
    for site, found in weights(deck.model).items():
        index = torch.cat([deck[name].edits[f"{site}.weight"].index for name in ("elements", "largest")])  # type: ignore[attr-defined]
        outside = torch.ones(found.numel(), dtype=torch.bool).index_fill(0, index, False)
        assert torch.equal(found.view(-1)[outside], base[site].view(-1)[outside])
        assert not torch.equal(found, base[site])


def test_values_are_rounded_once():
    """bf16: the sum of base and adapters is rounded at the end, not each of them, and not their sum before the base."""
    base = small_net(torch.bfloat16)
    with torch.no_grad():
        layer_of(base, "up").weight.view(-1)[5] = 1.0
    known, deck = Base(ia.digest(base), "bfloat16"), ia.Deck(base)
    # Three times 0.4 of half a step, one of them hardly above half a step: alone in bf16 it would be half, a tie.
    for name, delta in {"a": 0.4 * 2**-8, "b": 0.4 * 2**-8, "c": 0.4 * 2**-8, "more": 2**-8 * (1 + 2**-9)}.items():
        edit = elements((24, 16), torch.tensor([5]), torch.tensor([delta]))
        deck.add(ia.Adapter(name, {"up.weight": edit}, known, {}))
    for shares, expected in (
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 1.0078125),
        ({"a": 1.0}, 1.0),
        ({"more": 1.0}, 1.0078125),
    ):
        deck.fuse(shares)
        assert float(weights(deck.model)["up"].view(-1)[5]) == expected


def test_a_deck_gives_what_training_gave():
    for name, method in METHODS.items():
        model, deck = adapted(method, seed=list(METHODS).index(name)), _deck()
        deck.use(name)
        torch.testing.assert_close(deck.model(some_input()), model(some_input()), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ refusals
BAD = [float("nan"), float("inf"), -float("inf"), True, None, "1", [1.0], torch.tensor(1.0)]


@pytest.mark.parametrize("weight", BAD, ids=str)
def test_sharesthat_are_no_finite_numbers_are_refused(weight):
    deck = _deck()
    deck.use("columns")
    before = _bits(deck.model)
    for call in (lambda: deck.use("elements", weight), lambda: deck.fuse(elements=1.0, columns=weight)):
        with pytest.raises(ia.IntarsiaError, match="expected a finite number"):
            call()
        assert deck.active == {"columns": 1.0}
        assert _bits(deck.model) == before


@pytest.mark.parametrize("name", METHODS)
def test_a_strength_that_overflows_is_refused(name):
    deck = _deck(torch.float16)
    deck.use("columns")
    before = _bits(deck.model)
    with pytest.raises(ia.IntarsiaError, match=r"(up|down|again).*not finite in torch.float16"):
        deck.use(name, 1e9)
    assert deck.active == {"columns": 1.0}
    assert _bits(deck.model) == before


def test_unknown_names_are_refused_with_the_nearest():
    deck = _deck()
    for call in (deck.use, deck.remove, deck.__getitem__, lambda name: deck.fuse({name: 1.0})):
        with pytest.raises(ia.IntarsiaError, match="'colums'.*did you mean 'columns'"):
            call("colums")
    with pytest.raises(ia.IntarsiaError, match="no adapters"):
        deck.fuse()


def test_another_base_is_refused_unless_asked_for():
    adapter = _adapters(torch.float32)["elements"]
    deck = ia.Deck(small_net(seed=1))
    with pytest.raises(ia.IntarsiaError, match="another base.*its weights differ.*any_base=True"):
        deck.add(adapter)
    assert deck.names == []
    deck.add(adapter, any_base=True)
    deck.use("elements")
    deck.off()
    assert deck.verify() == ia.digest(small_net(seed=1))
    with pytest.raises(ia.IntarsiaError, match="made on float32, this model is bfloat16"):
        ia.Deck(small_net(torch.bfloat16)).add(adapter)


def test_other_shapes_are_refused_even_for_any_base():
    deck = ia.Deck(torch.nn.Sequential(torch.nn.Linear(16, 24)))
    with pytest.raises(ia.IntarsiaError, match="no such weight that can be adapted"):
        deck.add(_adapters(torch.float32)["elements"], any_base=True)
    model = small_net()
    model.set_submodule("down", torch.nn.Linear(24, 24))
    with pytest.raises(ia.IntarsiaError, match=r"down.weight: the adapter edits \(16, 24\), the model has \(24, 24\)"):
        ia.Deck(model).add(_adapters(torch.float32)["elements"], any_base=True)


def test_tied_sharesare_refused():
    model = small_net()
    layer_of(model, "again").weight = layer_of(model, "up").weight
    adapter = _by_hand(torch.float32, {"again.weight": elements((24, 16), torch.tensor([1]), torch.ones(1))})
    with pytest.raises(ia.IntarsiaError, match="tied to up.weight"):
        ia.Deck(model).add(adapter, any_base=True)


def test_adding_is_all_or_nothing(tmp_path):
    ia.save(adapted(ia.Shira(density=0.1)), tmp_path / "good")
    deck = ia.Deck(small_net())
    with pytest.raises(ia.IntarsiaError, match="does not exist"):
        deck.add(tmp_path / "good", tmp_path / "missing")
    assert deck.names == []
    deck.add(tmp_path / "good", other=tmp_path / "good")
    assert deck.names == ["good", "other"]
    with pytest.raises(ia.IntarsiaError, match="'good' already"):
        deck.add(tmp_path / "good")
    with pytest.raises(ia.IntarsiaError, match="'good' already"):
        deck.add(third=tmp_path / "good", good=tmp_path / "good")
    assert deck.names == ["good", "other"]


def test_an_adapter_is_not_removed_while_it_is_set_in():
    deck = _deck()
    deck.fuse(elements=0.5, columns=0.5)
    with pytest.raises(ia.IntarsiaError, match="'columns' is set in.*off"):
        deck.remove("columns")
    deck.remove("low_rank")
    assert "low_rank" not in deck.names
    deck.off()
    deck.remove("columns")
    assert "columns" not in deck.names


# ------------------------------------------------------------------ others who write
def test_training_and_a_deck_do_not_mix(tmp_path):
    model = small_net()
    ia.attach(model, ia.Shira(density=0.1), name="mine")
    ia.save(model, tmp_path / "mine")
    ia.activate(model)
    start, deck = ia.digest(model), ia.Deck(model)
    deck.add(*_adapters(torch.float32).values())
    deck.use("elements")
    before, calls = _bits(model), [
        lambda: ia.attach(model, ia.Lora(2), name="second"),
        lambda: ia.load(model, tmp_path / "mine", "third"),
        lambda: ia.activate(model, "mine"),
        lambda: ia.rows(model, ["mine"]).__enter__(),
        lambda: ia.save(model, tmp_path / "dirty", "mine"),
        lambda: ia.Deck(model),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ia.IntarsiaError, match="elements is set into this model by a deck"):
            call()
        assert _bits(model) == before
    assert ia.attached_names(model) == ["mine"]
    ia.activate(model)  # nothing is already what acts
    deck.off()
    ia.activate(model, "mine")
    for call in (lambda: deck.use("columns"), deck.off, lambda: ia.Deck(model)):
        with pytest.raises(ia.IntarsiaError, match="activate"):
            call()
    ia.activate(model)
    deck.use("columns")
    ia.detach(model, "mine")
    deck.off()
    assert ia.digest(model) == start == ia.digest(small_net())


def test_two_decks_on_one_model_take_turns():
    model = small_net()
    decks = [ia.Deck(model) for _ in range(2)]
    for deck in decks:
        deck.add(*_adapters(torch.float32).values())
    decks[0].use("elements")
    for call in (lambda: decks[1].use("columns"), decks[1].off, decks[1].verify):
        with pytest.raises(ia.IntarsiaError, match="elements is set into this model by a deck"):
            call()
    decks[0].off()
    decks[1].use("columns")
    decks[1].off()
    assert ia.digest(model) == decks[0].base_digest


def test_a_deck_that_is_gone_is_named():
    model = small_net()
    deck = ia.Deck(model)
    deck.add(*_adapters(torch.float32).values())
    deck.use("elements")
    del deck
    gc.collect()
    with pytest.raises(ia.IntarsiaError, match="a deck that is gone.*load the base again"):
        ia.Deck(model)


@pytest.mark.parametrize("set_in", [True, False])
def test_verify_finds_what_somebody_else_wrote(set_in):
    deck = _deck()
    if set_in:
        deck.use("elements")
    index = deck["elements"].edits["down.weight"].index  # type: ignore[attr-defined]
    outside = next(i for i in itertools.count() if i not in index.tolist())
    with torch.no_grad():
        layer_of(deck.model, "down").weight.view(-1)[outside] += 1e-6
    with pytest.raises(ia.IntarsiaError, match="something other than the deck wrote"):
        deck.verify()
    with torch.no_grad():
        layer_of(deck.model, "down").weight.copy_(layer_of(small_net(), "down").weight)
    deck.off()
    assert deck.verify() == deck.base_digest


def test_a_model_still_trains_after_a_deck():
    deck = _deck()
    deck.use("lengths")
    deck.off()
    ia.attach(deck.model, ia.Shira(density=0.1))
    optimizer = torch.optim.AdamW([p for p in deck.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = some_loss(deck.model, some_input())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert ia.digest(deck.model) == deck.base_digest


def test_switching_writes_no_file(tmp_path):
    """So a process that is killed in the middle of a switch finds everything whole when it starts again."""
    ia.save(adapted(ia.Shira(density=0.1)), tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    deck = ia.Deck(small_net())
    deck.add(tmp_path / "a")
    for _ in range(3):
        deck.use("a", 0.5)
        deck.off()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_that_changes_later_does_not_change_the_deck(tmp_path):
    ia.save(adapted(ia.Shira(density=0.1)), tmp_path / "a")
    deck = ia.Deck(small_net())
    deck.add(tmp_path / "a")
    deck.use("a")
    before = _bits(deck.model)
    with open(tmp_path / "a" / "adapter.safetensors", "r+b") as file:
        file.truncate(8)
    deck.off()
    deck.use("a")
    assert _bits(deck.model) == before


def test_low_rank_edits_of_any_dtype_fit(tmp_path):
    edit = LowRank((24, 16), some_input(torch.bfloat16, 24, 2), some_input(torch.bfloat16, 2, 16), 0.5)
    deck = ia.Deck(small_net())
    deck.add(a=_by_hand(torch.float32, {"up.weight": edit}))
    deck.use("a")
    expected = weights(small_net())["up"] + 0.5 * edit.B.float() @ edit.A.float()
    torch.testing.assert_close(layer_of(deck.model, "up").weight.detach(), expected)
    deck.off()
    assert deck.verify() == deck.base_digest


# ------------------------------------------------------------------ what is kept, planned and noticed
WRITERS = ["torch", "native", "staged"]


def _writer(name: str) -> str:
    if name == "native":
        pytest.importorskip("numba")
    return name


def _mixed(dtype: torch.dtype) -> dict[str, ia.Adapter]:
    """Adapters of every granularity, widths that divide the weights and others, on all three weights."""
    made = {}
    for number, (name, width) in enumerate(
        [
            ("element", None),
            ("line", 4),
            ("line", 3),
            ("tile", 2),
            ("tile", 5),
            ("row", 1),
            ("column", 2),
            ("diagonal", None),
        ]
    ):
        edits: dict[str, Any] = {}
        for site, layer in small_net(dtype).named_children():
            if isinstance(layer, torch.nn.Linear):
                shape = (layer.out_features, layer.in_features)
                unit = named_granularity(name, width)
                dice = torch.Generator().manual_seed(number)
                index = (
                    torch.randperm(unit.units(shape), generator=dice)[: max(1, unit.units(shape) // 3)].sort().values
                )
                values = torch.randn(unit.values_shape(shape, len(index)), generator=dice)
                edits[f"{site}.weight"] = Sparse(shape, unit, index, values)
        key = f"{name}{width or ''}"
        made[key] = ia.Adapter(key, edits, Base(ia.digest(small_net(dtype)), str(dtype)), {"name": "shira"})
    return made


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_from_any_granularity_to_any_other_is_as_from_the_base(dtype, threads, writer, monkeypatch):
    monkeypatch.setattr(writer_module, "SMALL", 0)
    monkeypatch.setattr(crew, "size", lambda: threads)
    adapters = _mixed(dtype)
    deck = ia.Deck(small_net(dtype), writer=_writer(writer))
    deck.add(*adapters.values())
    alone = {}
    for name, adapter in adapters.items():
        deck.use(name)
        base = weights(small_net(dtype))
        for site, found in weights(deck.model).items():
            wide = base[site].to(torch.promote_types(dtype, torch.float32))
            assert found.equal(adapter.edits[f"{site}.weight"].fold(wide).to(dtype))
        alone[name] = _bits(deck.model)
        deck.off()
        assert _bits(deck.model) == deck.base_digest
    for one, other in itertools.permutations(adapters, 2):
        deck.use(one)
        deck.use(other)
        assert _bits(deck.model) == alone[other], (one, other)
    deck.off()
    assert deck.verify() == deck.base_digest


@pytest.mark.parametrize("first", [0, 1])  # entry of the memory where the weight begins
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_runs_of_whole_lines_of_the_cache(dtype, writer, first):
    """Overlapping supports of lines and rows of 64 bytes and more: from each to each as from the base."""
    dice = torch.Generator().manual_seed(0)
    W = torch.randn(40 * 96 + first, generator=dice).to(dtype)[first:].view(40, 96)
    layer = torch.nn.Linear(96, 40, bias=False)
    layer.weight = torch.nn.Parameter(W)
    model = torch.nn.Sequential(layer)
    base, deck, wanted = W.clone(), ia.Deck(model, writer=_writer(writer)), {}
    for name, unit, count in [("a", "line", 50), ("b", "line", 60), ("c", "row", 15), ("d", "row", 20)]:
        granularity = named_granularity(unit)
        index = torch.randperm(granularity.units((40, 96)), generator=dice)[:count].sort().values
        edit = Sparse(
            (40, 96), granularity, index, torch.randn(granularity.values_shape((40, 96), count), generator=dice)
        )
        deck.add(ia.Adapter(name, {"0.weight": edit}, Base(deck.base_digest, str(dtype)), {"name": "shira"}))
        wanted[name] = edit.fold(base.to(torch.promote_types(dtype, torch.float32))).to(dtype)
    for one, other in itertools.permutations(wanted, 2):
        deck.use(one)
        deck.use(other)
        assert W.equal(wanted[other]), (one, other)
        deck.off()
        assert W.equal(base)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_weight_that_is_moved_while_it_is_written_is_found_where_it_went(writer, monkeypatch):
    deck = _deck(torch.float32, writer=_writer(writer))
    deck.use("elements")
    deck.off()  # both ways are planned, with the addresses of now
    weight: Any = deck.model.get_parameter("up.weight")
    left: list[torch.Tensor] = []
    step = "native_merge" if writer == "native" else "put_row"
    real = getattr(writer_module, step)

    def moved(*given: Any) -> None:
        real(*given)
        if not left:
            left.append(weight.data)  # still there, so that nothing else gets its memory
            weight.data = weight.data.clone()

    monkeypatch.setattr(writer_module, step, moved)
    deck.use("elements")
    old = left[0].clone()
    deck.off()
    assert left[0].equal(old)  # where the weight no longer lies nothing is written
    assert _bits(deck.model) == deck.base_digest


def test_all_writers_write_the_same_bits():
    pytest.importorskip("numba")
    decks = [_deck(torch.bfloat16, writer=writer) for writer in WRITERS]
    for deck in decks:
        deck.add(*_mixed(torch.bfloat16).values())
    chance = [random.Random(7) for _ in decks]
    for _ in range(200):
        for deck, dice in zip(decks, chance, strict=True):
            _random_switch(deck, dice)()
        assert len({_bits(deck.model) for deck in decks}) == 1


def test_what_was_sent_to_the_device_goes_when_there_is_no_room():
    from intarsia.deck.staged import Staged

    deck = _deck(torch.float32, "elements", "largest", "columns", writer="staged")
    staged = deck._writer
    assert isinstance(staged, Staged)
    deck.prefetch("elements").result()
    assert len(staged._sent) == 1
    deck.use("elements")
    assert len(staged._sent) == 1  # what was fetched was written
    deck.prefetch("elements").result()
    assert len(staged._sent) == 1  # it is set in: there is nothing to send
    for name in ("columns", "largest"):
        deck.use(name)
    assert len(staged._sent) == 3
    staged.room = 0
    deck.use("elements")
    assert len(staged._sent) == 1
    deck.off()
    assert deck.verify() == deck.base_digest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("writer", ["torch", "staged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_the_same_bits_as_on_the_cpu(dtype, writer):
    decks = [_deck(dtype, writer="torch"), ia.Deck(small_net(dtype).cuda(), writer=writer)]
    decks[1].add(*_adapters(dtype).values())
    for deck in decks:
        deck.add(*_mixed(dtype).values())
    plan = None
    chance = [random.Random(7) for _ in decks]
    for _ in range(200):
        for deck, dice in zip(decks, chance, strict=True):
            _random_switch(deck, dice)()
        assert _bits(decks[0].model) == _bits(decks[1].model)
        plan = decks[1]._inside.plan
        if writer == "staged" and plan.where:
            assert plan.where[0].base.is_pinned()
    decks[1].off()
    assert decks[1].verify() == decks[1].base_digest


@pytest.mark.parametrize("writer", WRITERS)
def test_a_switch_writes_every_entry_once(writer, monkeypatch):
    """No entry of what was set in and of what is to be is written twice, and none outside of them at all."""
    deck = _deck(torch.float32, "elements", "largest", "columns", writer=_writer(writer))
    for one, other in itertools.permutations(deck.names, 2):
        deck.use(one)
        deck.use(other)  # planned
        union = {
            site: torch.cat([positions(deck[n].edits[f"{site}.weight"]) for n in (one, other)]).unique()  # type: ignore[misc]
            for site in SITES
        }
        deck.use(one)
        passage = plan_module.passage(deck._inside.plan, deck._shelf.get(("plan", ((other, 1.0),))))
        assert not passage.copies
        steps = writer_module.Torch().prepare(passage, deck._weights).work
        for site in SITES:
            written = [
                (index[:, None] * run + torch.arange(run)).reshape(-1)
                for name, run, index, _ in steps
                if name == f"{site}.weight"
            ]
            assert torch.cat(written).sort().values.equal(union[site])


def test_strength_changes_what_is_set_in():
    deck, other = _deck(), _deck()
    deck.use("elements", 0.5)
    deck.strength(2.0)
    assert deck.active == {"elements": 2.0}
    deck.fuse(elements=0.6, columns=-0.4)
    deck.strength(0.5)
    other.fuse(elements=0.3, columns=-0.2)
    assert deck.active == other.active
    assert _bits(deck.model) == _bits(other.model)
    deck.strength(0.0)
    assert _bits(deck.model) == deck.base_digest
    deck.strength(1.0)
    other.fuse(elements=0.6, columns=-0.4)
    assert _bits(deck.model) == _bits(other.model)
    with pytest.raises(ia.IntarsiaError, match="finite number"):
        deck.strength(float("nan"))
    deck.off()
    with pytest.raises(ia.IntarsiaError, match="nothing is set in"):
        deck.strength(1.0)


def test_status_says_what_is_kept_and_how():
    deck = _deck(torch.bfloat16)
    assert "the base" in str(deck.status())
    deck.use("elements")
    status = deck.status()
    assert status.active == {"elements": 1.0}
    assert {kept.how for kept in status.weights.values()} == {"bits of the support"}
    touched = deck["elements"].touched
    assert status.kept_bytes == 2 * touched == sum(kept.bytes for kept in status.weights.values())
    deck.use("low_rank")
    status = deck.status()
    assert {kept.how for kept in status.weights.values()} == {"copy of the weight"}
    assert status.kept_bytes == 3 * 24 * 16 * 2
    assert "copy of the weight" in str(status)
    assert status.to_dict()["active"] == {"low_rank": 1.0}


def test_plans_stay_within_their_memory_and_say_which_went():
    deck = _deck(torch.float32, "elements", "largest", "columns", memory=4000)
    for _ in range(2):
        for name in deck.names:
            deck.use(name)
            assert deck.status().plan_bytes <= 4000
    assert any("plan of" in name for name in deck.status().dropped)
    deck.off()
    assert deck.verify() == deck.base_digest
    nothing = _deck(torch.float32, memory=0)
    nothing.use("elements")
    nothing.use("lengths")
    assert nothing.status().plan_bytes == 0
    nothing.off()
    assert nothing.verify() == nothing.base_digest


@pytest.mark.parametrize("memory", [-1, True, 1.5, "1"])
def test_memory_that_is_no_number_of_bytes_is_refused(memory):
    with pytest.raises(ia.IntarsiaError, match="number of bytes"):
        ia.Deck(small_net(), memory=memory)


def test_unknown_writers_are_refused():
    with pytest.raises(ia.IntarsiaError, match="no writer 'nativ'.*native"):
        ia.Deck(small_net(), writer="nativ")


def test_adding_a_folder_reads_its_head_alone(tmp_path):
    for number in range(3):
        ia.save(adapted(ia.Shira(density=0.1), seed=number), tmp_path / f"a{number}")
    deck = ia.Deck(small_net())
    deck.add(*(tmp_path / f"a{number}" for number in range(3)))
    assert all(deck[name].edits.made == () for name in deck.names)  # type: ignore[attr-defined]
    deck.prefetch("a1").result()
    assert len(deck["a1"].edits.made) == 3  # type: ignore[attr-defined]
    assert deck["a2"].edits.made == ()  # type: ignore[attr-defined]
    assert deck.status().planned == ("a1",)
    assert deck.active == {}
    with mock.patch.object(plan_module, "made", side_effect=AssertionError("planned again")):
        deck.use("a1")
    deck.off()
    assert deck.verify() == deck.base_digest


def test_a_file_that_is_broken_is_refused_at_its_first_use(tmp_path):
    ia.save(adapted(ia.Shira(density=0.1)), tmp_path / "good")
    ia.save(adapted(ia.Shira(density=0.1), seed=1), tmp_path / "bad")
    file = tmp_path / "bad" / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    deck = ia.Deck(small_net())
    deck.add(tmp_path / "good", tmp_path / "bad")
    deck.use("good")
    before = _bits(deck.model)
    with pytest.raises(ia.IntarsiaError, match=r"(?s)bad.*digest"):
        deck.prefetch("bad").result()
    with pytest.raises(ia.IntarsiaError, match=r"(?s)bad.*digest"):
        deck.use("bad")
    assert deck.active == {"good": 1.0}
    assert _bits(deck.model) == before


def test_what_others_write_between_switches_is_the_new_base():
    """As ever, a deck that is off takes the weights as it finds them: no plan may bring old bits back."""
    deck = _deck()
    deck.use("elements")
    deck.off()
    with torch.no_grad():
        layer_of(deck.model, "up").weight.mul_(2)
    after = _bits(deck.model)
    deck.use("elements")
    deck.use("columns")
    deck.off()
    assert _bits(deck.model) == after != deck.base_digest


def test_a_weight_that_is_replaced_is_refused():
    deck = _deck()
    deck.use("elements")
    old = layer_of(deck.model, "up").weight
    layer_of(deck.model, "up").weight = torch.nn.Parameter(old.detach().clone())
    for call in (deck.off, lambda: deck.use("columns"), deck.verify):
        with pytest.raises(ia.IntarsiaError, match="up.weight is another parameter"):
            call()
    layer_of(deck.model, "up").weight = old
    deck.off()
    assert deck.verify() == deck.base_digest


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["elements", "columns", "low_rank"])
def test_a_model_that_is_cast_while_something_is_set_in_gets_the_cast_base(name, writer):
    deck = _deck(writer=_writer(writer))
    deck.use(name)
    deck.model.to(torch.bfloat16)
    deck.off()
    assert _bits(deck.model) == ia.digest(small_net().to(torch.bfloat16))
    with pytest.raises(ia.IntarsiaError, match="something other than the deck"):
        deck.verify()


def test_autograd_notices_a_switch_between_forward_and_backward():
    deck = _deck()
    deck.use("columns")
    x = some_input().requires_grad_()
    loss = some_loss(deck.model, x)
    deck.use("elements")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------ inserts
def _own(model: torch.nn.Module, name: str, adapters: dict[str, float], dtype: torch.dtype = torch.float64) -> Any:
    """A layer's output with the inserts of adapters beside it, written down: y = W x + b, and each adds what it adds alone."""
    layer = layer_of(small_net(dtype), name)
    W, b = layer.weight.detach(), layer.bias.detach()
    x = some_input(dtype, 5, layer.in_features)
    y = total = torch.nn.functional.linear(x, W, b)
    for adapter, share in adapters.items():
        for factor, insert in _inserts(dtype)[adapter].edits[f"{name}.weight"].inserts():
            total = total + share * factor * insert.change(x, y, W)
    return layer_of(model, name)(x), total


def test_inserts_of_several_adapters_all_act_on_the_layers_own_input_and_output():
    deck = _deck_of_all(torch.float64)
    for shares in ({"parallel": 1.0}, {"after": 0.6, "before": -0.4}, {"before": 2.0, "parallel": 0.5, "after": -1.0}):
        for order in itertools.permutations(shares):
            deck.fuse({name: shares[name] for name in order})
            for site in SITES:
                found, expected = _own(deck.model, site, shares)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    deck.use("after", 0.5)
    deck.strength(-2.0)
    found, expected = _own(deck.model, "down", {"after": -2.0})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_an_insert_beside_a_weight_that_is_set_in_reads_what_that_weight_makes():
    """elements and after in one adapter, and both as two: y of the changed weight, then the insert on it."""
    deck = _deck_of_all(torch.float64)
    layer, x = layer_of(deck.model, "up"), some_input(torch.float64)
    deck.use("elements")
    y = layer(x)
    outputs = []
    for switch in (lambda: deck.use("mixed"), lambda: deck.fuse(elements=1.0, after=1.0)):
        switch()
        assert layer.weight.equal(
            deck["elements"].edits["up.weight"].fold(layer_of(small_net(torch.float64), "up").weight)
        )
        ((factor, insert),) = deck["mixed"].edits["up.weight"].inserts()
        torch.testing.assert_close(layer(x), y + factor * insert.change(x, y), rtol=1e-12, atol=1e-13)
        outputs.append(layer(x))
    assert torch.equal(*outputs)


def test_a_sum_of_both_keeps_its_factors_in_a_deck():
    deck = _deck_of_all(torch.float64)
    mixed = deck["mixed"]
    edits = {weight: scale(edit, -0.5) for weight, edit in mixed.edits.items()}
    deck.add(scaled=ia.Adapter("scaled", edits, mixed.base, {}))
    deck.use("scaled", 0.5)
    found = deck.model(some_input(torch.float64)), weights(deck.model)
    deck.use("mixed", -0.25)
    torch.testing.assert_close(deck.model(some_input(torch.float64)), found[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(weights(deck.model), found[1], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("way", list(itertools.permutations(["parallel", "mixed", "elements", None], 2)), ids=str)
def test_weights_and_inserts_are_one_switch(way, late, writer):
    """At whichever step Ctrl-C comes, both are what they were."""
    deck = _deck_of_all(torch.bfloat16, writer=_writer(writer))

    def switch(name: str | None) -> None:
        deck.use(name) if name else deck.off()

    switch(way[1])
    wanted = _standing(deck.model)
    switch(way[0])
    before, active, at = _standing(deck.model), deck.active, 0
    while True:
        at += 1
        with Faults({at}, late, KeyboardInterrupt) as faults:
            try:
                switch(way[1])
            except KeyboardInterrupt:
                assert (deck.active, _standing(deck.model)) == (active, before)
        if not faults.raised:
            break
    assert at > 1
    assert _standing(deck.model) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_off_leaves_no_trace_of_an_insert(dtype):
    deck = _deck_of_all(dtype)
    before, whole = _standing(deck.model), pickle.dumps(deck.model)
    for name in _inserts(dtype):
        deck.use(name)
        layer = layer_of(deck.model, "up")
        assert isinstance(layer, torch.nn.Linear)
        assert type(layer) is not torch.nn.Linear
        assert deck.model.state_dict().keys() == small_net(dtype).state_dict().keys()
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
        deck.off()
        assert _standing(deck.model) == before
    assert pickle.dumps(deck.model) == whole
    assert deck.verify() == deck.base_digest


@pytest.mark.parametrize("name", INSERTS)
def test_an_insert_gives_what_training_gave(name):
    for dtype in DTYPES:
        model, deck = adapted(INSERTS[name], dtype, seed=list(INSERTS).index(name)).eval(), _deck_of_all(dtype)
        deck.use(name)
        bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(deck.model(some_input(dtype)), model(some_input(dtype)), rtol=bound, atol=bound)
        assert deck.model(some_input(dtype)).dtype == dtype


@pytest.mark.parametrize("name", INSERTS)
def test_a_model_that_is_cast_while_an_insert_acts_goes_on(name):
    deck = _deck_of_all()
    deck.use(name)
    y = deck.model(some_input())
    deck.model.to(torch.bfloat16)
    cast = deck.model(some_input(torch.bfloat16))
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), y, rtol=0.05, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(deck.model(some_input(torch.bfloat16)).float(), y, rtol=0.05, atol=0.03)
    deck.off()
    assert _standing(deck.model) == _standing(small_net().to(torch.bfloat16))


@pytest.mark.parametrize("name", INSERTS)
def test_an_insert_that_overflows_is_refused(name):
    deck = _deck_of_all(torch.float16)
    deck.use("columns")
    before = _standing(deck.model)
    with pytest.raises(ia.IntarsiaError, match=r"(up|down|again).weight: the insert.*not finite in torch.float16"):
        deck.use(name, 1e9)
    assert deck.active == {"columns": 1.0}
    assert _standing(deck.model) == before


def test_status_says_where_inserts_are_and_what_they_cost():
    deck = _deck_of_all()
    assert deck.status().inserts == {}
    deck.fuse(parallel=1.0, after=0.5)
    status = deck.status()
    assert status.weights == {}
    assert status.kept_bytes == 0
    assert set(status.inserts) == {f"{site}.weight" for site in SITES}
    assert status.inserts["down.weight"].kinds == ("bottleneck", "bottleneck")
    assert status.inserts["down.weight"].multiplications == 3 * (24 + 16) + 3 * (16 + 16) + 16
    total = sum(one.multiplications for one in status.inserts.values())
    assert f"inserts beside 3 layers, {total:,} multiplications a token" in str(status)
    assert status.to_dict()["inserts"]["up.weight"]["kinds"] == ("bottleneck", "bottleneck")
    deck.off()
    assert "inserts" not in str(deck.status())
    assert status.plan_bytes > 0


def test_inserts_are_read_from_a_file_when_they_are_used(tmp_path):
    ia.save(adapted(INSERTS["before"]), tmp_path / "a")
    deck = ia.Deck(small_net())
    deck.add(tmp_path / "a")
    assert deck["a"].edits.made == ()  # type: ignore[attr-defined]
    deck.prefetch("a").result()
    assert deck.status().planned == ("a",)
    with mock.patch.object(inserts_module, "prepared", side_effect=AssertionError("planned again")):
        deck.use("a")
    torch.testing.assert_close(deck.model(some_input()), adapted(INSERTS["before"])(some_input()))


def test_torch_compile_sees_inserts_come_change_and_go():
    """Captured once without and once with them: another adapter of the same shapes, or strength, is no other graph."""
    deck, x, graphs = _deck_of_all(), some_input(), []
    for number in range(3):
        deck.add(**{f"p{number}": ia.export(adapted(Bottleneck(4), seed=number))})  # type: ignore[arg-type]
    torch._dynamo.reset()

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(deck.model, backend=backend, fullgraph=True)
    for name in (None, "p0", "p1", None, "p2", "p0"):
        deck.use(name) if name else deck.off()
        for strength in (1.0, 0.5) if name else ():
            deck.strength(strength)
            assert torch.equal(compiled(x), deck.model(x))
        assert torch.equal(compiled(x), deck.model(x))
    assert len(graphs) == 2


def test_a_copy_of_a_model_with_an_insert_is_whole_and_no_deck_takes_it():
    deck = _deck_of_all()
    deck.use("before")
    y = deck.model(some_input())
    for copied in (copy.deepcopy(deck.model), pickle.loads(pickle.dumps(deck.model))):
        assert torch.equal(copied(some_input()), y)
        with pytest.raises(ia.IntarsiaError, match="an insert acts beside up: this model is a copy.*deck.off"):
            ia.Deck(copied)
    deck.off()
    assert type(layer_of(deck.model, "up")) is torch.nn.Linear


def test_a_layer_with_an_adapter_on_it_takes_no_insert():
    model = small_net()
    ia.attach(model, ia.Lora(2), name="mine", targets="down")
    ia.activate(model)
    deck = ia.Deck(model)
    deck.add(*_inserts(torch.float32).values(), *_adapters(torch.float32).values())
    deck.use("elements")
    before = _standing(model)
    with pytest.raises(ia.IntarsiaError, match=r"down.weight: an insert cannot be set in.*\(mine\).*detach"):
        deck.use("mixed")
    assert _standing(model) == before
    ia.detach(model, "mine")
    deck.use("mixed")
    with pytest.raises(ia.IntarsiaError, match="mixed is set into this model by a deck"):
        ia.attach(model, ia.Lora(2), name="mine")
    deck.off()
    assert _standing(model) == _standing(small_net())


def test_an_insert_sits_beside_linear_layers_alone():
    model = torch.nn.Sequential(torch.nn.Embedding(16, 24), torch.nn.Conv1d(4, 24, 4))
    insert = _inserts(torch.float32)["parallel"].edits["up.weight"]
    elsewhere = Sum((24, 16), (elements((24, 16), torch.tensor([1]), torch.ones(1)), insert))
    assert isinstance(insert, Insert)
    base = Base(ia.digest(model), "float32")
    for weight, edit, kind in (("0.weight", insert, "embedding"), ("1.weight", elsewhere, "convolution")):
        deck = ia.Deck(model)
        with pytest.raises(
            ia.IntarsiaError, match=f"{weight}: an insert .bottleneck. acts at layers of the kind linear.*{kind}"
        ):
            deck.add(a=ia.Adapter("a", {weight: edit}, base, {}))
        assert deck.names == []
