"""EoRA against its paper's formula by an eigendecomposition, and against what it claims: no repair of its rank is better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intarsia as ia
from intarsia import bases
from intarsia import model as models
from intarsia.methods import Eora

O, I, N, RANK = 24, 16, 200, 4


def inputs(k: int = I, seed: int = 1) -> Tensor:
    """N tokens of k dimensions, some of them far larger than others, float64."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, k, dtype=torch.float64)
    return (torch.randn(N, k, generator=generator, dtype=torch.float64) * scales) @ torch.randn(
        k, I, generator=generator, dtype=torch.float64
    )


def weights(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and that weight pruned to two of four."""
    W = torch.randn(O, I, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return W, bases.two_of_four(W)


def repair(W: Tensor, W_c: Tensor, X: Tensor | None, rank: int = RANK, weighting: str = "gram") -> Tensor:
    """B A as the method makes it."""
    net: Any = nn.Sequential(nn.Linear(I, O, bias=False)).double()
    net[0].weight.data.copy_(W_c)
    data = None if X is None else [X[: N // 3], X[N // 3 :]]
    ia.attach(net, Eora(rank=rank, weighting=weighting), data=data, loss=lambda m, x: m(x).sum(), original={"0": W})
    state: Any = models.states(net, "default")["0"]
    change: Tensor = (state.B @ state.A).detach()
    return change


def papers(W: Tensor, W_c: Tensor, X: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B A, the dropped singular values) by the formula of section 3: H = Q Lambda Q^T, E' = E Q Lambda^1/2, A = ... Lambda^-1/2 Q^T."""
    values, Q = torch.linalg.eigh(X.T @ X)
    values = values.clamp_min(values[values > 0].min())
    U, S, V = torch.linalg.svd((W - W_c) @ Q @ values.sqrt().diag(), full_matrices=False)
    B = U[:, :rank] @ S[:rank].sqrt().diag()
    A = S[:rank].sqrt().diag() @ V[:rank] @ values.rsqrt().diag() @ Q.T
    return B @ A, S[rank:]


def error(W: Tensor, W_c: Tensor, BA: Tensor, X: Tensor) -> float:
    return float(((W - W_c - BA) @ X.T).norm())


def test_it_is_the_papers_formula():
    (W, W_c), X = weights(), inputs()
    torch.testing.assert_close(repair(W, W_c, X), papers(W, W_c, X, RANK)[0], rtol=1e-6, atol=1e-8)


def test_the_error_is_that_of_the_values_left_out_and_below_the_plain_svds():
    (W, W_c), X = weights(), inputs()
    found, dropped = error(W, W_c, repair(W, W_c, X), X), papers(W, W_c, X, RANK)[1]
    assert found == pytest.approx(float(dropped.square().sum().sqrt()), rel=1e-6)
    diagonal, plain = (error(W, W_c, repair(W, W_c, X, weighting=w), X) for w in ("diagonal", "none"))
    assert found < diagonal < plain


def test_no_repair_of_its_rank_is_better():
    (W, W_c), X = weights(), inputs()
    best = error(W, W_c, repair(W, W_c, X), X)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        some = torch.randn(O, RANK, generator=generator, dtype=torch.float64)
        A = torch.linalg.lstsq(some, W - W_c).solution  # the best A for some B, by the weight alone
        assert error(W, W_c, some @ A, X) > best
    B = torch.randn(O, RANK, generator=generator, dtype=torch.float64, requires_grad=True)
    root = torch.linalg.cholesky(X.T @ X)
    optimizer = torch.optim.LBFGS(
        [B], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:  # the best A for a B is in closed form, so gradient descent is over B alone
        optimizer.zero_grad()
        E = (W - W_c) @ root
        loss: Tensor = (E - B @ torch.linalg.lstsq(B, E).solution).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    descended = float(closure().detach().sqrt())
    assert best <= descended * (1 + 1e-9)
    assert descended == pytest.approx(best, rel=1e-4)


def test_white_inputs_give_the_plain_svd():
    W, W_c = weights()
    Q = torch.linalg.qr(torch.randn(N, I, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    torch.testing.assert_close(repair(W, W_c, 3 * Q), repair(W, W_c, None, weighting="none"), rtol=1e-7, atol=1e-9)
    U, S, V = torch.linalg.svd(W - W_c)
    plain = U[:, :RANK] @ S[:RANK].diag() @ V[:RANK]
    torch.testing.assert_close(repair(W, W_c, None, weighting="none"), plain, rtol=1e-9, atol=1e-10)


def test_the_diagonal_weighs_columns_by_the_norms_of_their_inputs():
    (W, W_c), X = weights(), inputs()
    norms = X.norm(dim=0)
    U, S, V = torch.linalg.svd((W - W_c) * norms)
    expected = U[:, :RANK] @ S[:RANK].diag() @ V[:RANK] / norms
    torch.testing.assert_close(repair(W, W_c, X, weighting="diagonal"), expected, rtol=1e-8, atol=1e-10)


def test_a_rank_as_large_as_the_errors_gives_the_weight_back():
    (W, W_c), X = weights(), inputs()
    torch.testing.assert_close(W_c + repair(W, W_c, X, rank=I), W, rtol=0, atol=1e-6)
    low = W_c + W[:, :3] @ W[:3]  # an error of rank 3, of a base that has seen inputs of 5 dimensions
    torch.testing.assert_close(W_c + repair(low, W_c, inputs(5), rank=3), low, rtol=0, atol=1e-4)


@pytest.mark.parametrize("k", [1, 4, 7])
def test_inputs_of_k_dimensions_need_rank_k(k):
    (W, W_c), X = weights(), inputs(k)
    assert error(W, W_c, repair(W, W_c, X, rank=k), X) < 1e-6 * error(W, W_c, torch.zeros_like(W), X)


@pytest.mark.parametrize("weighting", ["gram", "diagonal", "none"])
def test_nothing_to_repair_is_not_repaired(weighting):
    W, _ = weights()
    assert torch.equal(repair(W, W, inputs(), weighting=weighting), torch.zeros_like(W))


def test_it_repairs_a_base_of_four_bits_as_loaded():
    pytest.importorskip("bitsandbytes")
    original, net = (nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    net.load_state_dict(original.state_dict())
    X = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) @ torch.randn(64, 64) / 8
    bases.quantise(net, "nf4")
    with torch.no_grad():
        wanted, before = original(X), net(X)
    ia.attach(net, Eora(rank=16), data=[X], loss=lambda m, x: m(x).sum(), original=original)
    with torch.no_grad():
        assert (net(X) - wanted).norm() < 0.75 * (before - wanted).norm()


def test_the_rules_that_compress():
    W = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.5, -0.1], [0.0, 1.5, 1.0, -2.0, 3.0, 0.2]])
    assert bases.two_of_four(W).tolist() == [
        [0.0, -4.0, 3.0, 0.0, 0.5, pytest.approx(-0.1)], [0.0, 1.5, 0.0, -2.0, 3.0, pytest.approx(0.2)]
    ]  # fmt: skip
    assert int((bases.pruned(W, 0.5) != 0).sum()) == 6
    assert bases.pruned(W, 0.5).abs().max() == 4
    row = torch.linspace(-1, 2, 7)[None]
    assert torch.unique(bases.rounded(row, 2, group=7)).tolist() == pytest.approx([-1, 0, 1, 2])
    assert torch.equal(bases.rounded(bases.rounded(W, 3, group=4), 3, group=4), bases.rounded(W, 3, group=4))
    step = (W[:, :4].amax(1) - W[:, :4].amin(1)) / 7
    assert ((bases.rounded(W, 3, group=4) - W)[:, :4].abs().amax(1) <= step / 2 + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("2:4", bases.two_of_four), ("30%", lambda W: bases.pruned(W, 0.3)), ("3bit", lambda W: bases.rounded(W, 3, 64)),
        ("4bit/8", lambda W: bases.rounded(W, 4, 8)),
    ],
)  # fmt: skip
def test_a_model_is_compressed_by_the_name_of_a_rule(name, same):
    net: Any = nn.Sequential(nn.Linear(I, O), nn.Linear(O, I))
    weights = {"0": net[0].weight.detach().clone(), "1": net[1].weight.detach().clone()}
    before = bases.degrade(net, name)
    for key, W in weights.items():
        assert torch.equal(before[key], W)
        assert torch.equal(net.get_submodule(key).weight, same(W))


def test_mistakes_in_rules_are_told():
    with pytest.raises(ia.IntarsiaError, match=r"unknown rule '5:8'.*expected 2:4, a share such as 50%"):
        bases.degrade(nn.Sequential(nn.Linear(I, O)), "5:8")
    with pytest.raises(ia.IntarsiaError, match="expected 1 to 8 bits"):
        bases.rounded(torch.ones(2, 2), 9)
    with pytest.raises(ia.IntarsiaError, match=r"share=1 of a pruned weight must be in \[0, 1\)"):
        bases.pruned(torch.ones(2, 2), 1)
    with pytest.raises(ia.IntarsiaError, match=r"eora: weighting='hessian' must be one of gram, diagonal, none"):
        Eora(weighting="hessian")
