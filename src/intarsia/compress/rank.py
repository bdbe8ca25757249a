"""From one form into the other: any change as a low rank, any change as its largest entries.    D ~ B A,  D ~ D on a support

The low rank is the best one (Eckart and Young), the sparse one the best support of its size: both the nearest in the Frobenius norm.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from intarsia import registry
from intarsia.compress.numbers import Progress, with_step, without_zeros
from intarsia.compress.sparsify import check_density
from intarsia.edits import Edit, LowRank, Sparse, add, elements, scale, to_dense
from intarsia.errors import IntarsiaError
from intarsia.interop.approximation import best
from intarsia.methods import Lora, Shira
from intarsia.store import Adapter
from intarsia.support import top


def to_low_rank(adapter: Adapter, rank: int, progress: Progress | None = None) -> Adapter:
    """Every edit as a low rank; those of no higher rank stay as they are.

    Raises:
        IntarsiaError: for a rank below 1, and edits whose change depends on the weight.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise IntarsiaError(f"rank={rank!r}; expected a whole number above 0")
    _check_free(adapter)
    edits: dict[str, Edit] = {}
    for done, (weight, edit) in enumerate(adapter.edits.items(), 1):
        low = edit.low_rank()
        if low is not None and low.A.shape[0] <= rank:
            edits[weight] = low
        else:
            B, A, _ = best(to_dense(edit), rank)
            edits[weight] = LowRank(edit.shape, B, A, 1.0)
        if progress:
            progress(done, len(adapter.edits), "to low rank")
    made = replace(adapter, edits=edits, method=Lora(rank=rank, alpha=float(rank)).config(), codes={})
    return with_step(made, {"to": "low-rank", "rank": rank}, adapter)


def to_prefix(adapter: Adapter, rank: int, progress: Progress | None = None) -> Adapter:
    """The first ranks of every edit, of an adapter that was trained to act with them alone (DyLoRA): a plain LoRA of that rank.

    Raises:
        IntarsiaError: for an adapter of another method, and for a rank that was not trained.
    """
    name = adapter.method.get("name")
    if name not in registry.methods():
        raise IntarsiaError(f"{adapter.name} is of {name!r}, which is no method whose first ranks could be taken")
    method = registry.build(adapter.method)
    edits: dict[str, Edit] = {}
    for done, (weight, edit) in enumerate(adapter.edits.items(), 1):
        edits[weight] = method.prefix(edit, rank)
        if progress:
            progress(done, len(adapter.edits), "first ranks")
    scales = {edit.scale for edit in edits.values() if isinstance(edit, LowRank)}
    plain = Lora(rank=rank, alpha=max(scales, default=1.0), scaling="none")
    return with_step(
        replace(adapter, edits=edits, method=plain.config(), codes={}), {"to": "prefix", "rank": rank}, adapter
    )


def to_sparse(adapter: Adapter, density: float, progress: Progress | None = None) -> Adapter:
    """The largest entries of every weight's change, as elements, with their exact values.

    Args:
        density: share of the entries of each weight, above 0, up to 1.

    Raises:
        IntarsiaError: for a share that makes no sense, and edits whose change depends on the weight.
    """
    check_density(density)
    _check_free(adapter)
    edits: dict[str, Edit] = {}
    for done, (weight, edit) in enumerate(adapter.edits.items(), 1):
        change: Tensor = to_dense(edit).reshape(-1)
        index = top(change.abs(), max(1, round(density * len(change))))
        kept = without_zeros(elements(edit.shape, index, change[index]))
        if kept.touched:
            edits[weight] = kept
        if progress:
            progress(done, len(adapter.edits), "to sparse")
    if not edits:
        raise IntarsiaError(f"{adapter.name} changes nothing, so there is nothing to keep")
    made = replace(adapter, edits=edits, method=Shira(density=density).config(), codes={})
    return with_step(made, {"to": "sparse", "density": density}, adapter)


def balanced(adapter: Adapter) -> Adapter:
    """The same changes, with the factors of each low rank alike in size: B = U sqrt(s S), A = sqrt(s S) V^T of the SVD of s B A.

    A LoRA's A keeps much of the random numbers that it started from, and its B is small beside them: the largest numbers of
    both together are then mostly A's, which say nothing alone. Exact but for rounding; edits of other kinds stay as they are.
    """
    low = {weight: edit.low_rank() for weight, edit in adapter.edits.items()}
    edits = {weight: edit if (its := low[weight]) is None else _balanced(its) for weight, edit in adapter.edits.items()}
    return with_step(replace(adapter, edits=edits, codes={}), {"to": "balanced"}, adapter)


def _balanced(edit: LowRank) -> LowRank:
    left, R = torch.linalg.qr(edit.B.double())
    right, S = torch.linalg.qr(edit.A.mT.double())
    U, sizes, Vh = torch.linalg.svd(edit.scale * (R @ S.mT))
    root = sizes.sqrt()
    dtype = torch.promote_types(edit.B.dtype, torch.float32)
    return LowRank(
        edit.shape,
        (left @ U * root).to(dtype).contiguous(),
        (root[:, None] * (Vh @ right.mT)).to(dtype).contiguous(),
        1.0,
    )


def change_error(before: Adapter, after: Adapter) -> float | None:
    """||D - D'|| / ||D|| over all weights; None where what an edit changes depends on the weight.

    Of sparse and low-rank edits no (O, I) matrix is made.
    """
    if any(edit.needs_weight for adapter in (before, after) for edit in adapter.edits.values()):
        return None
    lost = whole = 0.0
    for weight, edit in before.edits.items():
        whole += _square(edit)
        lost += _square(add(edit, scale(after.edits[weight], -1)) if weight in after.edits else edit)
    return math.sqrt(lost / whole) if whole else 0.0


def _square(edit: Edit) -> float:
    """||D||^2, in float64."""
    if isinstance(edit, Sparse):
        return float(edit.values.double().square().sum())
    if (low := edit.low_rank()) is not None:  # ||B A||^2 = tr((B^T B) (A A^T))
        B, A = low.B.double(), low.A.double()
        return max(0.0, low.scale**2 * float(((B.mT @ B) * (A @ A.mT)).sum()))
    return float(to_dense(edit, dtype=torch.float64).square().sum())


def _check_free(adapter: Adapter) -> None:
    bound = [weight for weight, edit in adapter.edits.items() if edit.needs_weight]
    if bound:
        raise IntarsiaError(
            f"{', '.join(bound[:3])}: what a {adapter.edits[bound[0]].kind} edit changes depends on the weight, so it has no form without it"
        )
