"""The chain at a site: the base layer below, each active adapter on top. The only file that touches nn.Module.

A layer is adapted by swapping its class in place, so base keys, ``isinstance``, ``.weight``, deepcopy, pickle and
``torch.compile(fullgraph=True)`` survive. Where the lowest active adapter is sparse it is *live*: its values stand in the
base weight itself, and the base's bits are kept aside. They are written after every optimizer step (a hook), never in a
forward; a forward whose weight is out of date is an error, not a wrong answer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from intarsia.errors import IntarsiaError
from intarsia.forms import Sparse
from intarsia.method import Method
from intarsia.site import Site
from intarsia.support import Granularity

_ADAPTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # every adapted layer alive, for the optimizer hook
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}  # a class -> the same with a chain on it, made once


class Tensors:
    """p: the state at one site as attributes (a plain class: Dynamo does not trace SimpleNamespace)."""

    def __init__(self, tensors: dict[str, Tensor], shape: tuple[int, int], plan: tuple[Tensor, ...] = ()):
        self.shape, self.plan = shape, plan
        for name, tensor in tensors.items():
            setattr(self, name, tensor)


class State(nn.Module):
    """One adapter at one site: its tensors and the method that reads them. Floating tensors stay float32 or wider."""

    def __init__(self, method: Method, site: Site, tensors: dict[str, Tensor]):
        super().__init__()
        self.method, self.shape = method, site.shape
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self.replan()

    def replan(self) -> None:
        """Make what follows from the state anew, after tensors of it were written."""
        plan = self.method.plan(Tensors(self.tensors(), self.shape))
        self.plan_length = len(plan)
        for number, tensor in enumerate(plan):
            self.register_buffer(f"plan{number}", tensor, persistent=False)

    def plan(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"plan{number}") for number in range(self.plan_length))

    def tensors(self) -> dict[str, Tensor]:
        """Trained and constant tensors by name."""
        constants = {k: t for k, t in self.named_buffers() if k not in self._non_persistent_buffers_set}
        return dict(self.named_parameters()) | constants

    def granularity(self) -> Granularity:
        """Of a sparse method's support."""
        return self.method.granularity_at(self.shape)  # type: ignore[attr-defined, no-any-return]

    def raw(self) -> Tensors:
        """p in the dtypes that are stored."""
        return Tensors(self.tensors(), self.shape, self.plan())

    def cast(self, dtype: torch.dtype) -> Tensors:
        """p in one floating dtype, so that no method ever meets two it did not ask for."""
        wide = self.method.stays_wide()
        return Tensors(
            {k: t.to(dtype) if t.is_floating_point() and k not in wide else t for k, t in self.tensors().items()},
            self.shape,
            self.plan(),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> State:
        # model.to(torch.bfloat16) moves the base; the masters of an adapter would lose most of their bits.
        def wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                moved = tensor.to(moved.device, torch.float32)
            return moved

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self


class Chain:
    """The base layer with the first ``count`` of some adapters on it: what the next adapter sees below."""

    def __init__(self, layer: Any, states: Sequence[State]):
        self.layer, self.states = layer, states

    def __call__(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        layer, states = self.layer, self.states
        if not states:
            return layer.base_forward(x)  # type: ignore[no-any-return]
        top = states[-1]
        if len(states) == 1 and layer.live is not None:
            return top.method.live(top.cast(x.dtype), x, layer.weight, layer.bias)  # type: ignore[attr-defined, no-any-return]
        return top.method.forward(top.cast(x.dtype), x, Chain(layer, states[:-1]))

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of all that lies below, folded in ``dtype``."""
        layer, states = self.layer, self.states
        if not states:
            b = layer.bias
            return base_weight(layer).to(dtype), None if b is None else b.to(dtype)
        top = states[-1]
        return top.method.fold(top.cast(dtype), *Chain(layer, states[:-1]).weights(dtype))


class Adapted:
    """What an adapted layer has besides what its base class has. Mixed in by :func:`adapted`."""

    adapters: nn.ModuleDict  # every adapter at this layer, active or not
    active: tuple[str, ...]  # those that act, lowest first
    live: str | None  # the adapter whose values stand in the weight: active[0] or none
    rows: tuple[tuple[tuple[str, ...], Tensor], ...] | None  # per-row adapters: (adapters, row numbers)
    row_count: int
    kept: Tensor | None  # the base's bits at the support of the live adapter
    written: tuple[int, int]  # versions of (values, weight) when the weight was last written

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear
        if self.live is not None and not torch.compiler.is_compiling() and versions(self) != self.written:
            raise IntarsiaError(
                f"the weight under the live adapter {self.live!r} is out of date: its values or the weight were changed by "
                "something other than an optimizer step. Call intarsia.sync(model) after writing values by hand; "
                "activate(model) before changing base weights"
            )
        if self.rows is not None:
            return self._forward_rows(input)
        return Chain(self, [self.adapters[name] for name in self.active])(input)  # type: ignore[misc]

    def _forward_rows(self, x: Tensor) -> Tensor:
        if x.shape[0] != self.row_count:
            raise IntarsiaError(
                f"rows() was given {self.row_count} adapters, and this layer meets {x.shape[0]} rows; "
                "per-row adapters need the batch as the first dimension in every adapted layer"
            )
        assert self.rows is not None
        y: Tensor | None = None
        for names, index in self.rows:
            states = [self.adapters[name] for name in names if name in self.adapters]
            part = Chain(self, states)(x.index_select(0, index))  # type: ignore[arg-type]
            y = part.new_empty(x.shape[0], *part.shape[1:]) if y is None else y
            y = y.index_copy(0, index, part)
        assert y is not None
        return y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (type(self).__mro__[2],), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        write(self)  # a copy counts versions anew

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        if self.live is not None:
            assert self.kept is not None
            self.kept = self.kept.to(self.weight.device, self.weight.dtype)  # type: ignore[attr-defined]
            write(self)
        return out


def adapted(cls: type[nn.Module]) -> type[nn.Module]:
    """cls with a chain of adapters on top: a subclass, so the layer keeps its identity, its keys and isinstance(cls)."""
    if cls in _CLASSES:
        return _CLASSES[cls]

    def base_forward(self: Any, x: Tensor) -> Tensor:
        return cls.forward(self, x)  # type: ignore[no-any-return]

    _CLASSES[cls] = type(f"Adapted{cls.__name__}", (Adapted, cls), {"base_forward": base_forward})
    return _CLASSES[cls]


def _revive(cls: type[nn.Module]) -> nn.Module:
    layer: nn.Module = adapted(cls).__new__(adapted(cls))
    _ADAPTED.add(layer)
    return layer


# ------------------------------------------------------------------ putting on and taking off
def put_on(layer: Any, name: str, state: State) -> None:
    """Add an adapter to a layer, inactive. Swaps the layer's class when it is the first."""
    if not isinstance(layer, Adapted):
        layer.__class__ = adapted(type(layer))
        layer.adapters = nn.ModuleDict()
        layer.active, layer.live, layer.kept, layer.rows = (), None, None, None
        layer.row_count, layer.written = 0, (0, 0)
        _ADAPTED.add(layer)
    layer.adapters[name] = state


def take_off(layer: Any, name: str) -> None:
    """Remove an inactive adapter from a layer. Gives the layer its own class back when it was the last."""
    del layer.adapters[name]
    if not layer.adapters:
        _ADAPTED.discard(layer)
        for attribute in ("active", "live", "kept", "rows", "row_count", "written"):
            delattr(layer, attribute)
        del layer.adapters
        layer.__class__ = type(layer).__mro__[2]


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


# ------------------------------------------------------------------ live weights
def set_active(layer: Any, names: Sequence[str], live: bool = True) -> None:
    """Make exactly these adapters act on the layer, lowest first; the lowest one live if it is sparse."""
    _take_out(layer)
    layer.active = tuple(name for name in names if name in layer.adapters)
    if live and layer.active and isinstance(layer.adapters[layer.active[0]].method, Sparse):
        _set_in(layer, layer.active[0])


def _set_in(layer: Any, name: str) -> None:
    state = layer.adapters[name]
    layer.kept = state.granularity().gather(layer.weight.detach(), state.index)
    layer.live = name  # from here on the kept bits undo whatever is written
    write(layer)


def _take_out(layer: Any) -> None:
    if layer.live is None:
        return
    state = layer.adapters[layer.live]
    with torch.no_grad():
        state.granularity().put(layer.weight, state.index, layer.kept)
    layer.live = layer.kept = None


def write(layer: Any) -> None:
    """Write base + change of the live adapter into the weight, computed in float32 or wider and rounded once."""
    if layer.live is None:
        return
    state, weight = layer.adapters[layer.live], layer.weight
    with torch.no_grad():
        change = state.method.change(state.raw())
        state.granularity().put(weight, state.index, (layer.kept.to(change.dtype) + change).to(weight.dtype))
    layer.written = versions(layer)


def versions(layer: Any) -> tuple[int, int]:
    """How often the values and the weight have been written in place, as autograd counts it."""
    values, weight = layer.adapters[layer.live].values, layer.weight
    return tuple(-1 if t.is_inference() else t._version for t in (values, weight))  # type: ignore[return-value]


def base_weight(layer: Any) -> Tensor:
    """The base's own weight: the layer's, or a copy with the kept bits put back where an adapter is live."""
    weight: Tensor = layer.weight
    if not isinstance(layer, Adapted) or layer.live is None:
        return weight
    assert layer.kept is not None
    state: Any = layer.adapters[layer.live]
    weight = weight.detach().clone()
    state.granularity().put(weight, state.index, layer.kept)
    return weight


def _write_stale(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # Some optimizers write through parameter.data, which no version counter sees.
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers: list[Any] = list(_ADAPTED)
    for layer in layers:
        if layer.live is None:
            continue
        if id(layer.adapters[layer.live].values) in stepped or versions(layer) != layer.written:
            write(layer)


register_optimizer_step_post_hook(_write_stale)


@contextmanager
def transaction(layers: Sequence[Any]) -> Iterator[None]:
    """Whatever fails inside, every layer is as it was before: same active adapters, same bits."""
    before = [(layer, layer.active, layer.live is not None) for layer in layers]
    try:
        yield
    except BaseException:
        give_back(before)
        raise


def give_back(before: Sequence[tuple[Any, tuple[str, ...], bool]]) -> None:
    """Make (layer, active, live) true again on every layer; an interrupt in the middle leaves none behind."""
    failed = []
    for layer, active, live in before:
        try:
            set_active(layer, active, live)
        except BaseException as error:
            failed.append(error)
            set_active(layer, active, live)
    if failed:
        raise failed[0]
