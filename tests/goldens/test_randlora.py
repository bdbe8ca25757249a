"""RandLoRA against the explicit sum over its bases, against plain autograd, and against HF PEFT on the same bases."""

from __future__ import annotations

import math

import peft
import pytest
import torch

import intarsia as ia
from intarsia.edits import Scaled, bases, scaled_factors
from intarsia.methods import Randlora
from intarsia.site import find_sites
from small import SITES, layer_of, small_net, some_input, state_of, stir

SHAPES = [(24, 16), (16, 24), (20, 20)]
KEY = torch.tensor(0)


def _attached(method: ia.Method, shape: tuple[int, int], size: float = 0.3):
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], dtype=torch.float64))
    ia.attach(model, method)
    if size:
        stir(model, size=size)
    return model, state_of(model, "0")


def _change(state) -> torch.Tensor:
    change: torch.Tensor = state.method.delta(state.raw()).detach()
    return change


def _sum(state, rank: int, kind: str = "dense") -> torch.Tensor:
    """sum_j B_j diag(lambda_j) A diag(gamma_j), D x d, term by term."""
    B, A = bases(KEY, state.shape, rank, state.lam.shape[1], kind, torch.float64)
    total = torch.zeros(max(state.shape), min(state.shape), dtype=torch.float64)
    for j in range(state.lam.shape[1]):
        total += B[:, j] @ torch.diag(state.lam.detach()[:, j]) @ A @ torch.diag(state.gamma.detach()[j])
    return total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse"])
@pytest.mark.parametrize("rank", [4, 5])
def test_the_change_is_the_explicit_sum(shape, kind, rank):
    model, state = _attached(Randlora(rank=rank, alpha=30.0, bases=kind), shape)
    total = _sum(state, rank, kind)
    expected = 30.0 / rank * (total if shape[0] >= shape[1] else total.T)
    torch.testing.assert_close(_change(state), expected, rtol=0, atol=1e-12)
    x = some_input(torch.float64, 7, shape[1])
    own = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model(x) - own, x @ expected.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peft_order", [False, True])
def test_the_gradients_are_those_of_plain_autograd(shape, peft_order):
    model, state = _attached(Randlora(rank=5, peft_order=peft_order), shape)
    B, A = bases(KEY, shape, 5, state.lam.shape[1], "dense", torch.float64)
    lam, gamma = (t.detach().clone().requires_grad_() for t in (state.lam, state.gamma))
    rows = lam[:, :, None] * A[:, None] * gamma
    small = (rows if peft_order else rows.transpose(0, 1)).reshape(-1, min(shape))
    change = 20.0 * B.flatten(1) @ small
    x = some_input(torch.float64, 7, shape[1]).requires_grad_()
    again = x.detach().clone().requires_grad_()
    W, b = model[0].weight.detach(), model[0].bias.detach()
    y = torch.nn.functional.linear(again, W + (change if shape[0] >= shape[1] else change.T), b)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-10)
    y.sin().sum().backward()
    model(x).sin().sum().backward()
    for found, expected in ((state.lam, lam), (state.gamma, gamma), (x, again)):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", ["dense", "sparse", "very_sparse"])
def test_in_their_order_it_equals_peft_on_the_same_bases(shape, sparsity):
    """PEFT's layer with our bases in its buffers, our lambda and gamma: the same output, gradients and merged weight."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], dtype=torch.float64))
    config = peft.RandLoraConfig(
        r=5,
        randlora_alpha=100,
        target_modules=["0"],
        sparse=sparsity == "sparse",
        very_sparse=sparsity == "very_sparse",
    )
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], dtype=torch.float64)), config)
    layer = theirs.base_model.model[0]
    ours_method = Randlora(rank=5, alpha=100.0, bases=sparsity, peft_order=True)
    ia.attach(plain, ours_method)
    state = state_of(plain, "0")
    assert layer.randlora_lambda["default"].shape == state.lam.shape
    assert layer.randlora_gamma["default"].shape == state.gamma.shape
    assert not layer.randlora_lambda["default"].any()
    torch.testing.assert_close(layer.randlora_gamma["default"].double(), state.gamma.detach(), rtol=0, atol=1e-7)
    stir(plain, size=0.3)
    B, A = bases(KEY, shape, 5, state.lam.shape[1], sparsity, torch.float64)
    assert layer.randlora_B["default"].shape == B.shape
    assert layer.randlora_A["default"].shape == (5, 1, min(shape))
    with torch.no_grad():
        layer.get_base_layer().weight.copy_(plain[0].weight)
        layer.get_base_layer().bias.copy_(plain[0].bias)
    layer.randlora_A["default"], layer.randlora_B["default"] = A[:, None], B
    layer.randlora_lambda["default"] = torch.nn.Parameter(state.lam.detach().clone())
    layer.randlora_gamma["default"] = torch.nn.Parameter(state.gamma.detach().clone())
    x = some_input(torch.float64, 7, shape[1])
    torch.testing.assert_close(plain(x), theirs(x), rtol=0, atol=1e-10)
    for net in (plain, theirs):
        net(x).sin().sum().backward()
    torch.testing.assert_close(state.lam.grad, layer.randlora_lambda["default"].grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.gamma.grad, layer.randlora_gamma["default"].grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(_change(state), layer.get_delta_weight("default"), rtol=0, atol=1e-10)


def test_the_papers_order_is_another_pairing():
    _, state = _attached(Randlora(rank=5), (24, 16))
    lam, gamma = state.lam.detach(), state.gamma.detach()
    changes = {
        order: torch.linalg.multi_dot(scaled_factors(lam, gamma, KEY, (24, 16), "dense", order))
        for order in ("paper", "peft")
    }
    assert float((changes["paper"] - changes["peft"]).abs().max()) > 0.1


def test_the_rank_is_full_and_with_one_basis_that_of_the_basis():
    """Ablation b has half of the bases and half of the rank, ablation a one product of two sums."""
    ranks = {
        name: int(torch.linalg.matrix_rank(_change(_attached(method, (24, 16))[1])))
        for name, method in {
            "full": Randlora(rank=4),
            "uneven": Randlora(rank=5),
            "one": Randlora(rank=16),
            "half": Randlora(rank=4, update="half"),
            "summed": Randlora(rank=4, update="summed"),
        }.items()
    }
    assert ranks == {"full": 16, "uneven": 16, "one": 16, "half": 8, "summed": 4}
    _, state = _attached(Randlora(rank=3), (24, 3))
    assert state.lam.shape == (3, 1)
    assert int(torch.linalg.matrix_rank(_change(state))) == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ablations_are_their_formulas(shape):
    for update in ("summed", "half"):
        _, state = _attached(Randlora(rank=4, update=update), shape)
        if update == "half":
            total = _sum(state, 4)
        else:
            B, A = bases(KEY, shape, 4, state.lam.shape[1], "dense", torch.float64)
            left = torch.stack([B[:, j] @ torch.diag(state.lam.detach()[:, j]) for j in range(B.shape[1])]).sum(0)
            total = left @ torch.stack([A @ torch.diag(g) for g in state.gamma.detach()]).sum(0)
        torch.testing.assert_close(
            _change(state), 20.0 * (total if shape[0] >= shape[1] else total.T), rtol=0, atol=1e-11
        )


def test_the_count_is_inverse_in_the_rank():
    for rank in (1, 5, 6, 32):
        for shape in ((768, 768), (4096, 1024), (24, 16)):
            d = min(shape)
            assert Randlora(rank=rank).trained_count(shape) == math.ceil(d / rank) * (rank + d)
    small, large = (Randlora(rank=rank).trained_count((4096, 4096)) for rank in (16, 32))
    assert large / small == pytest.approx(0.5, abs=0.01)


def test_at_the_start_lambda_alone_gets_a_gradient():
    model, state = _attached(Randlora(rank=5), (24, 16), size=0.0)
    model(some_input(torch.float64, 7, 16)).sin().sum().backward()
    assert not _change(state).any()
    assert state.lam.grad.all()
    assert not state.gamma.grad.any()
    assert torch.equal(state.gamma, torch.full_like(state.gamma, 1 / 16))


@pytest.mark.parametrize(("kind", "share"), [("dense", 1.0), ("sparse", 1 / 3), ("very_sparse", 1 / 16)])
def test_the_bases_have_the_variance_that_theirs_have(kind, share):
    for N in bases(KEY, (300, 256), 64, 4, kind, torch.float64):
        assert float(N.std()) == pytest.approx(1, rel=0.05)
        assert abs(float(N.mean())) < 0.03
        assert float((N != 0).double().mean()) == pytest.approx(share, rel=0.05)
        assert kind != "dense" or float(N.abs().max()) <= math.sqrt(3)
        assert kind == "dense" or N.unique().tolist() == pytest.approx([-(share**-0.5), 0.0, share**-0.5])


def test_the_bases_of_a_small_weight_are_slices_of_those_of_a_large_one():
    B, A = bases(KEY, (64, 48), 4, 12, "dense", torch.float64)
    b, a = bases(KEY, (16, 30), 4, 4, "dense", torch.float64)
    assert torch.equal(b, B[:30, :4])
    assert torch.equal(a, A[:, :16])


def test_nothing_as_large_as_the_bases_is_kept_for_backward():
    model = torch.nn.Sequential(torch.nn.Linear(80, 96))
    ia.attach(model, Randlora(rank=16))
    there = {t.untyped_storage().data_ptr() for t in model.parameters()}
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    x = some_input(torch.float32, 3, 80).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert max(kept) == x.untyped_storage().nbytes()
    y.sum().backward()
    assert state_of(model, "0").lam.grad.any()


def test_a_file_has_lambda_gamma_and_the_seed(tmp_path):
    model = small_net()
    ia.attach(model, Randlora(rank=5, basis_seed=3))
    stir(model, size=0.3)
    adapter = ia.read(ia.save(model, tmp_path / "a"))
    for site in SITES:
        edit, state = adapter.edits[f"{site}.weight"], state_of(model, site)
        assert isinstance(edit, Scaled)
        assert edit.seed == 3
        assert edit.bytes == 4 * Randlora(rank=5).trained_count(edit.shape)
        assert torch.equal(edit.delta(layer_of(model, site).weight), _change(state))
    other = small_net()
    with pytest.raises(ia.IntarsiaError, match="that its own config does not make"):
        Randlora(rank=5).restore(adapter.edits["up.weight"], find_sites(other, "up")["up"])
