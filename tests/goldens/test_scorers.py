"""Scorers against their formulas, written out by hand or by plain autograd; what is gathered of data; outside functions."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import intarsia as ia
from intarsia.calibrate import gather
from intarsia.method import Start
from intarsia.site import Site
from intarsia.support import SCORERS, score, scorer
from small import SITES, layer_of, small_net, some_input, some_loss, state_of

DATA = [some_input(seed=seed) for seed in (1, 2, 3)]
W = torch.tensor([[1.0, -4.0, 0.5], [-2.0, 0.25, 3.0]])
G = torch.tensor([[0.5, 0.25, -8.0], [-1.0, 2.0, 0.1]])


def _site(weight: torch.Tensor) -> Site:
    return Site("up", weight, None)


def _gathered(model, needs: set[str], data=DATA, loss=some_loss, sites=SITES) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    weights = {site: layer_of(model, site).weight for site in sites}

    def use(name, tensors):
        assert name not in found
        found[name] = {need: tensor.clone() for need, tensor in tensors.items()}

    gather(model, weights, frozenset(needs), data, use, loss)
    assert found.keys() == set(sites)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", [[1.0, 4.0, 0.5], [2.0, 0.25, 3.0]]),
        ("gradient", [[0.5, 0.25, 8.0], [1.0, 2.0, 0.1]]),
        ("snip", [[0.5, 1.0, 4.0], [2.0, 0.5, 0.3]]),
        ("fisher", [[1.0, 9.0, 2.0], [0.0, 3.0, 7.0]]),
        ("wanda", [[2.0, 4.0, 5.0], [4.0, 0.25, 30.0]]),
        ("activation", [[2.0, 1.0, 10.0], [2.0, 1.0, 10.0]]),
        ("movement", [[6.0, 5.0, 4.0], [3.0, 2.0, 1.0]]),
    ],
)
def test_scores_by_hand(name, expected):
    start = Start(
        0,
        gradient=G,
        fisher=torch.tensor([[1.0, 9.0, 2.0], [0.0, 3.0, 7.0]]),
        inputs=torch.tensor([2.0, 1.0, 10.0]),
        movement=torch.tensor([[6.0, 5.0, 4.0], [3.0, 2.0, 1.0]]),
    )
    torch.testing.assert_close(score(name, _site(W), start), torch.tensor(expected))


def test_every_scorer_is_tested_here():
    assert set(SCORERS) == {"magnitude", "gradient", "snip", "fisher", "wanda", "activation", "movement", "residual"}


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (40, 90), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_residual_is_what_the_truncated_decomposition_leaves(shape, dtype):
    """Against the exact SVD, on a weight whose spectrum falls by a third a step; 16 ranks, or a quarter of the smaller side."""
    n, generator = min(shape), torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(shape[0], n, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(shape[1], n, generator=generator, dtype=torch.float64)).Q
    weight = (U * 1.5 ** -torch.arange(n) @ V.mT).to(dtype)
    left, s, right = torch.linalg.svd(weight.double(), full_matrices=False)
    r = max(1, min(16, n // 4))
    exact = (weight.double() - left[:, :r] * s[:r] @ right[:r]).abs()
    found = score("residual", _site(weight), Start.at("up", 0))
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5 * float(s[0]))


# ------------------------------------------------------------------ what is gathered of data
@pytest.mark.parametrize("batches", [1, 3])
def test_fisher_is_the_sum_of_the_squares_of_each_batchs_gradient(batches):
    model, plain = small_net(), small_net()
    expected = {site: torch.zeros_like(layer_of(plain, site).weight) for site in SITES}
    for x in DATA[:batches]:
        weights = [layer_of(plain, site).weight for site in SITES]
        for site, grad in zip(SITES, torch.autograd.grad(some_loss(plain, x), weights), strict=True):
            expected[site] += grad**2
    found = _gathered(model, {"fisher"}, DATA[:batches])
    for site in SITES:
        torch.testing.assert_close(found[site]["fisher"], expected[site], rtol=1e-5, atol=1e-12)
        assert found[site].keys() == {"fisher"}


@pytest.mark.parametrize("needs", [{"inputs"}, {"inputs", "gradient"}], ids=lambda needs: "+".join(sorted(needs)))
def test_norms_of_the_inputs_are_over_all_tokens_of_all_batches(needs):
    model, x = small_net(), torch.cat(DATA)
    found = _gathered(model, needs)
    for site in SITES:
        expected = x.reshape(-1, x.shape[-1]).square().sum(0).sqrt()
        torch.testing.assert_close(found[site]["inputs"], expected)
        x = torch.tanh(layer_of(model, site)(x)).detach()


def test_norms_of_the_inputs_need_no_backward_and_no_labels(tiny_llama, monkeypatch):
    net = tiny_llama()
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("a backward pass"))
    ia.attach(net, ia.Shira(density=0.01, scorer="wanda"), data=[{"input_ids": torch.arange(12).view(2, 6)}])
    assert len(ia.export(net).edits) == 14


def test_tokens_that_the_mask_hides_do_not_count(tiny_llama):
    """A padded row has the norms of the row alone."""
    name = "model.layers.1.mlp.down_proj"
    ids = torch.arange(1, 7)[None]
    padded = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 9, 9, 9]]),
        "attention_mask": torch.tensor([[1] * 6 + [0] * 3]),
    }
    alone = _gathered(tiny_llama(), {"inputs"}, [{"input_ids": ids}], None, [name])
    found = _gathered(tiny_llama(), {"inputs"}, [padded], None, [name])
    torch.testing.assert_close(found[name]["inputs"], alone[name]["inputs"], rtol=1e-4, atol=1e-5)


def test_a_wanda_support_is_the_largest_of_its_formula():
    model, x = small_net(), DATA[0]
    ia.attach(model, ia.Shira(density=0.1, scorer="wanda"), data=[x], loss=some_loss)
    plain = small_net()
    for site in SITES:
        scores = layer_of(plain, site).weight.abs() * x.reshape(-1, x.shape[-1]).norm(dim=0)
        assert torch.equal(state_of(model, site).index, scores.flatten().topk(38).indices.sort().values)
        x = torch.tanh(layer_of(plain, site)(x)).detach()


def test_activation_takes_columns():
    model, x = small_net(), DATA[0]
    ia.attach(model, ia.Shira(density=0.125, scorer="activation"), targets="up", data=[x], loss=some_loss)
    largest = x.reshape(-1, 16).norm(dim=0).topk(2).indices.sort().values
    rows, columns = torch.arange(24).repeat_interleave(2), largest.repeat(24)
    assert torch.equal(state_of(model, "up").index, rows * 16 + columns)


def test_data_that_does_not_reach_a_layer_is_refused():
    with pytest.raises(ia.IntarsiaError, match="calibration data does not reach down, again"):
        ia.attach(
            small_net(), ia.Shira(scorer="wanda"), data=DATA, loss=lambda model, x: layer_of(model, "up")(x).sum()
        )


# ------------------------------------------------------------------ somebody's own
@pytest.fixture
def outside(monkeypatch):
    """A module that a scorer is taken from."""
    module = types.ModuleType("outside_scorers")
    monkeypatch.setitem(sys.modules, "outside_scorers", module)
    return module


def test_an_outside_function_is_called_with_site_and_start(outside):
    @scorer("gradient", "inputs")
    def odd(site, start):
        assert site.name in SITES
        assert start.fisher is None
        return start.gradient.abs() * 0 + start.inputs

    outside.odd = odd
    method = ia.Shira(density=0.1, scorer="outside_scorers:odd")
    assert method.needs() == {"gradient", "inputs"}
    assert "odd" not in SCORERS
    own, known = small_net(), small_net()
    ia.attach(own, method, data=DATA, loss=some_loss)
    ia.attach(known, ia.Shira(density=0.1, scorer="activation"), data=DATA, loss=some_loss)
    for site in SITES:
        assert torch.equal(state_of(own, site).index, state_of(known, site).index)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            None,
            "scorer 'outside_scorers:mine': module 'outside_scorers' has no attribute 'mine'; expected 'package.mod",
        ),
        (3, "scorer 'outside_scorers:mine' is a int; expected a function"),
        (
            lambda site, start: 1 / 0,
            "up: the scorer 'outside_scorers:mine' failed: ZeroDivisionError: division by zero",
        ),
        (lambda site, start: None, "up: the scorer 'outside_scorers:mine' gave a NoneType; expected a score for every"),
        (
            lambda site, start: site.weight[0],
            r"up: .* gave a tensor \(16,\); expected a score for every entry, \(24, 16\)",
        ),
        (lambda site, start: site.weight / 0, "up: .* gave scores that are not finite"),
        (lambda site, start: start.given("fisher"), r"fisher is used and was not asked for; .*@scorer\('fisher'\)"),
    ],
    ids=["missing", "number", "raises", "none", "shape", "infinite", "undeclared"],
)
def test_an_outside_function_that_cannot_serve_is_a_clear_error(function, message, outside):
    if function is not None:
        outside.mine = function
    model = small_net()
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.attach(model, ia.Shira(density=0.1, scorer="outside_scorers:mine"))
    assert not ia.attached_names(model)


def test_a_module_that_is_not_there_is_a_clear_error():
    with pytest.raises(ia.IntarsiaError, match="scorer 'no_such_module:f': No module named 'no_such_module'; expected"):
        ia.attach(small_net(), ia.Shira(scorer="no_such_module:f"))


def test_a_scorer_cannot_need_what_is_never_gathered():
    with pytest.raises(ia.IntarsiaError, match="a scorer cannot need 'gradients'; did you mean 'gradient'"):
        scorer("gradients")


def test_loading_imports_no_module_that_a_file_names(tmp_path, outside):
    outside.mine = lambda site, start: site.weight
    model = small_net()
    ia.attach(model, ia.Shira(density=0.1, scorer="outside_scorers:mine"))
    ia.save(model, tmp_path / "a")
    del sys.modules["outside_scorers"]
    ia.load(small_net(), tmp_path / "a")
