"""MELoRA against a loop over its slices, against LoRA, and the shape of what it changes."""

from __future__ import annotations

import math

import pytest
import torch

import intarsia as ia
from intarsia.analyze import spectrum
from intarsia.edits import Blocks
from intarsia.methods import Melora
from small import SITES, layer_of, small_net, some_input, state_of, stir

O, I, N, R = 24, 16, 4, 2


def _attached(method: ia.Method, shape: tuple[int, int] = (O, I)):
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], dtype=torch.float64))
    ia.attach(model, method)
    stir(model, size=0.5)
    return model, state_of(model, "0")


def test_the_forward_is_a_loop_over_the_slices():
    """y_o = W_o x + s B_i A_i x_i for every slice, entry by entry; for an input of each number of dimensions."""
    model, state = _attached(Melora(rank=R, alpha=3.0, blocks=N))
    A, B, s = state.A.detach(), state.B.detach(), 3.0 / R
    for shape in ((I,), (5, I), (2, 3, I)):
        x = some_input(torch.float64, *shape)
        y, base = model(x).detach(), torch.nn.functional.linear(x, model[0].weight, model[0].bias).detach()
        for token, found, own in zip(x.reshape(-1, I), y.reshape(-1, O), base.reshape(-1, O), strict=True):
            for i in range(N):
                for o in range(O // N):
                    added = sum(
                        float(B[i, o, k]) * sum(float(A[i, k, j]) * float(token[i * I // N + j]) for j in range(I // N))
                        for k in range(R)
                    )
                    here = i * O // N + o
                    assert float(found[here] - own[here]) == pytest.approx(s * added, abs=1e-12)


def test_one_block_is_lora():
    """The same output and gradients, given the same factors."""
    model, state = _attached(Melora(rank=3, blocks=1))
    lora, other = _attached(ia.Lora(3))
    with torch.no_grad():
        lora[0].weight.copy_(model[0].weight)
        lora[0].bias.copy_(model[0].bias)
        other.A.copy_(state.A[0])
        other.B.copy_(state.B[0])
    x = some_input(torch.float64, 5, I)
    torch.testing.assert_close(model(x), lora(x), rtol=0, atol=1e-13)
    for net in (model, lora):
        net(x).sin().sum().backward()
    torch.testing.assert_close(state.A.grad[0], other.A.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.B.grad[0], other.B.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("blocks", "rank"), [(2, 3), (4, 2), (8, 2)])
def test_the_change_is_block_diagonal_and_of_rank_n_r(blocks, rank):
    _, state = _attached(Melora(rank=rank, blocks=blocks))
    change = state.method.delta(state.raw()).detach()
    rows, columns = torch.arange(O) // (O // blocks), torch.arange(I) // (I // blocks)
    inside = rows[:, None] == columns
    assert not change[~inside].any()
    assert change[inside].all()
    assert int(torch.linalg.matrix_rank(change)) == blocks * rank


def test_the_count_does_not_depend_on_the_blocks():
    counts = {Melora(rank=8, blocks=n).trained_count((768, 768)) for n in (1, 2, 4, 8)}
    assert counts == {8 * (768 + 768)}
    assert 8 * Melora(rank=1, blocks=8).trained_count((4096, 1024)) == ia.Lora(8).trained_count((4096, 1024))


def test_it_starts_by_the_width_of_a_slice():
    model = torch.nn.Sequential(torch.nn.Linear(400, 200))
    ia.attach(model, Melora(rank=8, blocks=4))
    state, bound = state_of(model, "0"), 1 / math.sqrt(100)
    assert not state.B.any()
    assert 0.99 * bound < float(state.A.detach().abs().max()) <= bound
    assert float(state.A.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Melora(rank=1, blocks=5), "up: blocks=5 does not divide both sides of the 24 x 16 weight"),
        (Melora(rank=1, blocks=16), "up: blocks=16 does not divide both sides of the 24 x 16 weight"),
        (Melora(rank=5, blocks=4), "up: rank=5 is above 4, the rank of one of 4 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(method, said):
    with pytest.raises(ia.IntarsiaError, match=said):
        ia.attach(small_net(), method)


def test_a_saved_adapter_is_the_small_factors_and_a_lora_of_rank_n_r(tmp_path):
    model = small_net()
    ia.attach(model, Melora(rank=R, blocks=N))
    stir(model, size=0.3)
    adapter = ia.read(ia.save(model, tmp_path / "a"))
    for site in SITES:
        edit, state = adapter.edits[f"{site}.weight"], state_of(model, site)
        assert isinstance(edit, Blocks)
        assert sum(t.numel() for t in edit.tensors().values()) == R * sum(edit.shape)
        W = layer_of(model, site).weight.detach()
        change = edit.delta(W)
        assert torch.equal(change, state.method.delta(state.raw()))
        assert edit.touched == int((change != 0).sum())
        low = edit.low_rank()
        assert low.A.shape == (N * R, edit.shape[1])
        torch.testing.assert_close(low.delta(W), change, rtol=0, atol=1e-6)
        torch.testing.assert_close(spectrum(edit), torch.linalg.svdvals(change), rtol=0, atol=1e-5)
