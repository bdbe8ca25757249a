"""What an optimizer trains of a model, and what each tensor is: read from the methods' states and the modules, not from names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from intarsia.chain import State
from intarsia.errors import IntarsiaError
from intarsia.forms import Sparse

# As in transformers' Trainer: what only shifts or stretches is not pulled to zero.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One trained tensor.

    Attributes:
        role: ``up`` or ``down``, of a pair whose product acts (``Method.pairs``); ``matrix``, a whole weight that a layer
            multiplies by; ``values``, of a sparse adapter; ``other``.
        embedding: whether it belongs to an embedding, or to the layer that gives the logits.
        pair: what names the pair it belongs to, or None.
        decays: whether weight decay is for it.
    """

    name: str
    parameter: nn.Parameter
    role: str
    embedding: bool = False
    pair: str | None = None
    decays: bool = True


def parts(model: nn.Module) -> list[Part]:
    """Every tensor of the model that takes a gradient, once, in the model's order.

    Raises:
        IntarsiaError: where there is none.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[int, Part] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in found:
                found[id(parameter)] = _part(f"{prefix}.{key}".lstrip("."), key, parameter, module, module is head)
    if not found:
        raise IntarsiaError("nothing in this model takes a gradient; attach an adapter, or set requires_grad")
    return list(found.values())


def _part(name: str, key: str, parameter: nn.Parameter, module: nn.Module, head: bool) -> Part:
    decays = not isinstance(module, nn.LayerNorm) and not _UNDECAYED.search(name)
    if not isinstance(module, State):
        weight = parameter.ndim == 2 and isinstance(module, nn.Linear)
        embedding = head or isinstance(module, nn.Embedding)
        return Part(name, parameter, "matrix" if weight else "other", embedding, None, decays)
    embedding = module.operator.kind in ("embedding", "tied")
    for number, (up, down) in enumerate(module.method.pairs):
        if key in (up, down):
            pair = f"{name.removesuffix(key)}{number}"
            return Part(name, parameter, "up" if key == up else "down", embedding, pair, decays)
    # Where a whole weight is trained its values have its shape.
    whole = tuple(parameter.shape) == tuple(module.shape)
    role = "matrix" if whole else "values" if isinstance(module.method, Sparse) and key == "values" else "other"
    return Part(name, parameter, role, embedding, None, decays)


def pairs(found: Iterable[Part]) -> list[tuple[Part, Part]]:
    """(up, down) of every pair that has both, and both are matrices."""
    members: dict[str, dict[str, Part]] = {}
    for part in found:
        if part.pair is not None and part.parameter.ndim == 2:
            members.setdefault(part.pair, {})[part.role] = part
    return [(each["up"], each["down"]) for each in members.values() if len(each) == 2]


def grouped(chosen: Mapping[str, Iterable[Part]], options: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer: each of the chosen with its options, those that do not decay apart."""
    groups = []
    for key, members in chosen.items():
        members = list(members)
        for decays in (True, False):
            tensors = [part.parameter for part in members if part.decays == decays]
            if tensors:
                groups.append({"params": tensors, **options[key]} | ({} if decays else {"weight_decay": 0.0}))
    return groups
