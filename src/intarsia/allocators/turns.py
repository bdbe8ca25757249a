"""Turns: layers of a live model train by turns, as an allocator says.

    turns = allocators.Turns(model, "default", allocators.Ist(share=0.25), seed=0)
    for step, batch in enumerate(batches, start=1):
        turns.begin(step, loss=lambda: some_loss(model, rows))
        ...backward, optimizer.step(), optimizer.zero_grad()...
    turns.end()

Make the optimizer before the first turn, of all that trains, and take one that skips parameters without a gradient: those of torch do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import chain, processes
from intarsia.allocators.allocator import Allocator, Draws
from intarsia.errors import IntarsiaError
from intarsia.model import active_names, states
from intarsia.operators import STACK


def layer_of(site: str) -> str:
    """The block that a site stands in: its name up to the first number, ``model.layers.3`` of ``model.layers.3.mlp.up_proj``;
    the whole name where there is no number."""
    found = re.match(r"(?:[^.]*\.)*?\d+(?=\.|$)", site)
    return found.group() if found else site


class Turns:
    """The layers of an adapter, of which an allocator lets some train in each step.

    Attributes:
        layers: names of the blocks, in the order of the model; the allocator knows them as numbers.
        state: all that later turns depend on, with seed and step.

    Raises:
        IntarsiaError: for an unknown adapter, one that is not the highest active one, and for several processes.
    """

    def __init__(self, model: nn.Module, name: str, allocator: Allocator, seed: int = 0) -> None:
        if processes.count() > 1:
            raise IntarsiaError(
                f"{allocator.name} lets other parameters train in every step, which several processes cannot follow yet; start one process"
            )
        self.model, self.name, self.allocator, self.draws = model, name, allocator, Draws(seed)
        self.sites: dict[str, list[str]] = {}
        for site in states(model, name):
            self.sites.setdefault(layer_of(site), []).append(site)
        if active_names(model)[-1:] != [name]:
            raise IntarsiaError(
                f"{name!r} is not the highest active adapter, and only that one can be damped: activate(model, {name!r})"
            )
        self.layers = tuple(self.sites)
        self.state = allocator.begin(len(self.layers))
        self._required = {p: p.requires_grad for state in states(model, name).values() for p in state.parameters()}

    def begin(self, step: int, loss: Callable[[], Tensor | float] | None = None) -> tuple[str, ...]:
        """Before optimizer step ``step`` (from 1): measure, where that is due, and let the layers of this turn train and no others.

        Args:
            loss: the loss of some rows of the training data, the model as it is; called in eval mode without gradients, several times.

        Returns:
            The names of the layers that train.
        """
        trials = self.allocator.trials(self.state, step, self.draws)
        if trials and loss is None:
            raise IntarsiaError(f"{self.allocator.name} measures losses before step {step}: begin(step, loss=...)")
        if trials and loss is not None:
            self.allocator.learn(self.state, trials, [self._damped(trial, loss) for trial in trials])
        chosen = [self.layers[number] for number in self.allocator.choose(self.state, step, self.draws)]
        self._train_only(chosen)
        return tuple(chosen)

    def due(self, step: int) -> bool:
        """Whether losses are measured before this step."""
        return bool(self.allocator.trials(self.state, step, self.draws))

    def end(self) -> None:
        """Let everything train again that did before the first turn."""
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the adapter's own state; :meth:`load_state_dict` takes it."""
        return {key: tensor.clone() for key, tensor in self.state.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint. Raises IntarsiaError where it is of another run."""
        mine = {key: (tuple(t.shape), t.dtype) for key, t in self.state.items()}
        theirs = {key: (tuple(t.shape), t.dtype) for key, t in saved.items()}
        if mine != theirs:
            raise IntarsiaError(f"the state of {self.allocator.name} has {theirs}; expected {mine}")
        for key, tensor in self.state.items():
            tensor.copy_(saved[key])

    def _train_only(self, chosen: Sequence[str]) -> None:
        found = states(self.model, self.name)
        inside = {p for layer in chosen for site in self.sites[layer] for p in found[site].parameters()}
        for parameter, required in self._required.items():
            parameter.requires_grad_(required and parameter in inside)
            if not parameter.requires_grad:
                parameter.grad = None  # an optimizer would step by what is left of an earlier turn

    def _damped(self, trial: Sequence[int], loss: Callable[[], Tensor | float]) -> float:
        sites = [site for number in trial for site in self.sites[self.layers[number]]]
        with damped(self.model, self.name, sites, self.allocator.damping()), evaluating(self.model), torch.no_grad():
            return float(loss())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; afterwards every module is in the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def damped(model: nn.Module, name: str, sites: Sequence[str], factor: float) -> Iterator[None]:
    """Within the block the highest active adapter changes the outputs of these sites by ``factor`` of what it does otherwise.

    No weight is written for it but this: where the adapter is live, the base's bits are put back for the block, and its values are set in
    again afterwards, to the bit.
    """
    layers = {site: layer for site, layer in chain.adapted_layers(model).items() if site in set(sites)}
    if stacks := [site for site, layer in layers.items() if layer.operator.kind == STACK]:
        raise IntarsiaError(
            f"{stacks[0]} is a stack of matrices, whose adapter acts in the weight alone and cannot be damped"
        )
    live = [layer for layer in layers.values() if layer.live is not None]
    with ExitStack() as stack:
        stack.callback(chain.give_back, [(layer, layer.active, True) for layer in live])
        for layer in live:
            chain.set_active(layer, layer.active, live=False)
        for layer in layers.values():
            for module in (layer, *layer.partners):
                stack.enter_context(module.register_forward_hook(partial(_damp, factor), with_kwargs=True))
        yield


def _damp(factor: float, module: Any, given: tuple[Tensor, ...], named: Mapping[str, Tensor], y: Tensor) -> Tensor:
    leading = module.leading
    below = [leading.adapters[name] for name in leading.active[:-1]]
    base = chain.Chain(module, below)(*given, *named.values())
    return base + factor * (y - base)
