"""Sites: the weights of a model that may be adapted, and how targets name them.

A target is ``"all-linear"`` (every Linear but the output head), a glob on the dotted name (``"*.q_proj"``), a last
part alone (``"q_proj"``), or a regular expression behind ``re:`` (``"re:layers\\.[0-3]\\..*_proj"``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from intarsia.errors import IntarsiaError, nearest
from intarsia.role import Role

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Site:
    """Facts about one adapted weight, read-only.

    Attributes:
        name: dotted name of the module, e.g. ``model.layers.0.self_attn.q_proj``.
        weight: (out_features O, in_features I), the base's own bits while an adapter is being made.
        bias: (O,) or None.
        roles: what it is in its attention or MLP block, for methods that ask (``Method.roles_from``).
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    roles: tuple[Role, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.weight.shape
        return rows, columns


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear of the model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def find_sites(
    model: nn.Module, targets: str | Iterable[str], exclude: str | Iterable[str] = ()
) -> dict[str, nn.Linear]:
    """The layers that the targets name and the exclusions leave, in the model's order.

    Raises:
        IntarsiaError: for every target or exclusion that matches nothing (all at once, with the nearest names), when
            nothing is left, or when a weight cannot be adapted (tied, not a plain contiguous matrix).
    """
    layers = linear_layers(model)
    if not layers:
        raise IntarsiaError(f"{type(model).__name__} has no Linear layer, so there is nothing to adapt")
    wanted, faults = _matches(model, layers, _as_list(targets), "target")
    unwanted, more = _matches(model, layers, _as_list(exclude), "exclude")
    faults += more
    if not _as_list(targets):
        faults.append(f"no targets were given; try {ALL_LINEAR!r}")
    if not faults and not wanted - unwanted:
        faults.append(f"the exclusions leave none of the {len(wanted)} targeted layers")
    chosen = {name: layer for name, layer in layers.items() if name in wanted and name not in unwanted}
    if not faults:
        faults = unfit(model, chosen)
    if faults:
        raise IntarsiaError("\n".join(faults))
    return chosen


def _as_list(patterns: str | Iterable[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _matches(
    model: nn.Module, layers: dict[str, nn.Linear], patterns: Sequence[str], kind: str
) -> tuple[set[str], list[str]]:
    found: set[str] = set()
    faults = []
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            head = _output_head(model)
            found |= {name for name, layer in layers.items() if layer is not head}
            continue
        try:
            hits = {name for name in layers if _match(name, pattern)}
        except re.error as error:
            faults.append(f"{kind} {pattern!r} is not a regular expression: {error}")
            continue
        if not hits:
            faults.append(_no_match(model, layers, pattern, kind))
        found |= hits
    return found, faults


def _match(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)


def _no_match(model: nn.Module, layers: dict[str, nn.Linear], pattern: str, kind: str) -> str:
    other = next((n for n, m in model.named_modules() if n and _match(n, pattern) and not any(m.children())), None)
    if other is not None:
        what = type(model.get_submodule(other)).__name__
        return f"{kind} {pattern!r} matches {other}, a {what}; only Linear layers can be adapted"
    # Names differ in their last part far more usefully than in the layer number in front of it.
    parts = {name.rpartition(".")[2]: name for name in reversed(layers)}
    last = pattern.rpartition(".")[2].lstrip("*")
    near = nearest(last, parts)
    for part in re.findall(r"'([^']+)'", near):
        near = near.replace(f"'{part}'", f"'{part}' ({parts[part]})") if part in parts else near
    return f"{kind} {pattern!r} matches none of the {len(layers)} linear layers; {near}"


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def unfit(model: nn.Module, chosen: Mapping[str, nn.Linear]) -> list[str]:
    """Why layers cannot be adapted, or their weights set into: one line a layer, by dotted name."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    faults = []
    for name, layer in chosen.items():
        tied = [n for n in owners.get(id(layer.weight), []) if n != f"{name}.weight"]
        if not name:
            faults.append(
                "the model is a single Linear; put it into a module, such as nn.Sequential, so that it has a name"
            )
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            faults.append(f"{name}: nn.MultiheadAttention reads its weight without calling it; exclude {name!r}")
        elif "forward" in vars(layer):
            faults.append(
                f"{name}: something replaced its forward (a device hook of accelerate?), so an adapter would not be called; "
                "load the model without device_map, or remove the hooks first"
            )
        elif tied:
            faults.append(
                f"{name}: its weight is tied to {', '.join(tied)}, which would change with it; exclude {name!r}"
            )
        elif layer.weight.ndim != 2 or not layer.weight.is_floating_point():
            faults.append(
                f"{name}: weight {tuple(layer.weight.shape)} of {layer.weight.dtype} is not a plain matrix of floats"
            )
        elif layer.weight.is_meta:
            faults.append(f"{name}: the weight is on the meta device; load the base before attaching an adapter")
        elif not layer.weight.is_contiguous():
            faults.append(f"{name}: the weight is not contiguous in memory; store a .contiguous() copy first")
    return faults
