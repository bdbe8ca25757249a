"""K-means of a few hundred points in float64, deterministic from a key.    n points, d numbers each, k clusters"""

from __future__ import annotations

import random

import torch
from torch import Tensor

RESTARTS, ROUNDS = 10, 100


def clusters(points: Tensor, k: int, key: int, restarts: int = RESTARTS) -> Tensor:
    """The cluster of each point, 0..k-1, none empty: the best of some starts by k-means++ (Arthur and Vassilvitskii 2007).

    (n, d) -> (n,) int64. The points' order does not matter, but for the clusters' numbers.
    """
    n = len(points)
    if k >= n:
        return torch.arange(n)
    order = _sorted(points)
    ordered, draws = points[order].double(), random.Random(key)
    found = [_lloyd(ordered, _start(ordered, k, draws)) for _ in range(restarts)]
    best, _ = min(found, key=lambda one: one[1])
    labels: Tensor = torch.empty(n, dtype=torch.int64).index_copy(0, order, best)
    return labels


def _sorted(points: Tensor) -> Tensor:
    """The points' order by their first number, then the second, ... -> (n,)."""
    return torch.tensor(sorted(range(len(points)), key=points.tolist().__getitem__))


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squares. (n, d), (k, d) -> (n, k)."""
    found: Tensor = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
    return found


def _start(points: Tensor, k: int, draws: random.Random) -> Tensor:
    """k points, each drawn with probability in proportion to its squared distance to those before. -> (k, d)."""
    # Python keeps the numbers of random() from version to version; torch promises nothing of its own.
    chosen = [int(draws.random() * len(points))]
    nearest = _distances(points, points[chosen]).squeeze(1)
    for _ in range(1, k):
        sums = nearest.cumsum(0)
        if sums[-1] > 0:
            place = torch.searchsorted(sums, draws.random() * sums[-1], right=True)
            chosen.append(min(int(place), len(points) - 1))
        else:  # fewer distinct points than clusters
            chosen.append(next(i for i in range(len(points)) if i not in chosen))
        nearest = torch.minimum(nearest, _distances(points, points[chosen[-1:]]).squeeze(1))
    return points[chosen]


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Assign and average until nothing moves. -> the clusters, and the sum of squared distances to their centres."""
    labels = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        distances = _distances(points, centres)
        fresh = _filled(distances, distances.argmin(1))
        if fresh.equal(labels):
            break
        labels = fresh
        centres = means(points, labels, len(centres))
    return labels, float((points - centres[labels]).square().sum())


def _filled(distances: Tensor, labels: Tensor) -> Tensor:
    """An empty cluster gets the point that is farthest from its own centre, of those that are not alone. (n, k), (n,) -> (n,)."""
    labels = labels.clone()
    counts = labels.bincount(minlength=distances.shape[1])
    for empty in (counts == 0).nonzero().squeeze(1).tolist():
        own = distances.gather(1, labels[:, None]).squeeze(1).masked_fill(counts[labels] < 2, -1.0)
        moved = int(own.argmax())
        counts[labels[moved]] -= 1
        counts[empty] += 1
        labels[moved] = empty
    return labels


def means(points: Tensor, labels: Tensor, k: int) -> Tensor:
    """The mean of each cluster. (n, d), (n,) -> (k, d)."""
    total = points.new_zeros(k, points.shape[1]).index_add(0, labels, points)
    return total / labels.bincount(minlength=k)[:, None]
