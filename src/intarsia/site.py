"""Sites: the weights of a model that may be adapted, and how targets name them.

A target is ``"all-linear"`` (every Linear, transformers' Conv1D among them, but the output head), a glob on the dotted
name (``"*.q_proj"``), a last part alone (``"q_proj"``, ``"embed_tokens"``), or a regular expression behind ``re:``
(``"re:layers\\.[0-3]\\..*_proj"``). Which layers can be named, and how each sees its weight: :mod:`intarsia.operators`.

A module that turns embeddings into hidden states is named by ``"decoder"``, or by its own whole name; no other pattern matches it.
A method that sits there takes ``"all-linear"``, the default, for ``"decoder"`` (``Method.default_targets``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import processes
from intarsia.bases import packing_of
from intarsia.errors import IntarsiaError, nearest
from intarsia.operators import (
    ADAPTABLE,
    BIAS,
    DECODER,
    LINEAR,
    Bare,
    Embedding,
    Linear,
    Operator,
    Tied,
    decoder_of,
    embedding_of,
    operator_of,
)
from intarsia.role import Role

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Site:
    """Facts about one adapted weight, read-only.

    Attributes:
        name: dotted name of the module, e.g. ``model.layers.0.self_attn.q_proj``.
        stored: the weight as the layer has it.
        bias: (O,) or None.
        roles: what it is in its attention or MLP block, for methods that ask (``Method.roles_from``).
        operator: what the layer does with the weight.
        tied: names of the layers that share the weight and are adapted with it.
        avoid: flat positions row * I + column, ascending, that no support may hold; None: there are none.
    """

    name: str
    stored: Tensor
    bias: Tensor | None
    roles: tuple[Role, ...] = ()
    operator: Operator = LINEAR
    tied: tuple[str, ...] = ()
    avoid: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """(out_features O, in_features I), a view of the stored weight: the base's own bits while an adapter is made.

        Of a packed base the numbers that they stand for, made anew each time: no more than one such matrix is there at once.
        """
        packing = packing_of(self.stored)
        return self.operator.matrix(packing.read(self.stored, packing.dtype(self.stored)))

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        packing = packing_of(self.stored)
        rows, columns = self.weight.shape if packing.in_place else packing.shape(self.stored)
        return self.operator.size((rows, columns))


def adaptable_layers(model: nn.Module) -> dict[str, Any]:
    """Every layer of a known kind, by dotted name, and every parameter of three dimensions that another module owns."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, Bare) or getattr(module, "is_state", False):
            continue  # the one is adapted, and found below by its owner; the other is an adapter's own
        if operator_of(module) is not None:
            found[name] = module
            continue
        for parameter, tensor in module._parameters.items():
            if tensor is not None and tensor.ndim == 3:
                whole = f"{name}.{parameter}".lstrip(".")
                found[whole] = layer_at(model, whole)
    return found


def decoders(model: nn.Module) -> dict[str, Any]:
    """Every module that turns embeddings of tokens into hidden states, by dotted name."""
    return {name: module for name, module in model.named_modules() if decoder_of(module) is not None}


def every_layer(model: nn.Module) -> dict[str, Any]:
    """Every layer and module where an adapter may sit, by dotted name."""
    return adaptable_layers(model) | decoders(model)


def operator_for(layer: nn.Module) -> Operator | str | None:
    """What an adaptable layer does with its weight, or how a decoder uses its embedding's; a text: why it cannot be adapted."""
    return operator_of(layer) or decoder_of(layer)


def weight_of(layer: Any) -> Tensor:
    """The weight of a layer as it is stored; of a decoder, that of its embedding."""
    embedding = embedding_of(layer)
    return layer.weight if embedding is None else embedding.weight


def layer_at(model: nn.Module, name: str) -> Any:
    """The layer of that dotted name, or the parameter of that name as a layer."""
    above, _, last = name.rpartition(".")
    owner = model.get_submodule(above)
    if owner._parameters.get(last) is not None:
        return owner._modules.get(last) or Bare(owner, last)
    return model.get_submodule(name)


def weight_name(model: nn.Module, name: str) -> str:
    """The name of a site's weight in the model: ``<layer>.weight``, or the parameter's own; of a decoder, its own name."""
    layer = layer_at(model, name)
    return name if isinstance(layer, Bare) or embedding_of(layer) is not None else f"{name}.weight"


def layer_of(parameter: str) -> str:
    """The layer whose weight or bias, named as in the model, this is."""
    return parameter.removesuffix(".weight").removesuffix(".bias")


def editable(model: nn.Module) -> dict[str, Operator | str]:
    """Everything that an edit may change, by its name in the model, and what is done with it, or why it cannot be changed: the
    weights that can be adapted, the biases of their layers, and the decoders, before whose tokens something may stand."""
    found: dict[str, Operator | str] = {}
    for name, layer in adaptable_layers(model).items():
        operator = operator_of(layer)
        assert operator is not None
        found[weight_name(model, name)] = operator
        if getattr(layer, "bias", None) is not None and not isinstance(operator, str):
            found[f"{name}.bias"] = BIAS
    for name, module in decoders(model).items():
        operator = decoder_of(module)
        assert operator is not None
        found[name] = operator
    return found


def operator_at(model: nn.Module, parameter: str) -> Operator:
    """What is done with a weight or a bias, named as in the model, that can be edited."""
    operator = operator_for(layer_at(model, layer_of(parameter)))
    assert isinstance(operator, Operator)
    return BIAS if parameter.endswith(".bias") else operator


def matrix_at(model: nn.Module, parameter: str) -> Tensor:
    """A weight or a bias, named as in the model, as its edits know it: (O, I), a view; of a packed weight the numbers that it
    stands for."""
    if parameter.endswith(".bias"):
        return BIAS.matrix(model.get_parameter(parameter).detach())
    return site_at(model, layer_of(parameter)).weight.detach()


def site_at(model: nn.Module, name: str) -> Site:
    """The site of a layer that :func:`unfit` has nothing against."""
    layer = layer_at(model, name)
    operator = operator_for(layer)
    assert isinstance(operator, Operator)
    bias = getattr(layer, "bias", None)
    return Site(name, weight_of(layer), bias, (), operator, tuple(partners(model, name)))


def find_sites(
    model: nn.Module, targets: str | Iterable[str], exclude: str | Iterable[str] = (), usual: str = ALL_LINEAR
) -> dict[str, Site]:
    """The sites that the targets name and the exclusions leave, in the model's order. ``usual``: what "all-linear" is to mean.

    Raises:
        IntarsiaError: for every target or exclusion that matches nothing (all at once, with the nearest names), when
            nothing is left, or when a weight cannot be adapted (tied, not a plain contiguous tensor of floats).
    """
    layers = every_layer(model)
    if not layers:
        raise IntarsiaError(
            f"{type(model).__name__} has no layer that can be adapted, so there is nothing to do; these can be: {ADAPTABLE}"
        )
    targeted = [usual if pattern == ALL_LINEAR else pattern for pattern in _as_list(targets)]
    wanted, faults = _matches(model, layers, targeted, "target")
    unwanted, more = _matches(model, layers, _as_list(exclude), "exclude")
    faults += more
    if not _as_list(targets):
        faults.append(f"no targets were given; try {ALL_LINEAR!r}")
    if not faults and not wanted - unwanted:
        faults.append(f"the exclusions leave none of the {len(wanted)} targeted layers")
    chosen = [name for name in layers if name in wanted and name not in unwanted]
    if not faults:
        with_another = {name for other in chosen for name in partners(model, other)}
        chosen = [name for name in chosen if name not in with_another]
        faults = unfit(model, chosen)
    if faults:
        raise IntarsiaError("\n".join(faults))
    return {name: site_at(model, name) for name in chosen}


def _as_list(patterns: str | Iterable[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _matches(
    model: nn.Module, layers: Mapping[str, nn.Module], patterns: Sequence[str], kind: str
) -> tuple[set[str], list[str]]:
    found: set[str] = set()
    faults = []
    apart = {name for name, layer in layers.items() if operator_of(layer) is None}
    named = {name: layer for name, layer in layers.items() if name not in apart}
    for pattern in patterns:
        if pattern == DECODER and apart:
            found |= apart
            continue
        if pattern == ALL_LINEAR:
            head = _output_head(model)
            linear = {n for n, layer in layers.items() if layer is not head and isinstance(operator_of(layer), Linear)}
            if not linear:
                faults.append(f"{kind} {pattern!r} matches nothing: the model has no Linear; {_there_are(named)}")
            found |= linear
            continue
        try:
            hits = {name for name in layers if name == pattern or (name not in apart and _match(name, pattern))}
        except re.error as error:
            faults.append(f"{kind} {pattern!r} is not a regular expression: {error}")
            continue
        if not hits:
            faults.append(_no_match(model, layers, len(named), pattern, kind))
        found |= hits
    return found, faults


def _match(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)


def _no_match(model: nn.Module, layers: Mapping[str, nn.Module], count: int, pattern: str, kind: str) -> str:
    if pattern == DECODER:
        return (
            f"{kind} {pattern!r} matches nothing: the model has no module that could be given inputs_embeds instead of the tokens of "
            "an embedding of its own, as LlamaModel"
        )
    other = next((n for n, m in model.named_modules() if n and _match(n, pattern) and not any(m.children())), None)
    if other is not None:
        what = type(model.get_submodule(other)).__name__
        return f"{kind} {pattern!r} matches {other}, a {what}; these can be adapted: {ADAPTABLE}"
    # Names differ in their last part far more usefully than in the layer number in front of it.
    parts = {name.rpartition(".")[2]: name for name in reversed(list(layers))}
    last = pattern.rpartition(".")[2].lstrip("*")
    near = nearest(last, parts)
    for part in re.findall(r"'([^']+)'", near):
        near = near.replace(f"'{part}'", f"'{part}' ({parts[part]})") if part in parts else near
    return f"{kind} {pattern!r} matches none of the {count} layers that can be adapted; {near}"


def _there_are(layers: Mapping[str, nn.Module]) -> str:
    kinds = {type(layer).__name__: name for name, layer in reversed(list(layers.items()))}
    return "name others, such as " + ", ".join(f"{name!r} (a {kind})" for kind, name in kinds.items())


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def partners(model: nn.Module, name: str) -> dict[str, Operator]:
    """The layers that share an embedding's weight, and what each does with the embedding's matrix; none: not shared so."""
    layer = layer_at(model, name)
    if not isinstance(layer, nn.Embedding):
        return {}
    found: dict[str, Operator] = {}
    for other, module in model.named_modules():
        if module is layer or getattr(module, "weight", None) is not layer.weight:
            continue
        operator = operator_of(module)
        if isinstance(operator, Embedding):
            found[other] = operator
        elif type(operator) is Linear:
            found[other] = Tied()
    return found


def unfit(model: nn.Module, chosen: Iterable[str]) -> list[str]:
    """Why layers cannot be adapted, or their weights set into: one line a layer, by dotted name."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    faults = []
    sharded = processes.is_sharded(model)
    for name in chosen:
        layer = layer_at(model, name)
        if sharded or processes.is_shard(weight_of(layer)):
            faults.append(
                f"{name}: its weight is sharded over processes already; attach or load first, then call intarsia.shard(model)"
            )
            continue
        if operator_of(layer) is None:
            faults += _unfit_decoder(name, layer)
            continue
        tied = [n for n in owners.get(id(layer.weight), []) if n != weight_name(model, name)]
        fault = _unfit(model, name, layer, tied)
        if fault is not None:
            faults.append(fault)
            continue
        for other in partners(model, name):
            fault = _unfit(model, other, model.get_submodule(other), [])
            if fault is not None:
                faults.append(f"{name}: its weight is tied to {other}.weight, and {fault}")
    return faults


def _unfit_decoder(name: str, layer: Any) -> list[str]:
    operator = decoder_of(layer)
    if not name:
        return [
            f"the model is a single {type(layer).__name__}; put it into a module, such as nn.Sequential, so that it has a name"
        ]
    if isinstance(operator, str):
        return [f"{name}: {operator}; name other layers"]
    if "forward" in vars(layer):
        return [
            f"{name}: something replaced its forward (a device hook of accelerate?), so an adapter would not be called; "
            "load the model without device_map, or remove the hooks first"
        ]
    if weight_of(layer).is_meta:
        return [f"{name}: the weights are on the meta device; load the base before attaching an adapter"]
    return []


def _unfit(model: nn.Module, name: str, layer: Any, tied: Sequence[str]) -> str | None:
    operator = operator_of(layer)
    alone = [n for n in tied if n.removesuffix(".weight") not in partners(model, name)]
    if not name:
        what = type(layer).__name__
        return f"the model is a single {what}; put it into a module, such as nn.Sequential, so that it has a name"
    if isinstance(operator, str):
        return f"{name}: {operator}"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return f"{name}: nn.MultiheadAttention reads its weight without calling it; exclude {name!r}"
    if "forward" in vars(layer):
        return (
            f"{name}: something replaced its forward (a device hook of accelerate?), so an adapter would not be called; "
            "load the model without device_map, or remove the hooks first"
        )
    if alone:
        leader = next((n for n in tied if name in partners(model, n.rpartition(".")[0])), None)
        if leader is not None:
            return f"{name}: its weight is tied to {leader}; name {leader.rpartition('.')[0]!r} instead, and both are adapted as one"
        return f"{name}: its weight is tied to {', '.join(alone)}, which would change with it; exclude {name!r}"
    packing = packing_of(layer.weight)
    if not packing.in_place:
        if operator != LINEAR:
            return f"{name}: a {type(layer).__name__} stored in {packing.name(layer.weight)} cannot be adapted; exclude {name!r}"
        return f"{name}: {fault}" if (fault := packing.fault(layer.weight)) else None
    if layer.weight.ndim < 2 or not layer.weight.is_floating_point():
        return f"{name}: weight {tuple(layer.weight.shape)} of {layer.weight.dtype} is not a plain matrix of floats"
    if layer.weight.is_meta:
        return f"{name}: the weight is on the meta device; load the base before attaching an adapter"
    if not layer.weight.is_contiguous():
        return f"{name}: the weight is not contiguous in memory; store a .contiguous() copy first"
    return _computes_otherwise(name, layer, operator) if isinstance(operator, Operator) else None


KNOWN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _computes_otherwise(name: str, layer: Any, operator: Operator) -> str | None:
    """Try a forward of somebody's own on a few numbers: what is trained is the operator's product with other weights, and
    a layer that scales its output, say, would train something else than what is set in afterwards."""
    cls = type(layer)
    if isinstance(layer, Bare) or hasattr(cls, "base_forward") or any(cls.forward is known.forward for known in KNOWN):
        return None
    x = operator.some_input(layer.weight)
    with torch.no_grad():
        expected = operator.product(x, operator.matrix(layer.weight), getattr(layer, "bias", None))
        try:
            found = cls.forward(layer, x)
            same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
        except Exception as error:
            return f"{name}: the forward of {cls.__name__} cannot be tried ({type(error).__name__}: {error}); exclude {name!r}"
    if not same:
        return f"{name}: the forward of {cls.__name__} is not that of its base class, so an adapter would not do what its edit says; exclude {name!r}"
    return None
