"""What every registered optimizer promises, whatever it does with a gradient."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intarsia as ia
from intarsia import optim
from intarsia.optim import Recipe
from small import layer_of, small_net, some_input, some_loss, state_of, stir

CASES = [
    pytest.param(cls, settings, id=f"{name}-{number}")
    for name, cls in optim.optimizers().items()
    for number, settings in enumerate(cls.small)
]
LR = 1e-2


def model_for(recipe: Recipe) -> nn.Sequential:
    """A net whose weights are trained, or, where pairs are needed, whose adapter is."""
    net = small_net()
    if recipe.needs_pairs:
        ia.attach(net, ia.Lora(rank=2))
        stir(net, size=0.3)
    return net


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        some_loss(model, some_input(torch.float32, seed=step)).backward()
        optimizer.step()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in trained(model)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Of the state, counters aside."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim)


@pytest.mark.parametrize(("cls", "settings"), CASES)
class TestLaws:
    def test_it_learns_and_the_global_generator_is_neither_read_nor_moved(self, cls, settings):
        recipe = cls(**settings)
        runs = []
        for seed in (1, 2):
            model = model_for(recipe)
            before = some_loss(model, some_input()).item()
            torch.manual_seed(seed)
            untouched = torch.get_rng_state()
            train(model, recipe.build(model, LR), range(8))
            assert torch.equal(torch.get_rng_state(), untouched)
            assert some_loss(model, some_input()).item() < before
            runs.append(copies(model))
        assert same(*runs)

    @pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
    def test_a_saved_state_goes_on_to_the_bit(self, cls, settings, at):
        recipe = cls(**settings)
        model = model_for(recipe)
        optimizer = recipe.build(model, LR, weight_decay=0.1)
        train(model, optimizer, range(at))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        other = model_for(recipe)
        with torch.no_grad():
            for mine, theirs in zip(trained(other), trained(model), strict=True):
                mine.copy_(theirs)
        ia.sync(other)
        again = recipe.build(other, LR, weight_decay=0.1)
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))
        for a, b in ((model, optimizer), (other, again)):
            train(a, b, range(at, at + 4))
        assert same(copies(model), copies(other))

    def test_copies_go_on_to_the_bit(self, cls, settings):
        recipe = cls(**settings)
        model = model_for(recipe)
        optimizer = recipe.build(model, LR)
        train(model, optimizer, range(3))
        copied = copy.deepcopy((model, optimizer))
        pickled = pickle.loads(pickle.dumps((model, optimizer)))
        for pair in ((model, optimizer), copied, pickled):
            train(pair[0], pair[1], range(3, 7))
        assert same(copies(model), copies(copied[0]))
        assert same(copies(model), copies(pickled[0]))

    def test_the_state_is_as_large_as_declared(self, cls, settings):
        recipe = cls(**settings)
        model = model_for(recipe)
        optimizer = recipe.build(model, LR)
        for step in range(5):
            train(model, optimizer, range(step, step + 1))
            assert sum(t.numel() for t in tensors(optimizer)) == sum(
                recipe.numbers(tuple(p.shape)) for p in trained(model)
            )
        assert optim.state_bytes(optimizer) == 4 * sum(t.numel() for t in tensors(optimizer))

    def test_what_has_no_gradient_is_left_alone(self, cls, settings):
        recipe = cls(**settings)
        model = model_for(recipe)
        optimizer = recipe.build(model, LR, weight_decay=0.1)
        first = next(iter(model.children()))
        for p in first.parameters():
            p.requires_grad_(False)
        before = copies(first) or [p.detach().clone() for p in first.parameters()]
        train(model, optimizer, range(5))
        assert same(before, [p.detach() for p in first.parameters()])
        assert not any(optimizer.state.get(p) for p in first.parameters())

    def test_the_gradient_is_not_written(self, cls, settings):
        recipe = cls(**settings)
        model = model_for(recipe)
        optimizer = recipe.build(model, LR)
        for step in range(4):
            optimizer.zero_grad()
            some_loss(model, some_input(seed=step)).backward()
            before = [p.grad.clone() for p in trained(model) if p.grad is not None]
            optimizer.step()
            assert same(before, [p.grad for p in trained(model) if p.grad is not None])

    def test_gradients_accumulate(self, cls, settings):
        recipe = cls(**settings)
        results = []
        for parts in (1, 2):
            model = model_for(recipe).double()
            optimizer = recipe.build(model, LR)
            for step in range(4):
                optimizer.zero_grad()
                for x in some_input(torch.float64, seed=step).chunk(parts):
                    (some_loss(model, x) / parts).backward()
                optimizer.step()
            results.append(copies(model))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

    def test_a_closure_is_called_with_gradients_on(self, cls, settings):
        recipe = cls(**settings)
        results = []
        for closed in (False, True):
            model = model_for(recipe)
            optimizer = recipe.build(model, LR)

            def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = some_loss(model, some_input())
                loss.backward()
                return loss

            if closed:
                assert optimizer.step(closure).item() == some_loss(model_for(recipe), some_input()).item()
            else:
                closure()
                assert optimizer.step() is None
            results.append(copies(model))
        assert same(*results)

    def test_schedules_set_its_rate_and_at_rate_0_nothing_moves(self, cls, settings):
        recipe = cls(**settings)
        scheduled, by_hand = model_for(recipe), model_for(recipe)
        first, second = recipe.build(scheduled, LR, 0.1), recipe.build(by_hand, LR, 0.1)
        rates = [1.0, 0.5, 0.25, 0.0]
        schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: rates[min(step, 3)])
        highest = [group["lr"] for group in second.param_groups]
        for step, rate in enumerate(rates):
            before = copies(scheduled)
            train(scheduled, first, range(step, step + 1))
            schedule.step()
            for group, lr in zip(second.param_groups, highest, strict=True):
                group["lr"] = rate * lr
            train(by_hand, second, range(step, step + 1))
            assert same(copies(scheduled), copies(by_hand))
            assert same(copies(scheduled), before) == (rate == 0.0)

    def test_its_config_makes_it_again(self, cls, settings):
        recipe = cls(**settings)
        assert optim.build(json.loads(json.dumps(recipe.config()))) == recipe

    def test_bfloat16_weights_stay_so(self, cls, settings):
        recipe = cls(**settings)
        if recipe.needs_pairs:
            pytest.skip("the factors of an adapter are float32 on any base")
        model = model_for(recipe).bfloat16()
        optimizer = recipe.build(model, LR)
        for step in range(5):
            optimizer.zero_grad()
            some_loss(model, some_input(torch.bfloat16, seed=step)).backward()
            optimizer.step()
        assert {p.dtype for p in trained(model)} == {torch.bfloat16}
        assert all(bool(p.isfinite().all()) for p in trained(model))

    def test_hooks_of_methods_are_called_once_a_step_and_live_weights_are_current(self, cls, settings):
        recipe = cls(**settings)
        method = ia.Lora(rank=2) if recipe.needs_pairs else ia.registry.build("full")
        calls: list[str] = []

        class Told(type(method)):  # type: ignore[misc]
            name = "told"

            def before_step(self, p: Any) -> None:
                calls.append("before")

            def after_step(self, p: Any, lr: float) -> None:
                assert lr in {group["lr"] for group in optimizer.param_groups}
                calls.append("after")

        model = small_net()
        ia.attach(model, Told(**{k: v for k, v in method.config().items() if k != "name"}), "up")
        base = layer_of(small_net(), "up").weight
        optimizer = recipe.build(model, LR)
        for step in range(3):
            train(model, optimizer, range(step, step + 1))
            assert calls == ["before", "after"] * (step + 1)
            if not recipe.needs_pairs:
                torch.testing.assert_close(
                    layer_of(model, "up").weight, base + state_of(model, "up").values, rtol=0, atol=1e-6
                )


INNERS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Adadelta", "ASGD", "Rprop")
OUTERS = [
    (optim.GaLore, {"rank": 3, "gap": 2}),
    (optim.Fira, {"rank": 3, "gap": 2}),
    (optim.Frugal, {"gap": 2, "density": 0.5}),
]
FULL: list[tuple[Any, dict[str, Any]]] = [
    (optim.GaLore, {"rank": 99, "gap": 2, "scale": 1.0}),
    (optim.Fira, {"rank": 99, "gap": 2}),
    (optim.Frugal, {"density": 1.0, "gap": 2, "selector": "columns", "reset": False}),
    (optim.Frugal, {"density": 1.0, "gap": 2, "selector": "rows", "reset": False}),
    (optim.Frugal, {"density": 1.0, "gap": 2, "selector": "entries", "reset": False}),
    (optim.Frugal, {"density": 1.0, "gap": 2, "selector": "block", "reset": False}),
    (optim.Frugal, {"density": 1.0, "gap": 2, "selector": "svd", "reset": False, "rest": "none"}),
]


@pytest.mark.parametrize(("outer", "settings"), FULL, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_at_full_rank_around_sgd_it_is_sgd(outer, settings):
    models = [small_net().double() for _ in range(2)]
    weights = [p for p in models[1].parameters() if p.ndim == 2]
    rest = [p for p in models[1].parameters() if p.ndim != 2]
    plain = torch.optim.SGD(models[0].parameters(), lr=0.1)
    around = outer([{"params": weights, "project": True}, {"params": rest}], torch.optim.SGD, 0.1, **settings)
    for model, optimizer in zip(models, (plain, around), strict=True):
        for step in range(6):
            optimizer.zero_grad()
            some_loss(model, some_input(torch.float64, seed=step)).backward()
            optimizer.step()
    for a, b in zip(copies(models[0]), copies(models[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [s for o, s in FULL if o is optim.Frugal and s["selector"] != "svd"], ids=lambda s: s["selector"]
)
def test_frugal_of_density_1_is_adamw(settings):
    models = [small_net() for _ in range(2)]
    plain = torch.optim.AdamW(models[0].parameters(), lr=1e-2, weight_decay=0.1)
    around = optim.Frugal(models[1].parameters(), torch.optim.AdamW, 1e-2, weight_decay=0.1, **settings)
    for model, optimizer in zip(models, (plain, around), strict=True):
        train(model, optimizer, range(10))
    for a, b in zip(copies(models[0]), copies(models[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize(("outer", "settings"), OUTERS, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_any_inner_optimizer_serves_and_goes_on_from_a_saved_state(outer, settings, inner):
    models = [small_net() for _ in range(2)]
    optimizers = [outer(model.parameters(), getattr(torch.optim, inner), 1e-3, **settings) for model in models]
    train(models[0], optimizers[0], range(3))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3, 6))
    assert same(copies(models[0]), copies(models[1]))
    assert all(bool(p.isfinite().all()) for p in models[0].parameters())


@pytest.mark.parametrize(
    ("inner", "settings", "message"),
    [
        (torch.optim.LBFGS, {}, "GaLore cannot have LBFGS inside: it evaluates the loss several times"),
        (torch.optim.Adafactor, {}, "cannot have Adafactor inside: its step depends on the size of the parameter"),
        (torch.optim.SparseAdam, {}, "cannot have SparseAdam inside"),
        (torch.optim.AdamW, {"maximize": True}, "goes down; leave maximize out and negate the loss"),
        (torch.optim.AdamW, {"rank": 0}, "GaLore: rank=0 must be a whole number, 1 or more"),
        (torch.optim.AdamW, {"side": "up"}, "GaLore: side='up' must be one of std, reverse_std"),
        (torch.optim.AdamW, {"lr": -1.0}, "GaLore: lr=-1.0 must be 0 or more"),
        (torch.optim.AdamW, {"weight_decay": -1.0}, "GaLore: weight_decay=-1.0 must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(inner, settings, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        optim.GaLore(small_net().parameters(), inner, **settings)


def test_a_group_may_say_what_is_projected_and_how():
    W, V, b = (nn.Parameter(torch.ones(*shape)) for shape in ((8, 6), (8, 6), (8,)))
    optimizer = optim.GaLore([{"params": [W], "rank": 2}, {"params": [V], "project": False}], torch.optim.AdamW, rank=5)
    optimizer.add_param_group({"params": b})
    for p in (W, V, b):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.state[W]["exp_avg"].shape == (8, 2)
    assert optimizer.state[V]["exp_avg"].shape == (8, 6)
    assert optimizer.state[b]["exp_avg"].shape == (8,)
    with pytest.raises(ia.IntarsiaError, match="gap=0 must be a whole number"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(3, 3)), "gap": 0})


def test_between_steps_only_the_state_is_kept():
    model = small_net()
    optimizer = optim.GaLore(model.parameters(), rank=3)
    train(model, optimizer, range(2))
    assert all(proxy.numel() == 0 and proxy.grad is None for proxy in optimizer.proxies.values())
    assert optimizer.inner is not None
    assert {t.data_ptr() for t in tensors(optimizer)} >= {
        t.data_ptr()
        for state in optimizer.inner.state.values()
        for t in state.values()
        if isinstance(t, Tensor) and t.ndim
    }


def test_a_step_that_fails_leaves_no_proxy_filled():
    model = small_net()
    optimizer = optim.GaLore(model.parameters(), rank=3)
    some_loss(model, some_input()).backward()
    layer_of(model, "up").weight.grad.fill_(torch.nan)
    with pytest.raises(ia.IntarsiaError, match="not finite, so it has no leading singular vectors"):
        optimizer.step()
    assert all(proxy.numel() == 0 and proxy.grad is None for proxy in optimizer.proxies.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("galor", "unknown optimizer 'galor'; did you mean 'galore'"),
        ({"name": "galore", "rnk": 3}, "galore has no field 'rnk'; did you mean 'rank'"),
        ({"name": "galore", "lr": 3}, "galore has no field 'lr'; it is train.lr"),
        ({"name": "galore", "rank": 0}, "rank=0 must be a whole number, 1 or more"),
        ({"name": "galore", "rank": "many"}, "galore: rank='many' is a str; expected int"),
        ({"name": "fira", "limiter": 0.5}, "fira: limiter=0.5 must be 1 or more, or 0"),
        ({"name": "frugal", "density": 2.0}, r"density=2.0 must be in \[0, 1\]"),
        ({"name": "frugal", "inner": "adam"}, "inner='adam' must be one of adamw"),
        ({"name": "lora-plus", "ratio": 0.5}, "lora-plus: ratio=0.5 must be 1 or more"),
        ({"name": "lora-rite", "drop": -1.0}, "lora-rite: drop=-1.0 must be 0 or more"),
        ({"rank": 3}, "an optimizer is given as"),
    ],
)
def test_a_wrong_config_is_one_readable_sentence(config, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        optim.build(config)


def test_pairs_are_asked_for_where_there_are_none():
    for name in ("lora-plus", "lora-rite"):
        recipe = optim.build(name)
        with pytest.raises(ia.IntarsiaError, match="give it the model with its adapter, not tensors"):
            recipe.build(small_net().parameters())
        with pytest.raises(ia.IntarsiaError, match="for adapters with pairs of factors"):
            recipe.build(small_net())
    with pytest.raises(ia.IntarsiaError, match="nothing in this model takes a gradient"):
        optim.build("galore").build(small_net().requires_grad_(False))


def test_registering_a_taken_name_is_an_error():
    with pytest.raises(ia.IntarsiaError, match="the optimizer name 'galore' of .* is taken by intarsia.optim.galore"):
        optim.register(type("Other", (optim.GaloreRecipe,), {"__module__": "elsewhere"}))
