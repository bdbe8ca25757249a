"""Thin layers: a Linear of low rank as two thin ones, and models that have some, in files.

    y = W2 (W1 x) + b,  W1 = down.weight (r, I),  W2 = up.weight (O, r)

A folder with such a model is one of transformers' with ``thin.json`` beside it, which tells the rank of each thin layer:
transformers by itself does not know them, :mod:`intarsia.pretrained` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.errors import IntarsiaError

RANKS = "thin.json"
FORMAT = 1


class Thin(nn.Sequential):
    """``down`` (I -> r, no bias), then ``up`` (r -> O)."""

    down: nn.Linear
    up: nn.Linear

    def __init__(self, in_features: int, rank: int, out_features: int, **where: Any) -> None:
        super().__init__()
        self.in_features, self.rank, self.out_features = in_features, rank, out_features
        self.add_module("down", nn.Linear(in_features, rank, bias=False, **where))
        self.add_module("up", nn.Linear(rank, out_features, **where))

    @classmethod
    def of(cls, W1: Tensor, W2: Tensor, b: Tensor, like: nn.Linear) -> Thin:
        """With these numbers, in the dtype, on the device and in the mode of ``like``, whose place it is to take."""
        where = {"dtype": like.weight.dtype, "device": like.weight.device}
        made = cls(W1.shape[1], W1.shape[0], W2.shape[0], **where)
        with torch.no_grad():
            made.down.weight.copy_(W1)
            made.up.weight.copy_(W2)
            made.up.bias.copy_(b)
        made.requires_grad_(like.weight.requires_grad)
        return made.train(like.training)


def put(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put each module where the model has one of that dotted name. -> those that stood there, by name."""
    before = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, layer)
    return before


def ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every thin layer, by dotted name."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, Thin)}


def make_room(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Thin layers without numbers of their own in the place of the model's, for a state dict that has them.

    Raises:
        IntarsiaError: for a name that is no Linear of the model, or a rank that is no number from 1 up.
    """
    for name, rank in ranks.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = model
        if not isinstance(layer, nn.Linear) or not isinstance(rank, int) or rank < 1:
            raise IntarsiaError(f"{RANKS}: {name} of rank {rank!r} fits no Linear of this {type(model).__name__}")
        where = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        put(model, {name: Thin(layer.in_features, rank, layer.out_features, **where)})


def write_ranks(model: nn.Module, folder: Path) -> None:
    """Say beside the model's files which layers are thin."""
    text = json.dumps({"format": FORMAT, "ranks": ranks(model)}, indent=1)
    (folder / RANKS).write_text(text + "\n", "utf-8")


def read_ranks(folder: Path) -> dict[str, int] | None:
    """What :func:`write_ranks` said, or None where the folder's model has no thin layers.

    Raises:
        IntarsiaError: for a file that says nothing that can be read.
    """
    if not (folder / RANKS).is_file():
        return None
    try:
        said = json.loads((folder / RANKS).read_text("utf-8"))
        if said["format"] != FORMAT:
            raise IntarsiaError(f"{folder / RANKS} is of format {said['format']!r}; this version reads {FORMAT}")
        return {str(name): int(rank) for name, rank in said["ranks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntarsiaError(f"{folder / RANKS} cannot be read: {error}; write the model again") from error
