"""Weight matching: the order of hidden units in which one MLP lies closest to another, without changing what it computes.

Ainsworth, Hayase & Srinivasa 2023, "Git Re-Basin", arXiv:2209.04836, sec. 3.2; why it works: Ito, Yamada & Kumagai 2024,
arXiv:2402.04051. With P_0 = P_L = I it maximises

    sum_l <W_l^A, P_l W_l^B P_{l-1}^T>_F  (+ <b_l^A, P_l b_l^B>)

by coordinate ascent: with all others fixed, P_l is the linear assignment of

    M_l = W_l^A P_{l-1} (W_l^B)^T + (W_{l+1}^A)^T P_{l+1} W_{l+1}^B  (+ b_l^A (b_l^B)^T)

For MLPs of some hundred units a layer. Adapters of one base need none of it: their units are in one order already.
A network is its layers in order, each (W (O, I), b (O,) or None), with the same element-wise function between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.analyze.assignment import assignment
from intarsia.errors import IntarsiaError

Layer = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Matching:
    """The permutations found: ``orders[l][i]`` is the hidden unit of B that stands for unit i of A after layer l.

    ``scores``: the objective at the start and after each change; it never falls.
    """

    orders: tuple[Tensor, ...]
    scores: tuple[float, ...]


def weight_matching(a: Sequence[Layer], b: Sequence[Layer], *, seed: int = 0, rounds: int = 100) -> Matching:
    """Find the order of B's hidden units that lies closest to A's. Layers are taken in random order until nothing is gained.

    Raises:
        IntarsiaError: for networks of different shapes, or layers that do not follow one another.
    """
    _check(a, b)
    a = [_wide(layer) for layer in a]
    b = [_wide(layer) for layer in b]
    orders = [torch.arange(len(W)) for W, _ in b[:-1]]
    scores = [_objective(a, permuted(b, orders))]
    dice = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        gained = False
        for l in torch.randperm(len(orders), generator=dice).tolist():
            there = [*orders[:l], torch.arange(len(b[l][0])), *orders[l + 1 :]]
            # B with every other layer's units in place; its own are what is looked for.
            placed = permuted(b, there)
            M = a[l][0] @ placed[l][0].mT + a[l + 1][0].mT @ placed[l + 1][0]
            if (bias := a[l][1]) is not None and (other := b[l][1]) is not None:
                M = M + torch.outer(bias, other)
            found = assignment(M)
            score = _objective(a, permuted(b, [*orders[:l], found, *orders[l + 1 :]]))
            if score > scores[-1] + 1e-12 * abs(scores[-1]):
                orders[l], gained = found, True
                scores.append(score)
        if not gained:
            break
    return Matching(tuple(orders), tuple(scores))


def permuted(layers: Sequence[Layer], orders: Sequence[Tensor]) -> list[Layer]:
    """The same network with its hidden units in another order: W_l[p_l][:, p_{l-1}], b_l[p_l]. Its function is the same."""
    made: list[Layer] = []
    for l, (W, bias) in enumerate(layers):
        if l:
            W = W[:, orders[l - 1]]
        if l < len(orders):
            W, bias = W[orders[l]], None if bias is None else bias[orders[l]]
        made.append((W, bias))
    return made


def between(a: Sequence[Layer], b: Sequence[Layer], t: float) -> list[Layer]:
    """t A + (1 - t) B, layer by layer."""
    mixed: list[Layer] = []
    for (W1, b1), (W2, b2) in zip(a, b, strict=True):
        mixed.append((t * W1 + (1 - t) * W2, None if b1 is None or b2 is None else t * b1 + (1 - t) * b2))
    return mixed


def barrier(
    loss: Callable[[Sequence[Layer]], float], a: Sequence[Layer], b: Sequence[Layer], points: int = 11
) -> float:
    """max_t [L(t A + (1 - t) B) - (t L(A) + (1 - t) L(B))] over ``points`` values of t from 0 to 1: 0 at the ends, so never below.

    Raises:
        IntarsiaError: for networks of different shapes, or fewer than three points.
    """
    _check(a, b)
    if points < 3:
        raise IntarsiaError(f"points={points!r}; expected 3 or more: the ends are points too")
    ends = loss(a), loss(b)
    steps = [i / (points - 1) for i in range(1, points - 1)]
    return max(0.0, *(loss(between(a, b, t)) - (t * ends[0] + (1 - t) * ends[1]) for t in steps))


def _objective(a: Sequence[Layer], b: Sequence[Layer]) -> float:
    total = 0.0
    for (W1, b1), (W2, b2) in zip(a, b, strict=True):
        total += float((W1 * W2).sum())
        if b1 is not None and b2 is not None:
            total += float((b1 * b2).sum())
    return total


def _wide(layer: Layer) -> Layer:
    W, bias = layer
    return W.detach().double(), None if bias is None else bias.detach().double()


def _check(a: Sequence[Layer], b: Sequence[Layer]) -> None:
    shapes = [[tuple(W.shape) for W, _ in layers] for layers in (a, b)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise IntarsiaError(f"networks of different shapes cannot be matched: {shapes[0]} and {shapes[1]}")
    if [bias is None for _, bias in a] != [bias is None for _, bias in b]:
        raise IntarsiaError("one of the networks has a bias where the other has none")
    for l, (before, after) in enumerate(zip(shapes[0], shapes[0][1:], strict=False)):
        if before[0] != after[1]:
            raise IntarsiaError(f"layer {l} has {before[0]} outputs and layer {l + 1} takes {after[1]} inputs")
