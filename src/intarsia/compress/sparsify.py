"""Fewer and simpler numbers: ComPEFT, STC and pruning.    tau' = alpha * std(tau) * sign(tau) on the top k of |tau|

ComPEFT: Yadav et al. 2023, arXiv:2311.13171, sec. 2.1. tau (d,) is all that an adapter learned, one vector; std is that of the whole
vector before anything is dropped (unbiased); alpha and k are chosen on held-out data (:mod:`intarsia.compress.search`).
STC: Sattler et al. 2019, arXiv:1903.02891, alg. 1: the mean of what is kept instead, which is the nearest such vector to tau.
Deviation: exactly round(k d) numbers are kept, ties by their order; the authors' code keeps one more, and all ties at the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from intarsia.compress.numbers import flat, made_of, numbers, split
from intarsia.edits import Edit, Sparse
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter
from intarsia.support import top


def ternary(adapter: Adapter, density: float, alpha: float = 1.0) -> Adapter:
    """ComPEFT: the ``density`` largest of all learned numbers become +- alpha * std(tau), the others 0.

    Args:
        density: share of the numbers that is kept, above 0, up to 1.
        alpha: factor on the standard deviation of the original numbers; 1 serves large models, smaller ones want a search.

    Raises:
        IntarsiaError: for a share or a factor that makes no sense, numbers that are all alike, and edits that cannot be compressed.
    """
    check_density(density)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not (0 < alpha < math.inf):
        raise IntarsiaError(f"alpha={alpha!r}; expected a number above 0")
    found = numbers(adapter)
    tau = flat(found)
    scalar = float(alpha * tau.std()) if len(tau) > 1 else 0.0
    return _three_valued(
        adapter, found, tau, density, scalar, {"to": "ternary", "density": density, "alpha": float(alpha)}
    )


def stc(adapter: Adapter, density: float) -> Adapter:
    """Sparse ternary compression: as :func:`ternary`, with the mean of |tau| over what is kept, which needs no search.

    Raises:
        IntarsiaError: as :func:`ternary`.
    """
    check_density(density)
    found = numbers(adapter)
    tau = flat(found)
    scalar = float(tau.abs()[_largest(tau.abs(), density)].mean())
    return _three_valued(adapter, found, tau, density, scalar, {"to": "stc", "density": density})


def prune(adapter: Adapter, density: float, norms: Mapping[str, Tensor] | None = None) -> Adapter:
    """Keep the most important of all learned numbers as they are: |value|, or |value| * norm of its input.

    Units of a support (lines, tiles, rows, columns, diagonals) go as a whole, by the root of the mean square of their numbers.

    Args:
        density: share of the numbers that is kept, above 0, up to 1; never more than that.
        norms: weight -> the norm of each of its inputs over some data (I,); for adapters of sparse edits.

    Raises:
        IntarsiaError: for a share that makes no sense, norms that do not fit, and edits that cannot be compressed.
    """
    check_density(density)
    found = numbers(adapter)
    groups, sizes = {}, []
    for name, tensor in found.items():
        weight = name.rpartition(".")[0]
        groups[name] = _importance(adapter.edits[weight], weight, tensor, norms)
        sizes.append(torch.full((len(groups[name]),), tensor.numel() // max(1, len(groups[name]))))
    importance, size = torch.cat(list(groups.values())), torch.cat(sizes)
    order = importance.sort(descending=True, stable=True).indices
    kept = torch.zeros(len(importance), dtype=torch.bool)
    kept[order] = size[order].cumsum(0) <= max(round(density * int(size.sum())), int(size[order[0]]))
    pruned = {}
    for (name, tensor), alive in zip(found.items(), kept.split([len(g) for g in groups.values()]), strict=True):
        edit = adapter.edits[name.rpartition(".")[0]]
        pruned[name] = torch.where(_spread(edit, tensor, alive), tensor, 0)  # times False would leave -0.0
    step = {"to": "prune", "density": density} | ({"importance": "input norms"} if norms is not None else {})
    return made_of(adapter, pruned, step)


def check_density(density: float) -> None:
    """Raise IntarsiaError for what is no share above 0, up to 1."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not (0 < density <= 1):
        raise IntarsiaError(f"density={density!r}; expected a share above 0, up to 1")


def _three_valued(
    adapter: Adapter, found: Mapping[str, Tensor], tau: Tensor, density: float, scalar: float, step: dict[str, object]
) -> Adapter:
    if not 0 < scalar < math.inf:
        raise IntarsiaError(
            f"the numbers of {adapter.name} are all alike, so that nothing tells how large one should be"
        )
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in found.values()) else torch.float32
    kept = _largest(tau.abs(), density)
    changed = torch.zeros(len(tau), dtype=dtype)
    changed[kept] = (scalar * tau[kept].sign()).to(dtype)
    return made_of(adapter, split(changed, found), step | {"scalar": scalar})


def _largest(sizes: Tensor, density: float) -> Tensor:
    """Where the round(density * d) largest are, at least one; equal ones by their order. (d,) -> (k,)."""
    return top(sizes, max(1, round(density * len(sizes))))


def _importance(edit: Edit, weight: str, tensor: Tensor, norms: Mapping[str, Tensor] | None) -> Tensor:
    """Of each unit of a sparse edit, of each number of another one. -> (groups,) float64."""
    wide = tensor.double()
    if norms is not None:
        if not isinstance(edit, Sparse):
            raise IntarsiaError(
                f"{weight}: norms of inputs weigh the entries of a weight, and a {edit.kind} edit has none"
            )
        if weight not in norms or tuple(norms[weight].shape) != (edit.shape[1],):
            shape = tuple(norms[weight].shape) if weight in norms else "none"
            raise IntarsiaError(f"{weight}: its norms are {shape}; expected ({edit.shape[1]},), one for each input")
        wide = wide * norms[weight].double()[edit.granularity.flat(edit.shape, edit.index) % edit.shape[1]]
    if not isinstance(edit, Sparse) or not len(edit.index):
        return wide.abs().reshape(-1)
    return wide.movedim(edit.granularity.axis, 0).reshape(len(edit.index), -1).square().mean(dim=1).sqrt()


def _spread(edit: Edit, tensor: Tensor, alive: Tensor) -> Tensor:
    """Which numbers are kept, from which groups are. -> shaped as the tensor, or so that it is broadcast to it."""
    if not isinstance(edit, Sparse) or not len(edit.index):
        return alive.view(tensor.shape)
    axis = edit.granularity.axis
    each = alive.repeat_interleave(tensor.shape[axis] // len(alive))
    return each.view([-1 if i == axis else 1 for i in range(tensor.ndim)])
