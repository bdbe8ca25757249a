"""Observers: what looks at the inputs of layers while calibration data runs through a model.

An observer is anything with ``see(x)``, x (N, I) the tokens of one call, and ``satisfied``, whether it has seen enough. Layers
that are given the very same tensor, such as q, k and v, share one. Tokens that ``attention_mask`` hides are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from intarsia.bases import packing_of
from intarsia.errors import IntarsiaError
from intarsia.operators import Operator, operator_of

IGNORED = -100  # the label of a token that nothing is trained on
MOST_PASSES = 50  # over the data, while observers are not satisfied

Progress = Callable[[int, int, str], None]
Look = Callable[[str, Tensor], None]


class Observer(Protocol):
    """See the module."""

    @property
    def satisfied(self) -> bool:
        """Whether it wants to see no more for now."""

    def see(self, x: Tensor) -> None:
        """The tokens (N, I) of one call of the layer, in the dtype that they have there."""


class Watch:
    """Within its block, ``look(name, x)`` is called for every call of each of the layers, x (N, I) without hidden tokens.

    ``labelled``: neither are tokens seen whose label says that nothing is trained on them.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], look: Look, labelled: bool = False) -> None:
        self.layers = {name: model.get_submodule(name) for name in names}
        self.columns = {name: _linear_inputs(layer) for name, layer in self.layers.items()}
        self.look, self.labelled = look, labelled
        self.mask: Tensor | None = None

    def begin(self, batch: Any) -> None:
        """From now on it is this batch that runs."""
        mask = _two_dimensional(batch, "attention_mask")
        labels = _two_dimensional(batch, "labels") if self.labelled else None
        self.mask = None if mask is None else mask.bool()
        if labels is not None:
            trained = labels != IGNORED
            self.mask = trained if self.mask is None else self.mask & trained

    def __enter__(self) -> Watch:
        self.hooks = [
            layer.register_forward_pre_hook(lambda _, given, name=name: self._see(name, given[0].detach()))
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _see(self, name: str, x: Tensor) -> None:
        if x.shape[-1] != self.columns[name]:
            raise IntarsiaError(
                f"{name} is a {type(self.layers[name]).__name__} and its input is {tuple(x.shape)}; "
                "norms of inputs are known for linear layers only. Exclude it or choose another scorer"
            )
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask.to(x.device)]
        self.look(name, x.reshape(-1, x.shape[-1]))


def observe(
    model: nn.Module,
    observers: Mapping[str, Observer],
    batches: Sequence[Any],
    run: Callable[[Any], None],
    confer: Callable[[Mapping[str, Observer]], None],
    progress: Progress | None = None,
) -> dict[str, Observer]:
    """Let the observers see the inputs of their layers, over the batches again and again until all are satisfied, at most
    ``MOST_PASSES`` times. -> the observer of each layer; layers that are given the same tensor have the first one's.

    Args:
        run: a forward pass of a batch.
        confer: called after every batch with what is returned.
    """
    leaders = same_inputs(model, list(observers), lambda: run(batches[0]))
    found = {name: observers[leader] for name, leader in leaders.items()}

    def look(name: str, x: Tensor) -> None:
        if name in looking:
            observers[name].see(x)

    with Watch(model, sorted(set(leaders.values()), key=list(observers).index), look, labelled=True) as watch:
        for number in range(MOST_PASSES * len(batches)):
            looking = {name for name in watch.layers if not observers[name].satisfied}
            if not looking:
                break
            watch.begin(batches[number % len(batches)])
            run(batches[number % len(batches)])
            confer(found)
            if progress:
                content = sum(observer.satisfied for observer in found.values())
                progress(content, len(found), "layers whose inputs are known")
    return found


def same_inputs(model: nn.Module, names: Sequence[str], run: Callable[[], None]) -> dict[str, str]:
    """Which layers are given the very same tensors in a forward pass: each layer's name, and the first one of its group.

    A layer that is called several times is of a group only if each call is."""
    # By id and version: the last such tensor, which layer first had it, and in which of its calls.
    seen: dict[tuple[int, int], tuple[weakref.ref[Tensor], str, int]] = {}
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in names}

    def see(name: str, x: Tensor) -> None:
        at = (id(x), -1 if x.is_inference() else x._version)
        known = seen.get(at)
        if known is None or known[0]() is not x:
            known = (weakref.ref(x), name, len(calls[name]))
            seen[at] = known
        calls[name].append(known[1:])

    layers = {name: model.get_submodule(name) for name in names}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    leaders: dict[str, str] = {}
    for name in names:
        first = {leader for leader, _ in calls[name]}
        leader = first.pop() if len(first) == 1 else name
        together = calls[name] == [(leader, number) for number in range(len(calls.get(leader, ())))]
        leaders[name] = leader if together and leaders.get(leader, leader) == leader else name
    return leaders


def _two_dimensional(batch: Any, key: str) -> Tensor | None:
    found = batch.get(key) if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def _linear_inputs(layer: Any) -> int:
    """I of a linear layer, 0 of any other."""
    operator = operator_of(layer)
    if not isinstance(operator, Operator) or operator.kind != "linear":
        return 0
    packing = packing_of(layer.weight)
    return operator.matrix(layer.weight).shape[1] if packing.in_place else packing.shape(layer.weight)[1]
