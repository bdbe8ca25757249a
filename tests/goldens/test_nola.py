"""NOLA against its formula with every random matrix written out, and what is kept, stored and reachable."""

from __future__ import annotations

import math

import pytest
import torch

import intarsia as ia
from intarsia.analyze import spectrum
from intarsia.compress import to_low_rank
from intarsia.edits import Combined, LowRank, combined_factors, to_dense
from intarsia.edits.seeded import DOWN, START, UP
from intarsia.methods import Nola
from intarsia.support import noise
from small import SITES, layer_of, small_net, some_input, state_of, stir

O, I, K, L, R = 24, 16, 5, 7, 3


def _attached(method: ia.Method, dtype: torch.dtype = torch.float64, size: float = 0.5, seed: int = 0):
    model = torch.nn.Sequential(torch.nn.Linear(I, O, dtype=dtype))
    ia.attach(model, method, seed=seed)
    if size:
        stir(model, size=size)
    return model, state_of(model, "0")


def _bases(seed: torch.Tensor, rank: int = R, down: int = K, up: int = L):
    """A_0, all E_i and all F_j, each entry U(-1, 1) over the root of how many there are; A_0 over that of the inputs."""
    A0 = noise(seed, START, (0, rank), (0, I), torch.float64) / math.sqrt(I)
    E = noise(seed, DOWN, (0, down), (0, rank * I), torch.float64).view(down, rank, I) / math.sqrt(down)
    F = noise(seed, UP, (0, up), (0, O * rank), torch.float64).view(up, O, rank) / math.sqrt(up)
    return A0, E, F


def test_it_is_the_formula_with_all_matrices_written_out():
    """Values and gradients, the explicit basis under plain autograd; and dL/dc is not 0 at the start, where dL/da is."""
    for size in (0.0, 0.5):
        model, state = _attached(Nola(rank=R, down=K, up=L, alpha=2.0), size=size)
        A0, E, F = _bases(state.seed)
        a, c = (t.detach().clone().requires_grad_() for t in (state.a, state.c))
        A = A0 + sum(a[i] * E[i] for i in range(K))
        B = sum(c[j] * F[j] for j in range(L))
        x = some_input(torch.float64, 6, I)
        y = x @ model[0].weight.detach().T + model[0].bias.detach() + 2.0 / R * (x @ A.T @ B.T)
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
        y.sin().sum().backward()
        model(x).sin().sum().backward()
        torch.testing.assert_close(state.a.grad, a.grad, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(state.c.grad, c.grad, rtol=1e-10, atol=1e-11)
        assert state.c.grad.all()
        assert bool(state.a.grad.any()) is bool(size)


def test_the_count_is_k_and_l_whatever_the_rank():
    for rank in (1, 4, 16):
        method = Nola(rank=rank, down=K, up=L)
        assert method.trained_count((4096, 11008)) == K + L
        _, state = _attached(method)
        assert sum(p.numel() for p in state.parameters()) == K + L
        change = state.method.delta(state.raw()).detach()
        assert int(torch.linalg.matrix_rank(change)) <= min(rank, 16)
        assert change.any()


def test_one_seed_gives_the_very_bits_and_another_other_ones():
    first, second, third = (_attached(Nola(rank=R, down=K, up=L), seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first.method.delta(first.raw()), second.method.delta(second.raw()))
    assert not torch.equal(first.method.delta(first.raw()), third.method.delta(third.raw()))


def test_the_first_matrix_is_that_of_lora():
    """A_0 ~ Kaiming uniform with a = sqrt 5, whose bound is 1 / sqrt(I): the distribution, the numbers being another generator's."""
    A0, E, F = _bases(torch.tensor(3), 16, 64, 64)
    reference = torch.nn.init.kaiming_uniform_(torch.empty(2000, I), a=math.sqrt(5))
    assert float(A0.abs().max()) <= 1 / math.sqrt(I)
    assert float(A0.std()) == pytest.approx(float(reference.std()), rel=0.1)
    assert float(E.std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.02)
    assert float(F.std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.02)


def test_with_as_many_matrices_as_entries_every_factor_is_reached():
    """k = r I independent matrices: least squares fits any A without an error."""
    A0, E, _ = _bases(torch.tensor(7), R, R * I)
    wanted = torch.randn(R, I, dtype=torch.float64)
    a = torch.linalg.lstsq(E.flatten(1).T, (wanted - A0).reshape(-1, 1)).solution
    torch.testing.assert_close(A0 + (a.view(-1, 1, 1) * E).sum(0), wanted, rtol=0, atol=1e-10)


def test_the_matrices_of_both_factors_are_unrelated():
    """For a square weight and k = l, E_i and F_j of one place are of different streams."""
    _, state = _attached(Nola(rank=1, down=400, up=400))
    A0 = noise(state.seed, START, (0, 1), (0, I), torch.float64) / math.sqrt(I)
    one = torch.ones(400, dtype=torch.float64)
    B, A = combined_factors(one, one, state.seed, (I, I), 1)
    assert float(((A - A0).reshape(-1) - B.reshape(-1)).abs().min()) > 1e-6


def test_the_chance_of_torch_is_neither_read_nor_moved():
    model, _ = _attached(Nola(rank=R, down=K, up=L))
    state, x = torch.get_rng_state(), some_input(torch.float64, 6, I)
    first = model(x)
    first.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(model(x), first)


def test_no_basis_is_kept_for_backward():
    """Between forward and backward nothing is as large as all the E_i, or all the F_j: the largest is x or an activation."""
    model, _ = _attached(Nola(rank=2, down=64, up=64), torch.float32)
    there = {t.untyped_storage().data_ptr() for t in model.parameters()}
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    x = some_input(torch.float32, 3, I).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert max(kept) <= 4 * 2 * O < 4 * 64 * 2 * I


def test_a_file_has_the_coefficients_and_the_seed(tmp_path):
    model = small_net()
    ia.attach(model, Nola(rank=R, down=K, up=L))
    stir(model, size=0.3)
    adapter, other = ia.read(ia.save(model, tmp_path / "a")), small_net()
    ia.load(other, tmp_path / "a")
    assert torch.equal(other(some_input()), model(some_input()))
    for site in SITES:
        edit, state = adapter.edits[f"{site}.weight"], state_of(model, site)
        assert isinstance(edit, Combined)
        assert edit.seed == int(state.seed)
        assert edit.bytes == 4 * (K + L)
        W = layer_of(model, site).weight.detach()
        torch.testing.assert_close(edit.delta(W), state.method.delta(state.raw()).detach(), rtol=0, atol=1e-7)
        torch.testing.assert_close(edit.low_rank().delta(W), edit.delta(W), rtol=0, atol=1e-7)
        torch.testing.assert_close(spectrum(edit), torch.linalg.svdvals(edit.delta(W)), rtol=0, atol=1e-6)
    lora = to_low_rank(adapter, R)
    for name, edit in adapter.edits.items():
        assert isinstance(lora.edits[name], LowRank)  # the factors themselves, at no loss
        torch.testing.assert_close(to_dense(lora.edits[name]), to_dense(edit), rtol=0, atol=1e-7)


def test_a_larger_weight_has_no_larger_file(tmp_path):
    sizes = []
    for width in (32, 512):
        model = torch.nn.Sequential(torch.nn.Linear(width, width))
        ia.attach(model, Nola(rank=4, down=16, up=16))
        folder = ia.save(model, tmp_path / str(width))
        sizes.append((folder / ia.store.TENSORS).stat().st_size)
    assert sizes[0] == sizes[1] < 1000
