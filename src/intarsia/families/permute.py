"""Permuting the heads or channels of a block: another order of the same units, and so the same function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.errors import IntarsiaError
from intarsia.families.blocks import Block, turned


def permute(model: nn.Module, block: Block, order: Sequence[int] | Tensor) -> None:
    """Put the units of a block into another order, in place: unit ``order[u]`` moves to place u in every part of the block.

    Rows with their biases on one side, columns on the other. Under grouped queries the query heads of one key-value head
    must stay together, and the key-value heads move with them: groups as a whole, heads within their group.

    Raises:
        IntarsiaError: for what is no permutation of the units, or takes a query head away from its key-value head. Nothing
            is changed then.
    """
    index = torch.as_tensor(order)
    if index.ndim != 1 or index.sort().values.tolist() != list(range(block.units)):
        raise IntarsiaError(f"{block.name}: the order must name each of its {block.units} units once")
    orders = [_order(block, index, role.group) for _, role in block.parts]
    with torch.no_grad():
        for (name, role), part in zip(block.parts, orders, strict=True):
            layer: Any = model.get_submodule(name)
            entries = torch.arange(role.units * role.width).view(role.units, role.width)[part].reshape(-1)
            low, length = role.first * role.width, len(entries)
            W = layer.weight.T if turned(layer) else layer.weight
            axis = 1 if role.side == "columns" else 0
            there = W.narrow(axis, low, length)
            there.copy_(there.index_select(axis, entries.to(W.device)))
            if axis == 0 and getattr(layer, "bias", None) is not None:
                there = layer.bias.narrow(0, low, length)
                there.copy_(there[entries.to(W.device)])


def _order(block: Block, index: Tensor, group: int) -> Tensor:
    """The order of the units of which each serves ``group`` of the block's."""
    by_group = (index // group).view(-1, group)
    if bool((by_group != by_group[:, :1]).any()):
        raise IntarsiaError(
            f"{block.name}: this order takes query heads away from their key-value head, which {group} of them share; "
            "move whole groups, and heads within their group"
        )
    return by_group[:, 0]
