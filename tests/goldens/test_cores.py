"""LoRA-SB, NLoRA, SVFit and LoLDU against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch

import intarsia as ia
from intarsia import registry
from intarsia.methods import Loldu, LoraSb, Nlora, Svfit
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, stir, trained

close = torch.testing.assert_close
LLAMA = (
    [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
)  # the seven linears of a block of LLaMA2-7B, 32 blocks


def _on(method: ia.Method, seed: int = 0) -> torch.nn.Module:
    model = small_net(torch.float64, seed=seed)
    ia.attach(model, method, data=[some_input(torch.float64)], loss=some_loss)
    return model


def _change(model: torch.nn.Module, site: str) -> torch.Tensor:
    """fold(W) - W, as the method itself has it."""
    state = state_of(model, site)
    W = layer_of(model, site).weight.detach()
    folded: torch.Tensor = state.method.fold(state.cast(torch.float64), W, None)[0]
    change: torch.Tensor = folded - W
    return change.detach()


def _gradients(seed: int = 0, *more: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Dense gradients of the base, from a model without adapters."""
    model = more[0] if more else small_net(torch.float64, seed=seed)
    some_loss(model, some_input(torch.float64)).backward()
    return {site: layer_of(model, site).weight.grad for site in SITES}


def _dense(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Dense gradients where the adapted model stands, from a model whose weights are the folded ones."""
    plain = small_net(torch.float64)
    with torch.no_grad():
        for site in SITES:
            layer_of(plain, site).weight += _change(model, site)
    return _gradients(0, plain)


# ------------------------------------------------------------------ LoRA-SB
def test_lora_sb_starts_as_the_best_approximation_of_the_first_step():
    """B^T B = A A^T = 1, R = diag(S) falling, and what is lost of the step -e sign(G) is the rest of its spectrum (Eckart-Young)."""
    model, G = _on(LoraSb(4, 0.01)), _gradients()
    for site in SITES:
        state, step = state_of(model, site), -0.01 * G[site].sign()
        close(state.B.mT @ state.B, torch.eye(4, dtype=torch.float64))
        close(state.A @ state.A.mT, torch.eye(4, dtype=torch.float64))
        R = state.C.detach()
        assert torch.equal(R, torch.diag(R.diagonal()))
        assert (R.diagonal() >= 0).all()
        assert (R.diagonal().diff() <= 0).all()
        lost = (step - _change(model, site)).square().sum()
        close(lost, torch.linalg.svdvals(step)[4:].square().sum())
        whole = step.norm()
        close(whole, torch.tensor(0.01 * math.sqrt(int((G[site] != 0).sum())), dtype=torch.float64))
        assert _change(model, site).norm() <= whole
        assert {name for name, p in state.named_parameters()} == {"C"}
        assert state.C.numel() == state.method.trained_count((24, 16)) == 16


def test_lora_sb_is_the_base_without_its_core():
    model, x = _on(LoraSb(4, 0.01)), some_input(torch.float64)
    assert not torch.equal(model(x), small_net(torch.float64)(x))  # one step on
    with torch.no_grad():
        for site in SITES:
            state_of(model, site).C.zero_()
    assert torch.equal(model(x), small_net(torch.float64)(x))


def test_a_step_on_lora_sb_is_the_full_step_projected():
    """SGD on R moves W by -lr B B^T G A^T A."""
    model = _on(LoraSb(4, 0.01))
    G, before = _dense(model), {site: _change(model, site) for site in SITES}
    some_loss(model, some_input(torch.float64)).backward()
    torch.optim.SGD(trained(model), lr=0.3).step()
    for site in SITES:
        state = state_of(model, site)
        expected = -0.3 * state.B @ state.B.mT @ G[site] @ state.A.mT @ state.A
        close(_change(model, site) - before[site], expected, rtol=0, atol=1e-12)


def test_lora_sb_needs_a_gradient():
    with pytest.raises(ia.IntarsiaError, match="lora-sb chooses by gradient and needs calibration data"):
        ia.attach(small_net(), LoraSb(2))
    with pytest.raises(ia.IntarsiaError, match=r"up: rank=17 is above 16"):
        ia.attach(small_net(), LoraSb(17), data=[some_input()], loss=some_loss)


# ------------------------------------------------------------------ NLoRA
def test_slora_starts_as_the_base_and_moves_b_alone():
    model, x = _on(registry.build({"name": "slora", "rank": 3})), some_input(torch.float64)
    assert torch.equal(model(x), small_net(torch.float64)(x))
    some_loss(model, x).backward()
    for site in SITES:
        state = state_of(model, site)
        assert not state.A.grad.any()
        assert not state.C.grad.any()
        assert state.B.grad.abs().max() > 1e-4


@pytest.mark.parametrize("start", ["residual", "paper", "pinv"])
def test_nlora_is_cut_out_of_the_weight(start):
    """A = W[:r], B = W[:, :r], N = W11 or its pseudo-inverse; the paper's code adds s B N A to the base, the others do not."""
    model = _on(Nlora(3, 4.5, start))
    for site in SITES:
        state, W = state_of(model, site), layer_of(model, site).weight
        N = torch.linalg.pinv(W[:3, :3]) if start == "pinv" else W[:3, :3]
        assert torch.equal(state.A, W[:3])
        assert torch.equal(state.B, W[:, :3])
        close(state.C, N)
        expected = 1.5 * W[:, :3] @ N @ W[:3] if start == "paper" else torch.zeros_like(W)
        close(_change(model, site), expected)
    same = torch.equal(model(some_input(torch.float64)), small_net(torch.float64)(some_input(torch.float64)))
    assert same == Nlora(3, start=start).starts_as_identity == (start != "paper")


def test_the_nystrom_approximation_is_exact_at_its_own_rank():
    """rank(W) = rank(W11) = r: B pinv(W11) A = W."""
    model, generator = small_net(torch.float64), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in SITES:
            O, I = layer_of(model, site).weight.shape
            P, Q = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((O, 4), (4, I)))
            layer_of(model, site).weight.copy_(P @ Q)
    ia.attach(model, Nlora(4, start="pinv"))
    for site in SITES:
        state = state_of(model, site)
        close(state.B @ state.C @ state.A, layer_of(model, site).weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", ["residual", "paper", "pinv", "slora"])
def test_nlora_learns_what_the_three_factors_do(start):
    """After training the change is s (B N A - B0 N0 A0), and every gradient that of the dense one through it."""
    model = _on(Nlora(3, 6.0, start))
    first = {
        site: [t.detach().clone() for t in (state_of(model, site).B, state_of(model, site).C, state_of(model, site).A)]
        for site in SITES
    }
    stir(model, size=0.1)
    G = _dense(model)
    some_loss(model, some_input(torch.float64)).backward()
    for site in SITES:
        state, (B0, N0, A0) = state_of(model, site), first[site]
        B, N, A = state.B.detach(), state.C.detach(), state.A.detach()
        off = 0 if start in ("paper", "slora") else B0 @ N0 @ A0
        close(_change(model, site), 2 * (B @ N @ A - off))
        close(state.C.grad, 2 * B.mT @ G[site] @ A.mT)
        close(state.B.grad, 2 * G[site] @ A.mT @ N.mT)
        close(state.A.grad, 2 * N.mT @ B.mT @ G[site])


def test_inttune_trains_the_core_alone():
    model = _on(registry.build({"name": "inttune", "rank": 3}))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"C"}
    with pytest.raises(ia.IntarsiaError, match="nlora: trains='core' must be all with start=slora"):
        Nlora(3, start="slora", trains="core")


def test_counts_on_llama():
    """At r = 128 the cores of LLaMA2-7B are the paper's 3.67 M; LoRA has 319.8 M."""
    lora, nlora, core = (
        32 * sum(method.trained_count(shape) for shape in LLAMA)
        for method in (ia.Lora(128), Nlora(128), Nlora(128, trains="core"))
    )
    assert nlora - lora == core == 3_670_016
    assert round(lora / 1e6, 1) == 319.8


# ------------------------------------------------------------------ SVFit
def test_svfit_moves_singular_values():
    """dW = U_r diag(d) V_r^T has the singular values |d| and lies in both spans; dL/dd_i = u_i^T G v_i."""
    model = _on(Svfit(5))
    stir(model)
    G = _dense(model)
    some_loss(model, some_input(torch.float64)).backward()
    for site in SITES:
        state, W = state_of(model, site), layer_of(model, site).weight.detach()
        U, _, V = torch.linalg.svd(W)
        d, D = state.C.detach(), _change(model, site)
        assert len(d) == state.method.trained_count((24, 16)) == 5
        close(torch.linalg.svdvals(D)[:5], d.abs().sort(descending=True).values)
        close(U[:, :5] @ U[:, :5].mT @ D, D)
        close(D @ V[:5].mT @ V[:5], D)
        close(state.C.grad, torch.einsum("oi,oj,ij->i", U[:, :5], G[site], V[:5]))


def test_svfit_is_pissa_whose_diagonal_alone_trains():
    """The part split off is PiSSA's, and with all values that of the whole weight."""
    model, other = _on(Svfit(4)), small_net(torch.float64)
    ia.attach(other, ia.Lora(4, start="pissa"))
    for site in SITES:
        mine, its = state_of(model, site), state_of(other, site)
        values = torch.linalg.svdvals(layer_of(model, site).weight)[:4]
        close(mine.B * values @ mine.A, its.method.scale * its.B @ its.A)
    whole = _on(Svfit(None))
    for site in SITES:
        state, W = state_of(whole, site), layer_of(whole, site).weight
        close(state.B * torch.linalg.svdvals(W) @ state.A, W)


# ------------------------------------------------------------------ LoLDU
@pytest.mark.parametrize("seed", range(3))
def test_loldu_decomposes_the_weight(seed):
    """P L diag(D) U = W for tall and wide weights, L and U with a unit diagonal."""
    model = _on(Loldu(None), seed)
    for site in SITES:
        state, W = state_of(model, site), layer_of(model, site).weight
        close(state.B * state.C @ state.A, W, rtol=0, atol=1e-14)
        assert (state.A.diagonal() == 1).all()
        assert torch.equal(state.A, state.A.triu())
        assert state.B.abs().max() <= 1  # partial pivoting


@pytest.mark.parametrize("start", ["lu", "uniform", "normal", "constant", "ones", "zeros"])
def test_loldu_starts_as_the_base_and_moves_its_diagonal(start):
    """dW = s P L_r diag(z - z_0) U_r is of the rank of what has moved; dL/dz_i = s (P L)_i^T G U_i."""
    model, x = _on(Loldu(6, 9.0, start)), some_input(torch.float64)
    assert torch.equal(model(x), small_net(torch.float64)(x))
    D = torch.linalg.lu(layer_of(model, "up").weight.detach()).U.diagonal()
    z = state_of(model, "up").C.detach()
    expected = {"lu": D[:6], "constant": D.mean().expand(6), "ones": torch.ones(6), "zeros": torch.zeros(6)}.get(start)
    assert expected is None or torch.equal(z, expected.to(z))
    assert start != "uniform" or bool((z.abs() <= D.mean().abs() / 2).all() and z.std() > 0)
    with torch.no_grad():
        for site in SITES:
            state_of(model, site).C[[1, 4]] += torch.tensor([0.3, -0.2], dtype=torch.float64)
    G = _dense(model)
    some_loss(model, x).backward()
    for site in SITES:
        state = state_of(model, site)
        change = 1.5 * (state.B[:, [1, 4]] * torch.tensor([0.3, -0.2], dtype=torch.float64)) @ state.A[[1, 4]]
        close(_change(model, site), change.detach())
        assert int(torch.linalg.matrix_rank(_change(model, site))) == 2
        close(state.C.grad, 1.5 * torch.einsum("oi,oj,ij->i", state.B, G[site], state.A))
        assert state.C.numel() == state.method.trained_count((24, 16)) == 6


def test_the_normal_start_of_loldu_is_the_diagonal_s():
    D = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 2
    z = Loldu(start="normal")._first(D, ia.method.Start.at("up", 0))
    assert abs(float(z.mean() - D.mean())) < 0.02
    assert abs(float(z.std() - D.std())) < 0.02


@pytest.mark.parametrize("zeros", [False, True])
def test_a_vanishing_pivot_stays_in_the_weight(zeros):
    """A weight of rank 3: the rest of D is 0, or what rounding left of it, and nothing is divided by that."""
    model = small_net(torch.float64)
    with torch.no_grad():
        W = layer_of(model, "up").weight
        W.copy_(torch.cat([W[:, :3], 0 * W[:, 3:]], 1) if zeros else W[:, :3] @ W[:3, :])
    ia.attach(model, Loldu(8), targets="up")
    state = state_of(model, "up")
    assert state.A.isfinite().all()
    assert not state.B[:, 3:].any()
    with torch.no_grad():
        state.C.add_(1.0)
    assert int(torch.linalg.matrix_rank(_change(model, "up"))) == 3


# ------------------------------------------------------------------ all of them
@pytest.mark.parametrize(
    "method",
    [LoraSb(3, 0.01), Nlora(2), Nlora(2, trains="core"), Svfit(3), Loldu(3), ia.Lora(2, start="pissa")],
    ids=lambda m: m.name,
)
def test_peft_gets_the_same_change(method, tmp_path):
    """What is of low rank is exported to PEFT's LoRA, and read back is the same change."""
    from intarsia.interop import peft_lora, read_peft

    model = small_net()
    ia.attach(model, method, data=[some_input()], loss=some_loss)
    stir(model)
    adapter, plain = ia.export(model), small_net()
    peft_lora.write(adapter, plain, tmp_path / "peft")
    other = read_peft(tmp_path / "peft", plain)
    for weight, edit in adapter.edits.items():
        zero = torch.zeros(edit.shape, dtype=torch.float64)
        close(other.edits[weight].delta(zero), edit.delta(zero), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraSb(2, 0.0), "lora-sb: first_step=0.0 must be positive"),
        (lambda: Loldu(None, 2.0), "loldu: alpha=2.0 must be positive, or none; none where rank is none"),
        (lambda: Loldu(start="lu0"), "loldu: start='lu0' must be one of lu, uniform"),
        (lambda: Svfit(0), "svfit: rank=0 must be 1 or more, or none"),
        (lambda: Nlora(start="none"), "nlora: start='none' must be one of residual"),
    ],
)
def test_fields_out_of_range(make, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        make()


@pytest.mark.parametrize("method", [LoraSb(3), Svfit(3), Nlora(3), ia.Lora(3, start="pissa")], ids=lambda m: m.name)
def test_a_file_of_another_rank_is_refused(method, tmp_path):
    model = small_net()
    ia.attach(model, type(method)(2), data=[some_input()], loss=some_loss)
    state = state_of(model, "up")
    with pytest.raises(ia.IntarsiaError, match=r"up: the file has \(rank, scale\) \(2, .*its own config asks for"):
        method.restore(state.method.edit(state.raw()), ia.site.site_at(small_net(), "up"))
