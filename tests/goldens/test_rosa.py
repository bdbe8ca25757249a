"""RoSA, Supra and SLTrain: against HF PEFT, against autograd through a dense sum, and what their papers say of rank and count."""

from __future__ import annotations

import contextlib
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F

import intarsia as ia
from intarsia.edits import LowRank, Sparse, Sum
from intarsia.methods import Rosa
from small import SITES, adapted, beside_the_base, layer_of, small_net, some_input, some_loss, state_of, stir, trained


def test_supra_equals_peft():
    """The same support (the largest weights), the same output and the same gradients of values, A and B."""
    model = small_net()
    ia.attach(model, ia.registry.build({"name": "supra", "rank": 3, "density": 0.1, "alpha": 5.0, "scale": 1.0}))
    stir(model)
    config = peft.SupertuningConfig(target_modules=list(SITES), sparsity=0.9, r=3, lora_alpha=5.0)
    other: Any = peft.get_peft_model(small_net(), config)
    pairs = []
    for site in SITES:
        state, layer = state_of(model, site), other.get_submodule(f"base_model.model.{site}")
        index = layer.supertuning_indices["default"].long()
        assert set(index.tolist()) == set(state.index.tolist())
        order = index.argsort()
        with torch.no_grad():
            layer.supertuning_values["default"][order] = state.values
            layer.supertuning_lora_A["default"].weight.copy_(state.A)
            layer.supertuning_lora_B["default"].weight.copy_(state.B)
        pairs.append((state, layer, order))
    x, x_other = (some_input().requires_grad_() for _ in range(2))
    torch.testing.assert_close(model(x), other(x_other), rtol=1e-4, atol=2e-6)
    some_loss(model, x).backward()
    some_loss(other, x_other).backward()
    torch.testing.assert_close(x.grad, x_other.grad, rtol=1e-4, atol=2e-6)
    for state, layer, order in pairs:
        theirs = (
            (state.values, layer.supertuning_values["default"].grad[order]),
            (state.A, layer.supertuning_lora_A["default"].weight.grad),
            (state.B, layer.supertuning_lora_B["default"].weight.grad),
        )
        for mine, their in theirs:
            assert mine.grad.abs().max() > 1e-4
            torch.testing.assert_close(mine.grad, their, rtol=1e-4, atol=2e-6)
    assert sum(p.numel() for p in trained(model)) == sum(p.numel() for p in trained(other))


@pytest.mark.parametrize("live", [True, False], ids=["live", "branch"])
def test_gradients_are_those_of_the_dense_sum(live):
    """y = x (W + s2 B A + scatter_add(s1 v))^T by plain autograd: x, B, A, v and the bias."""
    model = adapted(Rosa(rank=3, density=0.1, scorer="random"), torch.float64, targets="up")
    layer, state = layer_of(model, "up"), state_of(model, "up")
    layer.bias.requires_grad_(True)
    base = layer_of(small_net(torch.float64), "up").weight.detach()
    x, gy = some_input(torch.float64, 9, 16).requires_grad_(), some_input(torch.float64, 9, 24, seed=4)
    s1 = state.method.sparse.scale_at((24, 16))
    S = torch.zeros(24 * 16, dtype=torch.float64).scatter_add(0, state.index, s1 * state.values).view(24, 16)
    wanted = [x, state.B, state.A, state.values, layer.bias]
    expected_y = F.linear(x, base + 2.0 * state.B @ state.A + S, layer.bias)
    expected = torch.autograd.grad(expected_y, wanted, gy)
    with contextlib.nullcontext() if live else beside_the_base(model):
        assert (layer.live is not None) == live
        found_y = layer(x)
        gradients = torch.autograd.grad(found_y, wanted, gy)
    torch.testing.assert_close(found_y, expected_y, rtol=0, atol=1e-12)
    for found, gradient in zip(gradients, expected, strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-11)


def test_rosa_takes_the_largest_mean_squares_of_the_gradient():
    model = small_net(torch.float64)
    weight = layer_of(model, "up").weight
    batches = [some_input(torch.float64, seed=seed) for seed in (1, 2, 3)]
    squares = sum(torch.autograd.grad(some_loss(model, batch), weight)[0].square() for batch in batches)
    assert isinstance(squares, torch.Tensor)
    ia.attach(model, Rosa(rank=2, density=0.1), targets="up", data=batches, loss=some_loss)
    expected = squares.flatten().topk(38).indices.sort().values
    assert torch.equal(state_of(model, "up").index, expected)


def test_a_random_sparse_part_makes_the_rank_full():
    """40 x 40, r = 4, density 0.1: rank 4 without it and 40 with it, at the start 0."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 40, dtype=torch.float64))
    ia.attach(model, ia.registry.build({"name": "sltrain", "rank": 4, "density": 0.1}))
    state = state_of(model, "0")
    assert int((state.method.delta(state.raw()) != 0).sum()) == 0
    index = state.index.clone()
    assert len(index) == 160
    stir(model)
    assert int(torch.linalg.matrix_rank(state.B @ state.A)) == 4
    assert int(torch.linalg.matrix_rank(state.method.delta(state.raw()))) == 40
    optimizer = torch.optim.Adam(trained(model), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        some_loss(model, some_input(torch.float64, 4, 40)).backward()
        optimizer.step()
    assert torch.equal(state.index, index)
    assert sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.ndim) == 2 * (160 + 4 * 80)


def test_the_count():
    for shape in ((576, 576), (4096, 11008)):
        method = ia.registry.build({"name": "sltrain", "rank": 128, "density": 0.03})
        assert method.trained_count(shape) == round(0.03 * shape[0] * shape[1]) + 128 * sum(shape)


def test_only_x_and_its_low_rank_image_are_kept_for_backward():
    model = torch.nn.Sequential(torch.nn.Linear(80, 96))
    ia.attach(model, Rosa(rank=4, density=0.1, scorer="random"))
    layer = layer_of(model, "0")
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    x = some_input(torch.float32, 5, 80).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sorted(kept.values()) == [5 * 4, 5 * 80]


def test_the_file_holds_a_sum_of_two_edits(tmp_path):
    model = adapted(Rosa(rank=2, density=0.1))
    adapter = ia.read(ia.save(model, tmp_path / "a"))
    edit = adapter.edits["up.weight"]
    assert isinstance(edit, Sum)
    sparse, low_rank = edit.parts
    assert isinstance(sparse, Sparse)
    assert isinstance(low_rank, LowRank)
    assert set(edit.tensors()) == {"0_indices", "0_values", "1_A", "1_B"}
    W = layer_of(small_net(), "up").weight.detach()
    expected = W + 2.0 * low_rank.B @ low_rank.A
    expected.view(-1).index_add_(0, sparse.index, sparse.values)
    torch.testing.assert_close(edit.fold(W), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("facts", "names", "message"),
    [
        ({}, ["0_A"], "a list of the edits"),
        ({"parts": []}, [], "a list of the edits"),
        ({"parts": [{"type": "low_rank", "scale": 1.0}]}, ["1_A"], "found the tensor 1_A; expected 0_"),
        ({"parts": [{"type": "low_rank", "scale": 1.0}]}, ["A"], "found the tensor A"),
        ({"parts": [{"type": "low_rank", "scale": 1.0}]}, ["00_A"], "found the tensor 00_A"),
        ({"parts": [{"type": "rows_and"}]}, [], "unknown edit type 'rows_and'"),
    ],
)
def test_a_damaged_sum_is_refused(facts, names, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        Sum.build((4, 4), {name: torch.zeros(4, 4) for name in names}, facts)


def test_a_file_of_another_kind_is_refused(tmp_path):
    """The config says RoSA and the edits are LoRA's."""
    model = adapted(ia.Lora(2))
    adapter = ia.read(ia.save(model, tmp_path / "a"))
    method = Rosa(rank=2, density=0.1)
    site = type("Site", (), {"name": "up", "shape": (24, 16)})()
    with pytest.raises(ia.IntarsiaError, match="up: the file has a low_rank edit; rosa needs a sum of two"):
        method.restore(adapter.edits["up.weight"], site)
