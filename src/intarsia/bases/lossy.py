"""Lossy copies of a weight: pruned by magnitude, or rounded to few bits. Plain rules, to compress a base that is then repaired.

    two_of_four    of every four inputs in a row, the two smallest entries become 0
    pruned         the smallest entries of the whole weight become 0
    rounded        every group of inputs in a row is rounded to 2^bits evenly spaced numbers from its least to its largest

They return numbers in the dtype of the weight; nothing is stored in fewer bits (see :func:`intarsia.bases.quantise` for that).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.bases.packing import packing_of
from intarsia.errors import IntarsiaError

Rule = Callable[[Tensor], Tensor]  # (O, I) -> (O, I)


def two_of_four(W: Tensor) -> Tensor:
    """The two entries of largest magnitude of every four in a row; a rest of fewer than four stays whole. (O, I) -> (O, I)."""
    O, I = W.shape
    groups = W[:, : I // 4 * 4].reshape(O, -1, 4)
    kept = torch.zeros_like(groups).scatter(2, groups.abs().topk(2, dim=2).indices, 1.0)
    return torch.cat([(groups * kept).reshape(O, -1), W[:, I // 4 * 4 :]], dim=1)


def pruned(W: Tensor, share: float) -> Tensor:
    """A share of the entries, the smallest, is 0. (O, I) -> (O, I)."""
    if not 0 <= share < 1:
        raise IntarsiaError(f"share={share!r} of a pruned weight must be in [0, 1)")
    flat = W.flatten().clone()
    flat[W.flatten().abs().topk(round(share * W.numel()), largest=False).indices] = 0
    return flat.view_as(W)


def rounded(W: Tensor, bits: int, group: int = 64) -> Tensor:
    """Round to nearest, ``group`` inputs of a row with one scale and offset; the last group may be shorter. (O, I) -> (O, I)."""
    if not 1 <= bits <= 8 or group < 1:
        raise IntarsiaError(f"bits={bits!r}, group={group!r}: expected 1 to 8 bits and a group of 1 or more")
    whole = W.shape[1] // group * group
    parts = [W[:, :whole].reshape(len(W), -1, group)] + ([W[:, None, whole:]] if whole < W.shape[1] else [])
    return torch.cat([_to_levels(part, bits).reshape(len(W), -1) for part in parts], dim=1)


def _to_levels(groups: Tensor, bits: int) -> Tensor:
    """The last dimension rounded to 2^bits evenly spaced numbers."""
    wide = groups.to(torch.promote_types(groups.dtype, torch.float32))
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(wide.dtype).tiny)
    levels: Tensor = low + ((wide - low) / step).round() * step
    return levels.to(groups.dtype)


def rule(name: str) -> Rule:
    """A rule by its name: ``2:4``, ``50%`` (pruned), ``4bit``, or ``4bit/128`` with a group other than 64.

    Raises:
        IntarsiaError: for another name.
    """
    if name == "2:4":
        return two_of_four
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", name):
        return partial(pruned, share=float(found[1]) / 100)
    if found := re.fullmatch(r"(\d)bit(?:/(\d+))?", name):
        return partial(rounded, bits=int(found[1]), group=int(found[2] or 64))
    raise IntarsiaError(
        f"unknown rule {name!r} to compress a weight; expected 2:4, a share such as 50%, or 4bit, 4bit/128"
    )


@torch.no_grad()
def degrade(model: nn.Module, how: str | Rule, layers: Mapping[str, nn.Module] | None = None) -> dict[str, Tensor]:
    """Put a lossy copy in the place of the weight of every Linear but the output head, in place. -> the weights as they were.

    Args:
        how: a rule, or the name of one (:func:`rule`).
        layers: which, by dotted name; they are then the keys of what is returned.

    Raises:
        IntarsiaError: for an unknown rule or a weight that is packed. Nothing is changed then.
    """
    apply = rule(how) if isinstance(how, str) else how
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if layers is None:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    packed = [name for name, weight in weights.items() if not packing_of(weight).in_place]
    if packed:
        raise IntarsiaError(
            f"{packed[0]}: its weight is stored in {packing_of(weights[packed[0]]).name(weights[packed[0]])} already"
        )
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.copy_(apply(weight))
    return before
