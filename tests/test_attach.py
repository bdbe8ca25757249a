"""Attaching, activating, detaching, rows, calibration: what works, what is refused, what is left behind."""

from __future__ import annotations

import gc
import os
import tempfile
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import intarsia as ia
from intarsia import chain
from intarsia import model as models
from intarsia.calibrate import gather
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, stir, trained, weights


def _trace(model: nn.Module) -> dict[str, Any]:
    """All that a refused or undone attach must not change."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "bits": ia.digest(model),
    }


@pytest.fixture
def model():
    """Partly frozen, partly in eval mode, with a gradient: everything that must survive."""
    net = small_net()
    layer_of(net, "down").requires_grad_(False)
    layer_of(net, "up").eval()
    some_loss(net, some_input()).backward()
    return net


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ia.Shira(density=0.0), r"shira: density=0.0 must be in \(0, 1\]"),
        (lambda: ia.Shira(density=1.01), r"density=1.01 must be in \(0, 1\]"),
        (lambda: ia.Shira(density=-0.1), "density=-0.1"),
        (lambda: ia.Shira(density=float("nan")), "density=nan"),
        (lambda: ia.Shira(scorer="wnada"), "scorer='wnada' must be one of random, struct, magnitude, gradient, snip"),
        (
            lambda: ia.Shira(granularity="lines"),
            "granularity='lines' must be one of element, line, tile, row, column, diagonal",
        ),
        (lambda: ia.Shira(granularity="line", width=0), "line: width=0 must be 1 or more"),
        (lambda: ia.Shira(width=4), "elements have no width"),
        (lambda: ia.Shira(granularity="column", scorer="struct"), "struct chooses entries"),
        (lambda: ia.Shira(scale=0.0), "scale=0.0 must be 'auto' or a positive number"),
        (lambda: ia.Shira(scale=float("inf")), "scale=inf"),
        (lambda: ia.Shira(scale="big"), "scale='big'"),
        (lambda: ia.Shira(offset=-1), "offset=-1"),
        (lambda: ia.Paca(0), "paca: rank=0 must be 1 or more"),
        (lambda: ia.Paca(2, alpha=0.0), "alpha=0.0"),
        (lambda: ia.Paca(2, alpha=float("nan")), "alpha=nan"),
        (lambda: ia.Paca(2, select="best"), "select='best' must be one of random, weight_norm, grad_norm"),
        (lambda: ia.Paca(2, parameterization="rows"), "parameterization='rows' must be delta or columns"),
        (lambda: ia.Lora(0), "lora: rank=0"),
        (lambda: ia.Lora(2, alpha=float("inf")), "alpha=inf"),
        (lambda: ia.Lora(2, scaling="rs"), "scaling='rs' must be one of lora, rslora, none"),
        (lambda: ia.Dora(ia.Dora()), "inner=.* must be a method that adds a delta"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(make, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (ia.Shira(density=0.001), "none of the 384 elements of the 24 x 16 weight would be trained; raise the density"),
        (ia.Shira(density=0.02, granularity="column"), "none of the 16 columns .* raise the density"),
        (ia.Paca(17), "17 columns of the 24 x 16 weight are asked for, and there are 16"),
        (ia.Lora(17), "rank=17 is above 16, the rank of a 24 x 16 weight"),
        (ia.Dora(ia.Paca(17)), "17 columns"),
    ],
    ids=str,
)
def test_methods_that_do_not_fit_are_refused_with_every_layer(method, message, model):
    before = _trace(model)
    with pytest.raises(ia.IntarsiaError, match=message) as caught:
        ia.attach(model, method)
    for site in ("up", "again"):
        assert f"{site}: " in str(caught.value)
    assert _trace(model) == before


def test_full_density_is_all_of_the_weight(model):
    ia.attach(model, ia.Shira(density=1.0))
    assert state_of(model, "up").index.tolist() == list(range(384))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": "dwon"}, "'dwon' matches none of the 3 layers that can be adapted; did you mean 'down'"),
        ({"targets": ["up"], "exclude": "up"}, "leave none"),
        ({"name": ""}, "cannot be named ''"),
        ({"name": "a.b"}, "cannot be named 'a.b'"),
        ({"name": "a/b"}, "cannot be named 'a/b'"),
        ({"name": "train"}, "cannot be named 'train'"),
        ({"name": "values"}, "cannot be named 'values'"),
        ({"method": ia.Shira}, "expected a method such as"),
        ({"method": "shira"}, "expected a method such as"),
        ({"method": ia.Shira(scorer="snip")}, "needs calibration data"),
        ({"method": ia.Dora(ia.Paca(2, select="grad_norm"))}, "needs calibration data"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_before_anything_is_changed(given, message, model):
    before = _trace(model)
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.attach(model, **({"method": ia.Shira(density=0.1)} | given))
    assert _trace(model) == before


def test_a_taken_name_is_refused(model):
    ia.attach(model, ia.Shira(density=0.1), name="a")
    before = _trace(model)
    with pytest.raises(ia.IntarsiaError, match="named 'a' is attached already"):
        ia.attach(model, ia.Lora(2), name="a")
    assert _trace(model) == before


def test_another_library_on_the_model_is_named(model):
    layer_of(model, "down").adapters = nn.ModuleDict()
    with pytest.raises(ia.IntarsiaError, match="down has an attribute 'adapters' already; another adapter library"):
        ia.attach(model, ia.Lora(2))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: ia.activate(m, "a"),
        lambda m: ia.detach(m, "a"),
        lambda m: ia.export(m),
        lambda m: ia.save(m, "nowhere"),
        lambda m: ia.adapter_state(m, "a"),
        lambda m: ia.rows(m, ["a"]).__enter__(),
    ],
)
def test_without_an_adapter_the_error_says_so(call, model):
    before = _trace(model)
    with pytest.raises(ia.IntarsiaError, match="no adapter is attached to this Sequential"):
        call(model)
    assert _trace(model) == before
    ia.activate(model)  # the base is what acts already
    ia.sync(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: ia.activate(m, "alpha", "beto"),
        lambda m: ia.detach(m, "beto"),
        lambda m: ia.export(m, "beto"),
        lambda m: ia.adapter_state(m, "beto"),
        lambda m: ia.load_adapter_state(m, "beto", {}),
        lambda m: ia.rows(m, ["alpha", "beto"]).__enter__(),
    ],
)
def test_unknown_adapters_are_refused_with_the_nearest(call, model):
    ia.attach(model, ia.Shira(density=0.1), name="alpha")
    ia.attach(model, ia.Lora(2), name="beta")
    before = _trace(model)
    with pytest.raises(ia.IntarsiaError, match="'beto'.*did you mean 'beta'"):
        call(model)
    assert _trace(model) == before
    assert ia.active_names(model) == ["beta"]


def test_one_of_several_must_be_said(model, tmp_path):
    for name in ("a", "b"):
        ia.attach(model, ia.Lora(2), name=name)
    with pytest.raises(ia.IntarsiaError, match=r"the model has 2 adapters \(a, b\); say which"):
        ia.save(model, tmp_path / "x")
    ia.save(model, tmp_path / "x", "b")
    assert ia.read(tmp_path / "x").name == "x"


# ------------------------------------------------------------------ activate and detach
def test_detaching_gives_everything_back(model):
    before = _trace(model)
    for name, method in {"a": ia.Shira(density=0.1), "b": ia.Lora(2), "c": ia.Dora()}.items():
        ia.attach(model, method, name=name, targets="up" if name == "c" else "all-linear", exclude=())
        stir(model, name)
        assert [name for name, p in model.named_parameters() if p.requires_grad and ".adapters." not in name] == []
    ia.activate(model, "b", "a", "c")
    for name in ("b", "c", "a"):
        ia.detach(model, name)
    assert _trace(model) == before
    assert type(layer_of(model, "up")) is nn.Linear


def test_only_active_adapters_train(model):
    for name in ("a", "b", "c"):
        ia.attach(model, ia.Lora(2), name=name)
    for active in ((), ("b",), ("c", "a")):
        ia.activate(model, *active)
        found = {
            name.split(".adapters.")[1].partition(".")[0] for name, p in model.named_parameters() if p.requires_grad
        }
        assert found == set(active)
    with pytest.raises(ia.IntarsiaError, match="named twice"):
        ia.activate(model, "a", "a")
    assert ia.active_names(model) == ["c", "a"]


def test_the_order_of_a_stack_is_kept_through_everything():
    """Also where the first layers have only some of the adapters, in any order."""
    model = small_net()
    ia.attach(model, ia.Shira(density=0.1), name="a")
    ia.attach(model, ia.Dora(ia.Lora(2)), name="b", targets=["down", "again"])
    for name in ("a", "b"):
        stir(model, name)
    ia.activate(model, "b", "a")
    y = model(some_input())
    with ia.rows(model, ["a", None, "b", "a"]):
        model(some_input())
    ia.load_adapter_state(model, "a", {k: t.clone() for k, t in ia.adapter_state(model, "a").items()})
    ia.digest(model)
    assert ia.active_names(model) == ["b", "a"]
    assert layer_of(model, "down").active == ("b", "a")
    assert torch.equal(model(some_input()), y)
    ia.activate(model, "a", "b")
    assert not torch.equal(model(some_input()), y)


@pytest.mark.parametrize("step", ["set_active", "write", "_set_in", "_take_out"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_switch_that_fails_in_the_middle_changes_nothing(step, error, at, monkeypatch):
    model = small_net()
    for name, method in {"a": ia.Shira(density=0.1), "b": ia.Paca(2)}.items():
        ia.attach(model, method, name=name)
        stir(model, name)
    real, calls, before, bits = getattr(chain, step), 0, _trace(model), weights(model)

    def fail_once(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return real(*args, **named)

    for names in (("a",), ("a", "b"), ()):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(chain, step, fail_once)
            if names or step in ("set_active", "_take_out"):
                with pytest.raises(error):
                    ia.activate(model, *names)
        assert ia.active_names(model) == ["b"]
        assert [layer_of(model, site).active for site in SITES] == [("b",)] * 3
        for site, expected in bits.items():
            assert torch.equal(layer_of(model, site).weight, expected)
        assert _trace(model) == before


def test_attached_names_are_in_the_order_of_attaching(model):
    for name in ("b", "a", "c"):
        ia.attach(model, ia.Lora(2), name=name)
    assert ia.attached_names(model) == ["b", "a", "c"]
    ia.detach(model, "a")
    assert ia.attached_names(model) == ["b", "c"]


def test_adapted_models_are_freed():
    model = adapted(ia.Shira(density=0.1))
    gone = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert [reference() for reference in gone if reference() is not None] == []
    assert not any(layer is reference() for layer in chain._ADAPTED for reference in gone)


# ------------------------------------------------------------------ live weights
def _optimizers() -> dict[str, Any]:
    class ThroughData(torch.optim.SGD):
        """Writes as many optimizers outside of torch do: past the version counter."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])

    return {
        "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor,
        "rmsprop": torch.optim.RMSprop, "foreach": lambda p, lr: torch.optim.AdamW(p, lr, foreach=True),
        "fused": lambda p, lr: torch.optim.AdamW(p, lr, fused=True), "data": ThroughData,
    }  # fmt: skip


@pytest.mark.parametrize("name", _optimizers())
def test_any_torch_optimizer_moves_the_live_weight(name):
    model, x = small_net(), some_input()
    ia.attach(model, ia.Shira(density=0.1))
    optimizer = _optimizers()[name](trained(model), lr=1e-3)
    first = some_loss(model, x)
    for _ in range(5):
        optimizer.zero_grad()
        some_loss(model, x).backward()
        optimizer.step()
    assert some_loss(model, x) < first
    base = weights(small_net())
    for site, found in weights(model).items():
        state = state_of(model, site)
        expected = base[site].view(-1)[state.index] + state.method.change(state.raw()).detach()
        assert torch.equal(found.view(-1)[state.index], expected)


def test_an_optimizer_of_another_model_writes_nothing():
    model, other = adapted(ia.Shira(density=0.1)), small_net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    some_loss(other, some_input()).backward()
    before = [layer_of(model, site).weight._version for site in SITES]
    optimizer.step()
    assert [layer_of(model, site).weight._version for site in SITES] == before


def test_a_step_between_forward_and_backward_is_an_error_of_autograd():
    model = adapted(ia.Shira(density=0.1))
    loss = some_loss(model, some_input().requires_grad_())
    with torch.no_grad():
        for parameter in trained(model):
            parameter.mul_(1.01)
    ia.sync(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_written_under_a_live_adapter_are_an_error():
    model = adapted(ia.Shira(density=0.1))
    with torch.no_grad():
        layer_of(model, "down").weight.mul_(1.1)
    with pytest.raises(ia.IntarsiaError, match="out of date"):
        model(some_input())


def test_inference_mode_and_no_grad_give_the_same_output():
    model = adapted(ia.Shira(density=0.1))
    expected = model(some_input())
    with torch.inference_mode():
        assert torch.equal(model(some_input()), expected)
    with torch.no_grad():
        assert torch.equal(model(some_input()), expected)


def test_bf16_masters_gather_what_a_bf16_weight_cannot_show():
    """100 steps of a size below |w| / 256: each alone vanishes in bf16, together they do not."""
    model = small_net(torch.bfloat16)
    with torch.no_grad():
        layer_of(model, "up").weight.fill_(1.0)
    ia.attach(model, ia.Shira(density=0.1, scale=1.0), targets="up")
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    state = state_of(model, "up")
    for _ in range(100):
        state.values.grad = torch.full_like(state.values, -1e-3)
        optimizer.step()
    found = layer_of(model, "up").weight.view(-1)[state.index].float()
    torch.testing.assert_close(found, torch.full_like(found, 1.1), rtol=2**-8, atol=0)


def test_a_layer_may_be_called_by_the_name_of_its_argument():
    model = adapted(ia.Shira(density=0.1))
    assert torch.equal(layer_of(model, "up")(input=some_input()), layer_of(model, "up")(some_input()))


@pytest.mark.parametrize(
    "method", [ia.Shira(density=0.1), ia.Lora(2), ia.Dora(ia.Shira(density=0.1))], ids=lambda m: m.name
)
def test_autocast_leaves_float64_alone(method):
    """As it does for torch's own layers."""
    model, x = adapted(method, torch.float64), some_input(torch.float64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ rows
@pytest.fixture
def served():
    net = small_net()
    for number, (name, method) in enumerate({"a": ia.Shira(density=0.1), "b": ia.Lora(2)}.items()):
        ia.attach(net, method, name=name, seed=number)
        stir(net, name)
    return net


def test_rows_with_another_batch_are_an_error(served):
    with ia.rows(served, ["a", "b"]), pytest.raises(ia.IntarsiaError, match="given 2 adapters.* meets 4 rows"):
        served(some_input())
    assert ia.active_names(served) == ["b"]


@pytest.mark.parametrize(
    "call",
    [
        lambda m: ia.activate(m, "a"),
        lambda m: ia.detach(m, "a"),
        lambda m: ia.attach(m, ia.Lora(2), name="c"),
        lambda m: ia.rows(m, ["a"] * 4).__enter__(),
    ],
)
def test_within_rows_nothing_else_is_switched(call, served):
    with ia.rows(served, ["a", None, "b", "a"]):
        y = served(some_input())
        with pytest.raises(ia.IntarsiaError, match=r"rows\(\) is in force"):
            call(served)
        assert torch.equal(served(some_input()), y)
    assert ia.active_names(served) == ["b"]


def test_rows_end_with_their_block_also_when_it_fails(served):
    y = served(some_input())
    with pytest.raises(ZeroDivisionError), ia.rows(served, ["a", None, "b", "a"]):
        raise ZeroDivisionError
    assert torch.equal(served(some_input()), y)


def test_a_layer_without_the_rows_adapter_is_the_base():
    net = small_net()
    ia.attach(net, ia.Lora(2), name="a", targets="up")
    ia.attach(net, ia.Shira(density=0.1), name="b", targets="again")
    stir(net, "a")
    stir(net, "b")
    x = some_input(torch.float32, 2, 16)
    with ia.rows(net, ["a", "b"]):
        y = net(x)
    for row, name in enumerate(("a", "b")):
        ia.activate(net, name)
        torch.testing.assert_close(y[row : row + 1], net(x[row : row + 1]))


def test_rows_under_autocast_and_in_bf16():
    x = some_input()
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        net = small_net(dtype)
        for number, method in enumerate(
            (ia.Shira(density=0.1), ia.Paca(2, parameterization="columns"), ia.Lora(2), ia.Dora())
        ):
            ia.attach(net, method, name=f"n{number}")
            stir(net, f"n{number}")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with ia.rows(net, ["n0", "n1", "n2", "n3"]):
                y = net(x.to(dtype))
            assert y.dtype == torch.bfloat16
            for row in range(4):
                ia.activate(net, f"n{row}")
                alone = net(x.to(dtype)[row : row + 1])
                torch.testing.assert_close(y[row : row + 1], alone, rtol=0.05, atol=0.02)


def test_a_batch_of_one_adapter_is_that_adapter(served):
    with ia.rows(served, ["b"] * 4):
        y = served(some_input())
    torch.testing.assert_close(y, served(some_input()))


# ------------------------------------------------------------------ calibration
@pytest.mark.parametrize("batches", [1, 2, 5])
def test_gathered_gradients_are_those_of_plain_backward(batches, model):
    data = [some_input(seed=seed) for seed in range(batches)]
    plain = small_net().eval()
    for x in data:
        some_loss(plain, x).backward()
    before = _trace(model)
    found: dict[str, torch.Tensor] = {}
    gather(
        model,
        {site: layer_of(model, site).weight for site in SITES},
        frozenset({"gradient"}),
        data,
        lambda name, all_of_it: found.__setitem__(name, all_of_it["gradient"].clone()),
        some_loss,
    )
    for site in SITES:
        torch.testing.assert_close(found[site], layer_of(plain, site).weight.grad, rtol=1e-5, atol=1e-9)
    assert _trace(model) == before


@pytest.mark.parametrize(
    "needs", [{"gradient"}, {"fisher"}, {"gradient", "fisher", "inputs"}], ids=lambda needs: "+".join(sorted(needs))
)
@pytest.mark.parametrize("batches", [1, 3])
def test_at_most_one_gradient_is_alive(batches, needs, model):
    wanted = {site: layer_of(model, site).weight for site in SITES}
    model.zero_grad(set_to_none=True)
    alive, order = [], []

    def use(name: str, found: Any) -> None:
        assert found.keys() == needs
        order.append(name)
        alive.append(sum(p.grad is not None for p in model.parameters()))

    gather(model, wanted, needs, [some_input(seed=s) for s in range(batches)], use, some_loss)
    assert order == ["again", "down", "up"]  # each as soon as backward has it
    assert max(alive) <= 1
    assert all(p.grad is None for p in model.parameters())


def test_sums_over_batches_leave_no_file(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ia.attach(model, ia.Shira(density=0.1, scorer="snip"), data=[some_input(seed=s) for s in range(3)], loss=some_loss)
    assert os.listdir(tmp_path) == []


def test_calibration_is_of_the_base_in_eval_mode(model):
    """Dropout and whatever is active do not change what is chosen."""
    plain = small_net()
    ia.attach(plain, ia.Shira(density=0.1, scorer="gradient"), data=[some_input()], loss=some_loss)
    noisy = small_net()
    noisy.set_submodule("tanh_up", nn.Sequential(nn.Tanh(), nn.Dropout(0.5)))
    ia.attach(noisy, ia.Lora(2), name="other")
    stir(noisy, "other", size=0.5)
    ia.attach(noisy, ia.Shira(density=0.1, scorer="gradient"), data=[some_input()], loss=some_loss)
    for site in SITES:
        assert torch.equal(state_of(noisy, site).index, state_of(plain, site).index)


def _fails_at(number: int) -> Any:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == number:
            raise ZeroDivisionError
        return some_loss(model, batch)

    return loss


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("already", [False, True])
def test_a_failed_calibration_leaves_no_trace(number, already, model):
    if already:
        ia.attach(model, ia.Paca(2), name="first")
        stir(model, "first")
    before, data = _trace(model), [some_input(seed=s) for s in range(2)]
    with pytest.raises(ZeroDivisionError):
        ia.attach(model, ia.Shira(density=0.1, scorer="snip"), data=data, loss=_fails_at(number))
    assert _trace(model) == before
    assert not layer_of(model, "up").weight._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ([], some_loss, "calibration data is empty"),
        (["text"], None, "a calibration batch is a str; expected a mapping"),
        ([some_input()], None, "a calibration batch is a Tensor"),
        ([some_input()], lambda m, b: layer_of(m, "up")(b).square().mean(), "does not depend on down, again"),
        ([some_input() * float("nan")], some_loss, "the scorer 'snip' gave scores that are not finite"),
    ],
    ids=["empty", "text", "tensor", "part", "nan"],
)
def test_calibration_data_that_cannot_serve_is_refused(data, loss, message, model):
    before = _trace(model)
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.attach(model, ia.Shira(density=0.1, scorer="snip"), data=data, loss=loss)
    assert _trace(model) == before


def test_a_layer_that_only_an_earlier_batch_reaches_is_calibrated():
    """As an expert may be, that the last batch is not sent to."""

    def loss(net: nn.Module, batch: tuple[torch.Tensor, tuple[str, ...]]) -> torch.Tensor:
        x, sites = batch
        for site in sites:
            x = layer_of(net, site)(x)
        return x.square().mean()

    net, plain = small_net(), small_net()
    data = [(some_input(), ("up", "down")), (some_input(seed=2), ("again",)), (some_input(seed=3), ("up", "down"))]
    ia.attach(net, ia.Shira(density=0.1, scorer="gradient"), data=data, loss=loss)
    for batch in data:
        loss(plain, batch).backward()
    for site in SITES:
        expected = layer_of(plain, site).weight.grad.abs().flatten().topk(38).indices.sort().values
        assert torch.equal(state_of(net, site).index, expected)


def test_a_transformers_model_needs_no_loss_function(tiny_llama):
    net = tiny_llama()
    ids = torch.randint(0, 320, (2, 9))
    ia.attach(net, ia.Shira(density=0.01, scorer="snip"), data=[{"input_ids": ids, "labels": ids}])
    assert len(ia.export(net).edits) == 14
    with pytest.raises(ia.IntarsiaError, match="returned no loss for a calibration batch; give it labels"):
        ia.attach(net, ia.Shira(scorer="snip"), data=[{"input_ids": ids}], name="b")


def test_progress_is_told(model):
    told: list[tuple[int, int, str]] = []
    data = [some_input(seed=s) for s in range(2)]
    ia.attach(
        model, ia.Shira(density=0.1, scorer="snip"), data=data, loss=some_loss, progress=lambda *a: told.append(a)
    )
    assert [a for a in told if a[2] == "calibrating"] == [(1, 2, "calibrating"), (2, 2, "calibrating")]
    assert [a for a in told if a[2] == "attaching"] == [(i, 3, "attaching") for i in (1, 2, 3)]


# ------------------------------------------------------------------ training checkpoints
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("up/values"), "missing up/values"),
        (lambda s: s.update({"x/y": torch.ones(1)}), "unexpected x/y"),
        (lambda s: s.update({"up/values": torch.ones(3)}), r"up/values: given \(3,\)"),
        (lambda s: s.update({"up/values": s["up/values"].double()}), "float64, the model has"),
        (lambda s: s["up/index"].__setitem__(37, 384), "up: indices reach from .* to 384"),
        (lambda s: s["up/index"].__setitem__(3, -1), "up: indices"),
        (lambda s: s["up/values"].__setitem__(3, float("nan")), "up: values has 1 numbers that are not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, message):
    model = adapted(ia.Shira(density=0.1))
    state = {key: tensor.clone() for key, tensor in ia.adapter_state(model, "default").items()}
    y = model(some_input())
    change(state)
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.load_adapter_state(model, "default", state)
    assert torch.equal(model(some_input()), y)


def test_a_trained_adapter_is_loaded_beside_others(tmp_path):
    model = adapted(ia.Shira(density=0.1))
    y = model(some_input())
    ia.save(model, tmp_path / "one")
    ia.attach(model, ia.Lora(2), name="second")
    assert ia.load(model, tmp_path / "one") == "one"
    assert ia.active_names(model) == ["one"]
    assert torch.equal(model(some_input()), y)
    with pytest.raises(ia.IntarsiaError, match="named 'one' is attached already"):
        ia.load(model, tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "v1.0")
    with pytest.raises(ia.IntarsiaError, match="cannot be named 'v1.0'.*name="):
        ia.load(model, tmp_path / "v1.0")
    ia.load(model, tmp_path / "v1.0", "v1")
    assert models.states(model, "v1").keys() == set(SITES)


def test_another_support_is_not_loaded_under_a_live_adapter() -> None:
    net, other = small_net(), small_net()
    start = ia.digest(net)
    for model, seed in ((net, 0), (other, 1)):
        ia.attach(model, ia.Shira(density=0.2), seed=seed)
    with pytest.raises(ia.IntarsiaError, match="another support"):
        net.load_state_dict(other.state_dict())
    ia.activate(net)
    net.load_state_dict({k: v for k, v in other.state_dict().items() if ".adapters." in k}, strict=False)
    ia.activate(net, "default")
    ia.detach(net, "default")
    assert ia.digest(net) == start
