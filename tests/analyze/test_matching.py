"""Weight matching of small MLPs, the assignment below it, and the alignment of two changes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from intarsia.analyze import assignment, barrier, between, permuted, subspace_alignment, weight_matching
from intarsia.analyze.matching import Layer
from intarsia.edits import Dense, LowRank
from intarsia.errors import IntarsiaError


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int, widths: tuple[int, ...] = (6, 16, 12, 3), bias: bool = True) -> list[Layer]:
    sizes = list(itertools.pairwise(widths))
    return [
        (some(seed * 100 + l, o, i), some(seed * 100 + 50 + l, o) if bias else None) for l, (i, o) in enumerate(sizes)
    ]


def run(layers, x: Tensor) -> Tensor:
    for l, (W, b) in enumerate(layers):
        x = torch.nn.functional.linear(x, W, b)
        x = torch.relu(x) if l + 1 < len(layers) else x
    return x


def numbers(layers) -> Tensor:
    """All weights and biases in one row."""
    return torch.cat([tensor.flatten() for layer in layers for tensor in layer if tensor is not None])


def shuffled(seed: int, layers) -> tuple[list[Layer], list[Tensor]]:
    dice = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(W), generator=dice) for W, _ in layers[:-1]]
    return permuted(layers, orders), orders


@given(st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_the_assignment_is_the_best_of_all(n, seed, ties):
    scores = some(seed, n, n)
    scores = scores.round() if ties else scores
    rows = torch.arange(n)
    found = assignment(scores)
    assert sorted(found.tolist()) == list(range(n))
    best = max(float(scores[rows, list(order)].double().sum()) for order in itertools.permutations(range(n)))
    assert float(scores[rows, found].double().sum()) == pytest.approx(best, abs=1e-5)


def test_a_large_assignment_finds_a_hidden_order():
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    scores = some(1, 200, 200)
    scores[torch.arange(200), order] += 10
    assert torch.equal(assignment(scores), order)


@pytest.mark.parametrize("bias", [True, False])
def test_an_order_of_ones_own_units_is_found_again(bias):
    a = network(0, bias=bias)
    b, orders = shuffled(7, a)
    found = weight_matching(a, b)
    for order, back in zip(orders, found.orders, strict=True):
        assert torch.equal(order[back], torch.arange(len(order)))
    mended = permuted(b, found.orders)
    assert all(torch.equal(W1, W2) for (W1, _), (W2, _) in zip(a, mended, strict=True))
    x = some(3, 40, 6)

    def loss(layers) -> float:  # how far from what both compute
        return float((run(layers, x) - run(a, x)).square().mean())

    assert loss(b) < 1e-6
    assert barrier(loss, a, mended) == pytest.approx(0.0, abs=1e-6)
    assert barrier(loss, a, b) > 1


@given(st.integers(0, 30))
def test_the_function_stays_and_the_objective_never_falls(seed):
    a, b = network(1), network(seed + 2)
    found = weight_matching(a, b, seed=seed)
    x = some(3, 20, 6).double()
    wide = [(W.double(), None if bias is None else bias.double()) for W, bias in b]
    assert float((run(permuted(wide, found.orders), x) - run(wide, x)).abs().max()) < 1e-6
    assert all(later > earlier for earlier, later in itertools.pairwise(found.scores))
    matched = permuted(b, found.orders)
    inner = float(numbers(a) @ numbers(matched))
    assert found.scores[-1] == pytest.approx(inner, rel=1e-4)
    for (W1, _), (W2, _) in zip(b, matched, strict=True):
        torch.testing.assert_close(torch.linalg.svdvals(W1), torch.linalg.svdvals(W2), atol=1e-4, rtol=1e-5)


@given(st.integers(0, 50), st.booleans())
def test_one_hidden_layer_is_matched_as_well_as_can_be(seed, bias):
    # Inputs, outputs and bias weigh alike here, so that an order which forgets one of them is not the best.
    a, b = (network(seed + n, (3, 5, 3), bias=bias) for n in (0, 1000))

    def likeness(order: list[int]) -> float:
        return float(numbers(a) @ numbers(permuted(b, [torch.tensor(order)])))

    best = max(likeness(list(order)) for order in itertools.permutations(range(5)))
    assert weight_matching(a, b).scores[-1] == pytest.approx(best, rel=1e-5, abs=1e-5)


def test_between_and_barrier():
    a, b = network(0), network(1)
    assert all(torch.equal(x[0], y[0]) for x, y in zip(between(a, b, 1.0), a, strict=True))
    # A loss that is a parabola in t has its barrier in the middle: L(t) = c t (1 - t) + linear.
    ends = a[0][0].flatten()[0], b[0][0].flatten()[0]

    def parabola(layers) -> float:
        w = layers[0][0].flatten()[0]
        t = float((w - ends[1]) / (ends[0] - ends[1]))
        return 4 * t * (1 - t) + 5 * t

    assert barrier(parabola, a, b, points=5) == pytest.approx(1.0, abs=1e-4)
    assert barrier(lambda layers: 1 - parabola(layers), a, b) == 0.0


def digits(count: int = 1500) -> tuple[Tensor, Tensor]:
    """Ten blurred shapes in 36 numbers, noisy, and which of them each is: something that a small MLP learns."""
    shapes, kinds = some(11, 10, 36), torch.randint(10, (count,), generator=torch.Generator().manual_seed(12))
    return shapes[kinds] + 1.2 * some(13, count, 36), kinds


def trained(seed: int, x: Tensor, kinds: Tensor) -> list[Layer]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(36, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), kinds).backward()
            optimizer.step()
    return [(layer.weight.detach(), layer.bias.detach()) for layer in net if isinstance(layer, torch.nn.Linear)]


def test_matching_lowers_the_barrier_far_more_than_the_distance():
    x, kinds = digits()
    a, b = trained(0, x, kinds), trained(1, x, kinds)
    matched = permuted(b, weight_matching(a, b).orders)

    def loss(layers) -> float:
        return float(torch.nn.functional.cross_entropy(run(layers, x), kinds))

    def distance(one, other) -> float:
        both = list(zip(one, other, strict=True))
        return math.sqrt(sum(float((W1 - W2).square().sum()) for (W1, _), (W2, _) in both))

    before, after = barrier(loss, a, b), barrier(loss, a, matched)
    assert after < 0.6 * before
    assert 0.6 < distance(a, matched) / distance(a, b) < 1.0, "that is not where it comes from"
    aligned = [subspace_alignment(a[0][0], other[0][0], above=0.3) for other in (b, matched)]
    assert aligned[1] > aligned[0] + 0.1


# ------------------------------------------------------------------ alignment
def test_over_all_values_it_is_the_cosine():
    A, B = some(0, 9, 5), some(1, 9, 5)
    cosine = float((A * B).sum() / (A.norm() * B.norm()))
    assert subspace_alignment(A, B) == pytest.approx(cosine, abs=1e-5)
    assert subspace_alignment(A, -2 * A) == pytest.approx(-1.0, abs=1e-5)
    assert subspace_alignment(A, torch.zeros(9, 5)) == 0.0


def test_small_values_are_left_out():
    U, V = torch.linalg.qr(some(0, 6, 6)).Q, torch.linalg.qr(some(1, 6, 6)).Q
    one = U @ torch.diag(torch.tensor([4.0, 1.0, 0, 0, 0, 0])) @ V.mT
    other = U @ torch.diag(torch.tensor([4.0, -1.0, 0, 0, 0, 0])) @ V.mT
    assert subspace_alignment(one, other) == pytest.approx(15 / 17, abs=1e-5)
    assert subspace_alignment(one, other, above=0.5) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("above", [0.0, 0.4])
def test_edits_are_compared_by_their_factors(above, monkeypatch):
    shape = (12, 8)
    pairs = [(some(0, 12, 2), some(1, 2, 8)), (some(2, 12, 3), some(3, 3, 8))]
    dense = [0.5 * B @ A for B, A in pairs]
    expected = subspace_alignment(*dense, above=above)
    assert subspace_alignment(*(Dense(shape, D) for D in dense), above=above) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(LowRank, "delta", lambda self, W: pytest.fail("built an O x I matrix"))
    thin = [LowRank(shape, B, A, 0.5) for B, A in pairs]
    assert subspace_alignment(*thin, above=above) == pytest.approx(expected, abs=1e-5)


def test_mistakes():
    with pytest.raises(IntarsiaError, match="as many rows as columns"):
        assignment(torch.zeros(2, 3))
    with pytest.raises(IntarsiaError, match="not finite"):
        assignment(torch.full((2, 2), torch.nan))
    with pytest.raises(IntarsiaError, match="networks of different shapes"):
        weight_matching(network(0), network(0, (6, 16, 3)))
    with pytest.raises(IntarsiaError, match="a bias where the other has none"):
        weight_matching(network(0), network(0, bias=False))
    with pytest.raises(IntarsiaError, match="layer 0 has 16 outputs and layer 1 takes 15 inputs"):
        weight_matching(*[[(some(0, 16, 6), None), (some(0, 3, 15), None)]] * 2)
    with pytest.raises(IntarsiaError, match="points=2"):
        barrier(lambda layers: 0.0, network(0), network(1), points=2)
    with pytest.raises(IntarsiaError, match=r"\(2, 3\) and \(3, 2\) have no directions in common"):
        subspace_alignment(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(IntarsiaError, match="above=1"):
        subspace_alignment(torch.eye(2), torch.eye(2), above=1)
