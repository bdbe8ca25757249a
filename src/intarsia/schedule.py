"""Schedules: supports that move while they are trained. Drop the units that changed least, grow others where a gradient is large.

Drop and grow is that of SpIEL (Ansell et al. 2024, arXiv:2401.16405, section 3.1) and, before it, of RigL (arXiv:1911.11134), on any
granularity. The count stays, so do the values, the optimizer's moments and the bits of the base of all that is kept; what is
dropped is the base again, to the bit, and what is grown starts there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import chain
from intarsia.calibrate import OF_BACKWARD, Loss, gather
from intarsia.errors import IntarsiaError
from intarsia.forms import Sparse
from intarsia.method import Start
from intarsia.model import record, states
from intarsia.site import Site
from intarsia.support import free_count, free_units, needs_of, score, top


@dataclass(frozen=True)
class _Move:
    """What changes at one layer: its new support, and from where to where the values of what is kept go."""

    index: Tensor  # (k,) sorted
    old: Tensor  # places along the axis of the values
    new: Tensor
    axis: int

    def carried(self, tensor: Tensor, fresh: Tensor) -> Tensor:
        """``fresh`` with what is kept of the tensor at its new places."""
        return fresh.index_copy(self.axis, self.new, tensor.index_select(self.axis, self.old))


def regrow(
    model: nn.Module,
    name: str,
    optimizer: torch.optim.Optimizer | None,
    *,
    data: Iterable[Any],
    share: float = 0.1,
    scorer: str = "gradient",
    loss: Loss | None = None,
) -> dict[str, int]:
    """Move a share of an adapter's support in every weight: as many units are grown as are dropped. In place.

    Dropped are those whose change has the smallest norm; grown, of those outside, the ones with the highest score on the data,
    taken of the model as it is now, adapter and all. The peak memory is one layer's gradient. Gradients of the values are
    cleared, so call it between an optimizer's step and the next backward pass.

    Args:
        optimizer: the one that trains the adapter; its moments go with the units, those of grown units start at zero.
        data: batches, as for :func:`intarsia.attach`; one is usual.
        share: of the units of each weight, in [0, 1].
        scorer: gradient, snip or fisher.

    Returns:
        How many units moved, by site.

    Raises:
        IntarsiaError: where the adapter is not live, has no support that may move, or the optimizer keeps what cannot be carried
            over. Whatever is raised, model and optimizer are as they were.
    """
    if not 0 <= share <= 1:
        raise IntarsiaError(f"share={share!r} must be in [0, 1], a part of the units of each weight")
    if not needs_of(scorer) or not needs_of(scorer) <= OF_BACKWARD:
        raise IntarsiaError(f"scorer={scorer!r} must be one of gradient, snip, fisher: units are grown by a gradient")
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise IntarsiaError("supports cannot move with several processes yet: each would choose by its own batch")
    layers = _movable(model, name)
    avoided = _avoided(model, name)
    carried = {site: _carried(layer.adapters[name], optimizer) for site, layer in layers.items()}
    moves: dict[str, _Move] = {}

    def choose(site: str, found: Mapping[str, Tensor]) -> None:
        layer = layers[site]
        given = {need: layer.operator.matrix(tensor) for need, tensor in found.items()}
        with torch.no_grad():
            move = _choose(_site(site, layer, avoided.get(site)), layer.adapters[name], given, share, scorer)
        if move:
            moves[site] = move

    weights = {site: model.get_parameter(f"{site}.weight") for site in layers}
    with chain.as_base(list(layers.values()), name):
        gather(model, weights, needs_of(scorer), data, choose, loss)
    _commit([(layers[site], layers[site].adapters[name], move, carried[site]) for site, move in moves.items()])
    return {site: len(move.index) - _units(layers[site].adapters[name], move) for site, move in moves.items()}


def _units(state: Any, move: _Move) -> int:
    """How many units are kept."""
    per_unit = len(state.granularity().spread(torch.zeros(1, dtype=torch.int64)))
    return len(move.old) // per_unit


def _movable(model: nn.Module, name: str) -> dict[str, Any]:
    method = record(model).adapters[name].method if name in record(model).adapters else None
    found = states(model, name)  # raises for an unknown name
    if not isinstance(method, Sparse) or not method.moves_support:
        raise IntarsiaError(f"{name!r} is {method.name if method else None}, whose support cannot move")
    layers = {site: layer for site, layer in chain.adapted_layers(model).items() if site in found}
    for site, layer in layers.items():
        if not layer.packing.in_place:
            stored = layer.packing.name(layer.weight)
            raise IntarsiaError(f"{site}: its weight is stored in {stored}; a support only moves over a plain base")
        if layer.live != name:
            raise IntarsiaError(
                f"{site}: {name!r} is not live; make it the lowest active adapter first: activate(model, {name!r})"
            )
    return layers


def _carried(state: Any, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """The optimizer's tensors that have an entry for every value."""
    kept = optimizer.state.get(state.values, {}) if optimizer else {}
    tensors = {key: tensor for key, tensor in kept.items() if isinstance(tensor, Tensor) and tensor.numel() > 1}
    for key, tensor in tensors.items():
        if tensor.shape != state.values.shape:
            raise IntarsiaError(
                f"{type(optimizer).__name__} keeps {key} of shape {tuple(tensor.shape)} for values of shape "
                f"{tuple(state.values.shape)}, which cannot follow a support that moves; use AdamW or SGD"
            )
    return [tensor for tensor in tensors.values() if tensor.shape == state.values.shape]


def _avoided(model: nn.Module, name: str) -> Mapping[str, Tensor]:
    """The entries that its support may not grow into, by site."""
    found = record(model).avoided.get(name)
    if found is None and record(model).adapters[name].avoid:
        others = ", ".join(other for other, _ in record(model).adapters[name].avoid)
        raise IntarsiaError(
            f"{name!r} avoids {others}, and a file does not say which entries those change; attach it anew with avoid=[...], or "
            "keep its support"
        )
    return found or {}


def _site(site: str, layer: Any, avoid: Tensor | None = None) -> Site:
    return Site(site, chain.matrix(layer).detach(), None, operator=layer.operator, avoid=avoid)


def _choose(site: Site, state: Any, found: Mapping[str, Tensor], share: float, scorer: str) -> _Move | None:
    unit, index = state.granularity(), state.index
    count = min(round(share * len(index)), free_count(unit, site) - len(index))
    if not count:
        return None
    change = unit.reduce(unit.scatter(state.shape, index, state.method.change(state.raw()).abs())).index_select(
        0, index
    )
    dropped = top(-change, count)
    scores = unit.reduce(score(scorer, site, Start(0, **dict[str, Any](found)))).index_fill(0, index, -torch.inf)
    free = free_units(unit, site)
    if free is not None:
        scores = scores.masked_fill(~free.to(scores.device), -torch.inf)
    grown = top(scores, count)
    stays = torch.ones(len(index), dtype=torch.bool, device=index.device).index_fill(0, dropped, False)
    new = torch.cat([index[stays], grown.to(index.device)]).sort().values
    places = torch.searchsorted(new, index[stays])
    return _Move(new, unit.spread(stays.nonzero().squeeze(1)), unit.spread(places), unit.axis)


def _commit(moves: list[tuple[Any, Any, _Move, list[Tensor]]]) -> None:
    """Write all moves, or none."""
    before = [
        (layer, state, layer.active, [(t, t.detach().clone()) for t in (*state.tensors().values(), *carried)])
        for layer, state, _, carried in moves
    ]
    try:
        for layer, state, move, carried in moves:
            active = layer.active
            chain.set_active(layer, ())  # the base's bits
            with torch.no_grad():
                _write(layer, state, move, carried)
            state.replan()
            chain.set_active(layer, active)
    except BaseException:
        for layer, state, active, tensors in before:
            chain.set_active(layer, ())
            with torch.no_grad():
                for tensor, bits in tensors:
                    tensor.copy_(bits)
            state.replan()
            chain.set_active(layer, active)
        raise
    for _, state, _, _ in moves:
        state.values.grad = None


def _write(layer: Any, state: Any, move: _Move, carried: list[Tensor]) -> None:
    fresh = state.method.at_rest(_site("", layer), move.index)
    for key, tensor in state.tensors().items():
        if key != "index":
            tensor.copy_(move.carried(tensor, fresh[key].detach()))
    for tensor in carried:
        tensor.copy_(move.carried(tensor, torch.zeros_like(tensor)))
    state.index.copy_(move.index)
