"""WaRA against the matrices of the wavelet, the two collapses of the card, and what its second version amounts to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import intarsia as ia
from intarsia.analyze import spectrum
from intarsia.edits import LowRank
from intarsia.interop.views import as_low_rank
from intarsia.methods import Wara
from small import adapted, layer_of, small_net, some_input, state_of, stir

FEATURE, LOW = Wara(rank=3, bands="ll,hh", shared=True), Wara(rank=3, bands="ll")


def _haar(n: int) -> Tensor:
    """T (n, n), low-pass rows first."""
    T = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n // 2):
        T[i, 2 * i] = T[i, 2 * i + 1] = T[n // 2 + i, 2 * i] = 0.5**0.5
        T[n // 2 + i, 2 * i + 1] = -(0.5**0.5)
    return T


def _made(method: Wara, O: int = 24, I: int = 16):
    net = torch.nn.Sequential(torch.nn.Linear(I, O).double())
    ia.attach(net, method)
    stir(net, size=0.5)
    state = state_of(net, "0")
    return (
        state,
        state.method.edit(state.raw()),
        state.method.edit(state.raw()).delta(layer_of(net, "0").weight.detach()),
    )


@pytest.mark.parametrize("bands", ["ll,lh,hl,hh", "lh", "hl,ll"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_change_is_the_inverse_transform_of_the_bands(bands, shared):
    """Every band by itself in the matrix of coefficients, and as long as they are."""
    state, edit, delta = _made(Wara(rank=2, alpha=3.0, bands=bands, shared=shared))
    C = torch.zeros(24, 16, dtype=torch.float64)
    for number, band in enumerate(bands.split(",")):
        k = 0 if shared else number
        rows, columns = (
            slice(0, n // 2) if letter == "l" else slice(n // 2, n) for letter, n in zip(band, (24, 16), strict=True)
        )
        C[rows, columns] = 1.5 * state.B[k] @ state.A[k]
    torch.testing.assert_close(delta, _haar(24).T @ C @ _haar(16), rtol=0, atol=1e-13)
    torch.testing.assert_close(delta.norm(), C.norm(), rtol=0, atol=1e-13)
    rank = int(torch.linalg.matrix_rank(delta))
    assert rank <= 2 * len(bands.split(","))
    torch.testing.assert_close(spectrum(edit).double(), torch.linalg.svdvals(delta), rtol=1e-5, atol=1e-5)


def test_four_bands_have_four_times_the_rank():
    _, _, delta = _made(Wara(rank=2))
    assert int(torch.linalg.matrix_rank(delta)) == 8


def test_the_figures_reading_collapses_to_a_product_of_kronecker():
    state, edit, delta = _made(FEATURE)
    product = 2.0 * (state.B[0] @ state.A[0]).detach()
    torch.testing.assert_close(delta, torch.kron(product, torch.eye(2, dtype=torch.float64)), rtol=0, atol=1e-13)
    assert int(torch.linalg.matrix_rank(delta)) == 2 * 3
    assert FEATURE.trained_count((24, 16)) * 2 == ia.Lora(rank=3).trained_count((24, 16))
    assert sum(t.numel() for t in edit.tensors().values()) == FEATURE.trained_count((24, 16))  # one copy in a file


def test_low_low_alone_is_constant_on_tiles():
    state, _, delta = _made(LOW)
    ones = torch.ones(2, 2, dtype=torch.float64)
    expected = torch.kron(2.0 * (state.B[0] @ state.A[0]).detach(), ones) / 2
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", [Wara(rank=2), FEATURE, LOW], ids=str)
def test_starts_as_the_base_and_is_exactly_a_lora(method):
    model = small_net()
    ia.attach(model, method)
    assert torch.equal(model(some_input()), small_net()(some_input()))
    _, edit, delta = _made(method)
    low = as_low_rank(edit)
    assert isinstance(low, LowRank)
    torch.testing.assert_close(low.delta(delta), delta, rtol=0, atol=1e-13)


def test_odd_sides_are_filled_up():
    state, _, delta = _made(Wara(rank=2), 7, 5)
    assert state.B.shape == (4, 4, 2)
    assert state.A.shape == (4, 2, 3)
    C = torch.zeros(8, 6, dtype=torch.float64)
    for k, (o, i) in enumerate(((0, 0), (0, 3), (4, 0), (4, 3))):
        C[o : o + 4, i : i + 3] = 2 * state.B[k] @ state.A[k]
    torch.testing.assert_close(delta, (_haar(8).T @ C @ _haar(6))[:7, :5], rtol=0, atol=1e-13)


def test_version_two_with_one_pair_is_lora_itself():
    """Tokens on a grid of h x w, transformed over the grid, a low rank at every coefficient, transformed back: the low rank
    at every token. With the low-low coefficients alone it is the low rank of the means over 2 x 2 tokens."""
    h, w, I, O = 4, 6, 8, 5
    g = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((h, w, I), (2, I), (O, 2)))
    Th, Tw = _haar(h), _haar(w)
    c = torch.einsum("ah,bw,hwi->abi", Th, Tw, x)
    back = torch.einsum("ah,bw,abo->hwo", Th, Tw, c @ A.T @ B.T)
    torch.testing.assert_close(back, x @ A.T @ B.T, rtol=0, atol=1e-12)
    c[h // 2 :], c[:, w // 2 :] = 0, 0
    back = torch.einsum("ah,bw,abo->hwo", Th, Tw, c @ A.T @ B.T)
    means = x.reshape(h // 2, 2, w // 2, 2, I).mean((1, 3)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(back, means @ A.T @ B.T, rtol=0, atol=1e-12)


def test_a_wara_becomes_a_lora_of_peft(tmp_path):
    """The exact low rank is what another engine gets; nothing is lost."""
    model = adapted(LOW)
    found = as_low_rank(ia.export(model).edits["up.weight"])
    assert isinstance(found, LowRank)
    assert found.A.shape[0] == 3


def test_what_makes_no_sense_is_refused():
    for bands in ("", "ll,ll", "lx", "ll hh", "l"):
        with pytest.raises(ia.IntarsiaError, match="bands=.* must be some of ll, lh, hl, hh"):
            Wara(bands=bands)
    with pytest.raises(ia.IntarsiaError, match="up: rank=9 is above 8"):
        ia.attach(small_net(), Wara(rank=9))
