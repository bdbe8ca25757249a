"""The chain at a site: the base layer below, each active adapter on top. The only file that touches nn.Module.

A layer is adapted by swapping its class in place, so base keys, ``isinstance``, ``.weight``, deepcopy, pickle and
``torch.compile(fullgraph=True)`` survive. A layer that shares an embedding's weight (a tied head) is its *partner*: it
computes with the same adapters, and what they learn sums over both. Where the lowest active adapter is sparse it is *live*: its values stand in the
base weight itself, and the base's bits are kept aside. They are written after every optimizer step (a hook), never in a
forward; a forward whose weight is out of date is an error, not a wrong answer. A packed weight (NF4, int8) cannot hold
values: they are set into what every forward reads of it. At a decoder no weight changes: its forward is given what stands before the
tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from intarsia import processes
from intarsia.bases import Packing, packing_of
from intarsia.edits import Ahead, Call, Rows, Seen, run
from intarsia.errors import IntarsiaError
from intarsia.forms import Sparse
from intarsia.method import Method
from intarsia.operators import DECODER, LINEAR, STACK, Bare, Operator, takes
from intarsia.site import Site, operator_for, weight_of
from intarsia.support import Granularity

_ADAPTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # every adapted layer alive, for the optimizer hook
_CLASSES: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}  # a class -> the same with a chain on it, made once


class Tensors:
    """p: the state at one site as attributes (a plain class: Dynamo does not trace SimpleNamespace)."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        shape: tuple[int, int],
        plan: tuple[Tensor, ...] = (),
        operator: Operator = LINEAR,
        dtype: torch.dtype = torch.float32,
        training: bool = False,
        traits: Any = None,
        seen: Any = None,
    ):
        self.seen = seen  # the tokens of the model's forward, for a method that watches them
        self.shape, self.plan, self.operator, self.dtype, self.training = shape, plan, operator, dtype, training
        self.traits = traits
        for name, tensor in tensors.items():
            setattr(self, name, tensor)


class State(nn.Module):
    """One adapter at one site: its tensors and the method that reads them. Floating tensors stay float32 or wider."""

    is_state = True  # so that nobody takes its tensors for weights of the base

    def __init__(self, method: Method, site: Site, tensors: dict[str, Tensor]):
        super().__init__()
        self.method, self.shape, self.operator = method, site.shape, site.operator
        self.traits = method.traits(site.shape)
        self.seen: Seen | None = None
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self.replan()

    def replan(self) -> None:
        """Make what follows from the state anew, after tensors of it were written."""
        plan = self.method.plan(Tensors(self.tensors(), self.shape, traits=self.traits))
        self.plan_length = len(plan)
        for number, tensor in enumerate(plan):
            self.register_buffer(f"plan{number}", tensor, persistent=False)

    def plan(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"plan{number}") for number in range(self.plan_length))

    def tensors(self) -> dict[str, Tensor]:
        """Trained and constant tensors by name."""
        # Not named_parameters(): every forward of every layer asks.
        constants = {k: t for k, t in self._buffers.items() if k not in self._non_persistent_buffers_set}
        return {**self._parameters, **constants}  # type: ignore[dict-item]  # none of them is None

    def learned(self) -> dict[str, nn.Parameter]:
        """The trained tensors: its parameters but those that only carry notes (``Method.carriers``)."""
        notes = self.method.carriers()
        return {name: parameter for name, parameter in self.named_parameters() if name not in notes}

    def granularity(self) -> Granularity:
        """Of a sparse method's support."""
        return self.method.granularity_at(self.shape)  # type: ignore[attr-defined, no-any-return]

    def raw(self, operator: Operator | None = None) -> Tensors:
        """p in the dtypes that are stored; for a partner, with what that does with the weight."""
        operator = operator or self.operator
        return Tensors(self.tensors(), self.shape, self.plan(), operator, training=self.training, traits=self.traits)

    def cast(self, dtype: torch.dtype, operator: Operator | None = None) -> Tensors:
        """p in one floating dtype, so that no method ever meets two it did not ask for."""
        wide = self.method.stays_wide()
        return Tensors(
            {k: t.to(dtype) if t.is_floating_point() and k not in wide else t for k, t in self.tensors().items()},
            self.shape,
            self.plan(),
            operator or self.operator,
            dtype,
            self.training,
            self.traits,
            self.seen,
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

    def __init__(self, layer: Any, states: Sequence[State], rows: Tensor | None = None):
        self.layer, self.states, self.rows = layer, states, rows  # rows: which of the batch it meets, where not all

    def __call__(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        layer, states = self.layer, self.states
        packing, weight = layer.packing, layer.weight
        if not states:
            return layer.base_forward(x) if packing.in_place else packing.product(x, weight, layer.bias)  # type: ignore[no-any-return]
        top = states[-1]
        # Token numbers have no dtype to compute in; the weight's is the layer's own.
        p = top.cast(x.dtype if x.is_floating_point() else layer.weight.dtype, layer.operator)
        if p.seen is not None and self.rows is not None:
            p.seen = p.seen.of_rows(self.rows)
        if len(states) == 1 and isinstance(top.method, Sparse):
            if not packing.in_place:
                return top.method.over(p, x, partial(packing.read, weight), packing.dtype(weight), layer.bias)
            if layer.leading.live is not None:
                return top.method.live(p, x, matrix(layer), bias(layer))
        return top.method.forward(p, x, Chain(layer, states[:-1], self.rows))

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of all that lies below, folded in ``dtype``."""
        layer, states = self.layer, self.states
        if not states:
            b = bias(layer)
            return base_weight(layer).to(dtype), None if b is None else b.to(dtype)
        top = states[-1]
        return top.method.fold(top.cast(dtype, layer.operator), *Chain(layer, states[:-1]).weights(dtype))


class OnChain:
    """What every layer with a chain has besides what its base class has. Mixed in by :func:`adapted`."""

    base_class: type[nn.Module]  # what it was before
    role: type  # which of the classes below is on top of that
    operator: Operator  # what it does with the weight
    packing: Packing  # how the weight is stored
    base_forward: Any

    @property
    def leading(self) -> Adapted:
        """The layer that holds the adapters: itself, or the one whose partner it is."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear
        leading = self.leading
        check_current(leading)
        if leading.rows is not None:
            return self._forward_rows(input)
        return Chain(self, [leading.adapters[name] for name in leading.active])(input)  # type: ignore[misc]

    def _forward_rows(self, x: Tensor) -> Tensor:
        leading = self.leading
        _check_rows(leading, x)
        assert leading.rows is not None
        y: Tensor | None = None
        for names, index in leading.rows:
            states = [leading.adapters[name] for name in names if name in leading.adapters]
            part = Chain(self, states, index)(x.index_select(0, index))  # type: ignore[arg-type]
            y = part.new_empty(x.shape[0], *part.shape[1:]) if y is None else y
            y = y.index_copy(0, index, part)
        assert y is not None
        return y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return revive, (self.base_class, self.role), self.__dict__


def _check_rows(leading: Any, x: Tensor) -> None:
    if x.shape[0] != leading.row_count:
        raise IntarsiaError(
            f"rows() was given {leading.row_count} adapters, and this layer meets {x.shape[0]} rows; "
            "per-row adapters need the batch as the first dimension in every adapted layer"
        )


class Owner:
    """A module that reads adapted parameters by itself. In its forward they stand for themselves, with a gradient that goes to
    the values of their live adapter: autograd makes the dense one of a whole parameter, one at a time, and only the
    support's part of it is kept."""

    base_class: type[nn.Module]

    def forward(self, *given: Any, **named: Any) -> Any:
        stacks = [layer for layer in self._modules.values() if isinstance(layer, Bare)]  # type: ignore[attr-defined]
        for layer in stacks:
            check_current(layer)
        try:
            for layer in stacks:
                # The instance's own attribute goes before the parameter, which __getattr__ would find.
                self.__dict__[layer.parameter_name] = _with_gradient(layer)
            return self.base_class.forward(self, *given, **named)
        finally:
            for layer in stacks:
                self.__dict__.pop(layer.parameter_name, None)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return revive, (self.base_class, Owner), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._rewrite()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        self._rewrite()
        return out

    def _rewrite(self) -> None:
        for layer in self._modules.values():  # type: ignore[attr-defined]
            if isinstance(layer, Bare) and layer.live is not None:
                layer.kept = layer.kept.to(layer.weight.device, layer.weight.dtype)
                write(layer)


def _with_gradient(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    if layer.live is None:
        return weight
    state = layer.adapters[layer.live]
    scale = state.method.scale_at(state.shape)
    return _Masked.apply(weight, state.values, state.index, layer.operator, state.granularity(), scale, state.shape)  # type: ignore[no-any-return, no-untyped-call]


class _Masked(torch.autograd.Function):
    """The parameter as it is; backward takes the support out of its dense gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, values: Tensor, index: Tensor, operator: Operator, unit: Any, scale: float, shape: Any
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.operator, ctx.unit, ctx.scale, ctx.shape, ctx.dtype = operator, unit, scale, shape, values.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        gv = ctx.operator.support_gradient(gy, gy, ctx.unit, index, (), ctx.shape)
        return None, gv.to(ctx.dtype) * ctx.scale, None, None, None, None, None


class Partner(OnChain):
    """A layer that shares the weight of an adapted one, and has no adapters of its own."""

    leader: tuple[Adapted]  # in a tuple, or it would be registered as a part of this layer

    @property
    def leading(self) -> Adapted:
        return self.leader[0]


class Adapted(OnChain):
    """A layer with adapters."""

    adapters: nn.ModuleDict  # every adapter at this layer, active or not
    active: tuple[str, ...]  # those that act, lowest first
    live: str | None  # the adapter whose values stand in the weight: active[0] or none
    rows: tuple[tuple[tuple[str, ...], Tensor], ...] | None  # per-row adapters: (adapters, row numbers)
    row_count: int
    kept: Tensor | None  # the base's bits at the support of the live adapter; of a shard: at its part of the support
    written: tuple[int, int]  # versions of (values, weight) when the weight was last written
    shard: Shard | None  # where the weight is one process's part of the whole
    partners: tuple[Any, ...]  # layers that share the weight

    @property
    def leading(self) -> Adapted:
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if not isinstance(self, Bare):  # whose owner may not be whole yet, and writes then
            write(self)  # a copy counts versions anew

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = f"{prefix}adapters.{self.live}.index"
        if self.live is not None and key in state_dict and not getattr(self.adapters, "takes_out_to_load", False):
            mine: Any = self.adapters[self.live].index
            if not torch.equal(state_dict[key].cpu(), mine.cpu()):
                # The kept bits would be put back at the new places, and nobody would know.
                raise IntarsiaError(
                    f"{key} is another support than that of the live adapter, whose values stand in the weight; "
                    "call intarsia.activate(model) first, or load with intarsia.load_adapter_state"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        if self.live is not None:
            assert self.kept is not None
            self.kept = self.kept.to(self.weight.device, self.weight.dtype)  # type: ignore[attr-defined]
            write(self)
        return out


class Decoding:
    """What a decoder has on top of its class, whoever puts something before its tokens."""

    base_class: type[nn.Module]
    takes: tuple[str, ...]  # names of what its forward is given, in order

    def run(self, operator: Any, rows: Rows, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """The base's forward of what was given in order and by name, with something before the tokens of some rows."""
        own = self.base_class.forward
        return run(self, operator, own, {**dict(zip(self.takes, given, strict=False)), **named}, rows)  # type: ignore[arg-type]


class AdaptedDecoder(Decoding, Adapted):
    """A decoder with adapters, which put something before its tokens. Its weight is that of its embedding, and stays as it is."""

    bias = None

    @property
    def weight(self) -> Tensor:
        """What the state's numbers are like, in type and place."""
        return self.get_input_embeddings().weight  # type: ignore[attr-defined, no-any-return]

    def forward(self, *given: Any, **named: Any) -> Any:
        if self.rows is not None:
            given, named = (), {**dict(zip(self.takes, given, strict=False)), **named}
            ids = named.get("input_ids")
            _check_rows(self, named["inputs_embeds"] if ids is None else ids)
        rows = ((self.active, None),) if self.rows is None else self.rows
        ahead = [(self._ahead([self.adapters[n] for n in names if n in self.adapters]), index) for names, index in rows]  # type: ignore[misc]
        return self.run(self.operator, ahead, given, named)

    def _ahead(self, states: Sequence[State]) -> tuple[Ahead, ...]:
        call = Call()
        for state in reversed(states):
            call = state.method.forward(state.cast(self.weight.dtype), call, _as_it_is)  # type: ignore[arg-type, assignment]
        return call.ahead


def _as_it_is(call: Any) -> Any:
    return call


@dataclass(frozen=True)
class Shard:
    """The rows of a weight that this process holds after ``fully_shard``, and the module that gathers them for a forward."""

    owner: Any  # an FSDPModule
    root: Any  # the outermost
    first: int
    count: int
    device: torch.device

    def part(self, layer: Any) -> Tensor:
        """This process's rows, as one flat view to read and write. The next forward gathers what stands there."""
        self.owner.reshard()  # or a weight that is still gathered would be used without what is written now
        if not processes.is_shard(layer.weight):
            self.root.reset_iter_state()  # FSDP believes that a forward goes on: an exception has ended it
        rows: Tensor = layer.weight.to_local()
        return rows.view(-1)

    def places(self, state: Any) -> tuple[Tensor, Tensor]:
        """(which entries of the support lie in these rows, their flat positions in the part)."""
        rows, columns = state.shape
        flat = state.granularity().flat(state.shape, state.index).reshape(-1)
        if state.operator.transposed:  # the weight is stored as (columns, rows)
            flat, columns = flat % columns * rows + flat // columns, rows
        flat = flat - self.first * columns
        mine = ((flat >= 0) & (flat < self.count * columns)).nonzero().squeeze(1)
        return mine, flat[mine].to(self.device)


def adapted(cls: type[nn.Module], role: type = Adapted) -> type[nn.Module]:
    """cls with a chain of adapters on top: a subclass, so the layer keeps its identity, its keys and isinstance(cls)."""
    if (role, cls) in _CLASSES:
        return _CLASSES[role, cls]

    def base_forward(self: Any, x: Tensor) -> Tensor:
        return cls.forward(self, x)  # type: ignore[no-any-return]

    own: dict[str, Any] = {"base_forward": base_forward, "base_class": cls, "role": role}
    if issubclass(role, Decoding):
        # transformers knows by the text of a class what of its models can be recorded (output_hidden_states).
        made_as: Any = cls
        own |= {"takes": takes(made_as), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    _CLASSES[role, cls] = type(f"{role.__name__}{cls.__name__}", (role, cls), own)
    return _CLASSES[role, cls]


def revive(cls: type[nn.Module], role: type) -> nn.Module:
    """A layer of the class that :func:`adapted` makes, without its attributes: what pickle and deepcopy begin with."""
    new = adapted(cls, role)
    layer: nn.Module = new.__new__(new)
    if issubclass(role, Adapted):
        _ADAPTED.add(layer)
    return layer


# ------------------------------------------------------------------ putting on and taking off
def put_on(layer: Any, name: str, state: State, partners: Sequence[tuple[Any, Operator]] = ()) -> None:
    """Add an adapter to a layer, inactive. Swaps the class of the layer and of its partners when it is the first."""
    if not isinstance(layer, Adapted):
        layer.__class__ = adapted(type(layer), AdaptedDecoder if state.operator.kind == DECODER else Adapted)
        layer.adapters, layer.operator = nn.ModuleDict(), state.operator
        layer.active, layer.live, layer.kept, layer.rows = (), None, None, None
        layer.row_count, layer.written, layer.shard = 0, (0, 0), None
        layer.partners = tuple(partner for partner, _ in partners)
        layer.packing = packing_of(layer.weight)
        for partner, operator in partners:
            partner.__class__ = adapted(type(partner), Partner)
            partner.leader, partner.operator, partner.packing = (layer,), operator, layer.packing
        _ADAPTED.add(layer)
        if isinstance(layer, Bare):
            owner = layer.__dict__["owner"][0]
            if not isinstance(owner, Owner):
                owner.__class__ = adapted(type(owner), Owner)
            owner._modules[layer.parameter_name] = layer
    layer.adapters[name] = state.train(layer.training)


def take_off(layer: Any, name: str) -> None:
    """Remove an inactive adapter from a layer. Gives the layer and its partners their own classes back when it was the last."""
    del layer.adapters[name]
    if not layer.adapters:
        _ADAPTED.discard(layer)
        for partner in layer.partners:
            del partner.leader, partner.operator, partner.packing
            partner.__class__ = partner.base_class
        own = ("active", "live", "kept", "rows", "row_count", "written", "shard", "operator", "packing", "partners")
        for attribute in own:
            delattr(layer, attribute)
        del layer.adapters
        layer.__class__ = layer.base_class
        if isinstance(layer, Bare):
            owner = layer.__dict__["owner"][0]
            del owner._modules[layer.parameter_name]
            if not any(isinstance(other, Bare) for other in owner._modules.values()):
                owner.__class__ = owner.base_class


def check_current(layer: Any) -> None:
    """Raise where a weight does not hold what its live adapter has learned."""
    if layer.live is not None and not torch.compiler.is_compiling() and not up_to_date(layer):
        raise IntarsiaError(
            f"the weight under the live adapter {layer.live!r} is out of date: its values or the weight were changed by "
            "something other than an optimizer step. Call intarsia.sync(model) after writing values by hand; "
            "activate(model) before changing base weights"
        )


def matrix(layer: Any) -> Tensor:
    """The weight that stands in an adapted layer now, as (O, I). A view."""
    return layer.operator.matrix(layer.weight)  # type: ignore[no-any-return]


def bias(layer: Any) -> Tensor | None:
    """The layer's bias; an embedding has none."""
    return getattr(layer, "bias", None)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


# ------------------------------------------------------------------ live weights
def set_active(layer: Any, names: Sequence[str], live: bool = True) -> None:
    """Make exactly these adapters act on the layer, lowest first; the lowest one live if it is sparse and the weight plain."""
    _take_out(layer)
    layer.active = tuple(name for name in names if name in layer.adapters)
    if layer.shard is not None and len(layer.active) > 1:
        live = False  # an adapter above may ask for the base's own weight, and each process keeps only its part's bits
    live = live or layer.operator.kind == STACK  # there is no other way there
    if live and layer.active and layer.packing.in_place and _is_there(layer.adapters[layer.active[0]]):
        _set_in(layer, layer.active[0])


def _is_there(state: State) -> bool:
    """Whether this is a sparse adapter with its numbers: on the meta device they are yet to be loaded."""
    return isinstance(state.method, Sparse) and not state.tensors()["values"].is_meta


def _set_in(layer: Any, name: str) -> None:
    state = layer.adapters[name]
    layer.kept = _read(layer, state)
    layer.live = name  # from here on the kept bits undo whatever is written
    write(layer)


def _take_out(layer: Any) -> None:
    if layer.live is None:
        return
    state = layer.adapters[layer.live]
    with torch.no_grad():
        _put(layer, state, layer.kept)
    layer.live = layer.kept = None


def _read(layer: Any, state: Any) -> Tensor:
    """The bits at the support now: a copy."""
    if layer.shard is not None:
        return layer.shard.part(layer).index_select(0, layer.shard.places(state)[1])  # type: ignore[no-any-return]
    return state.granularity().gather(matrix(layer).detach(), state.index)  # type: ignore[no-any-return]


def _put(layer: Any, state: Any, bits: Tensor) -> None:
    if layer.shard is not None:
        layer.shard.part(layer).index_copy_(0, layer.shard.places(state)[1], bits)
    else:
        state.granularity().put(matrix(layer), state.index, bits)


def write(layer: Any) -> None:
    """Write base + change of the live adapter into the weight, computed in float32 or wider and rounded once."""
    if layer.live is None:
        return
    state = layer.adapters[layer.live]
    with torch.no_grad():
        _put(layer, state, _live_bits(layer, state))
    layer.written = versions(layer)


def _live_bits(layer: Any, state: Any) -> Tensor:
    """What is to stand at the support."""
    change = state.method.change(state.raw())
    if layer.shard is not None:
        change = change.reshape(-1)[layer.shard.places(state)[0]].to(layer.kept.device)
    return (layer.kept.to(change.dtype) + change).to(layer.weight.dtype)  # type: ignore[no-any-return]


def up_to_date(layer: Any) -> bool:
    """Whether the weight holds the values of the live adapter. The bits are only looked at where a counter has moved."""
    if versions(layer) == layer.written:
        return True
    state = layer.adapters[layer.live]
    with torch.no_grad():  # DistributedDataParallel, for one, writes the bits that are there already
        if layer.shard is not None or not torch.equal(_read(layer, state), _live_bits(layer, state)):
            return False
    layer.written = versions(layer)
    return True


def versions(layer: Any) -> tuple[int, int]:
    """How often the values and the weight have been written in place, as autograd counts it."""
    values, weight = layer.adapters[layer.live].values, layer.weight
    if layer.shard is not None:  # gathered anew for every forward, so its counter says nothing
        return values._version, -1
    return tuple(-1 if t.is_inference() else t._version for t in (values, weight))  # type: ignore[return-value]


def base_weight(layer: Any) -> Tensor:
    """The base's own weight, (O, I): the layer's, or a copy with the kept bits put back where an adapter is live.

    Of a packed weight the numbers that it stands for.
    """
    packing = (
        layer.packing if isinstance(layer, OnChain) else packing_of(layer.weight)
    )  # Dynamo cannot trace the latter
    if not packing.in_place:
        return packing.read(layer.weight, packing.dtype(layer.weight))
    if not isinstance(layer, OnChain):
        operator = operator_for(layer)
        assert isinstance(operator, Operator)
        return operator.matrix(weight_of(layer))
    weight, leading = matrix(layer), layer.leading
    if leading.live is None:
        return weight
    assert leading.kept is not None
    state: Any = leading.adapters[leading.live]
    weight = weight.detach().clone()
    state.granularity().put(weight, state.index, leading.kept)
    return weight


@contextmanager
def as_base(layers: Sequence[Any], name: str) -> Iterator[None]:
    """Within the block, what a live adapter has written into the weights counts as the base, so that a dense gradient can be
    taken of it. Nothing is written."""
    before = [(layer, layer.active, layer.live) for layer in layers]
    try:
        for layer, active, _ in before:
            layer.active, layer.live = tuple(each for each in active if each != name), None
        yield
    finally:
        for layer, active, live in before:
            layer.active, layer.live = active, live


def _stepping(rates: Mapping[int, Any], hook: str) -> Iterator[tuple[State, float]]:
    """The states that take part in a step and whose methods have this hook, each with its learning rate."""
    for layer in list(_ADAPTED):
        states: Any = layer.adapters
        for state in states.values():
            if getattr(type(state.method), hook) is getattr(Method, hook):
                continue
            moved = [p for p in state.parameters() if id(p) in rates and p.grad is not None]
            if moved:
                yield state, float(rates[id(moved[0])])


def _rates(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """The learning rate of each parameter that an optimizer moves, a number or a tensor, by the parameter's id."""
    return {id(p): group.get("lr", 0.0) for group in optimizer.param_groups for p in group["params"]}


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = _rates(optimizer)
    seen: set[int] = set()
    for state, _lr in _stepping(stepped, "penalty"):
        _add_penalty(state, seen)
    for state, _lr in _stepping(stepped, "before_step"):
        with torch.no_grad():
            state.method.before_step(state.raw())
    for layer in list(_ADAPTED):
        states: Any = layer.adapters
        for state in states.values():
            for name in state.method.carriers():
                if id(getattr(state, name)) in stepped:
                    getattr(state, name).grad = None  # it was read, and no optimizer may move it


def _add_penalty(state: State, seen: set[int]) -> None:
    """Add the gradient of the method's penalty to those of the state; to a tensor that several states share, for the first one."""
    with torch.enable_grad():
        penalty = state.method.penalty(state.raw())
    wanted = [p for p in state.parameters() if p.grad is not None and p.requires_grad and id(p) not in seen]
    seen.update(map(id, wanted))
    if penalty is None or not penalty.requires_grad or not wanted:
        return
    for parameter, gradient in zip(wanted, torch.autograd.grad(penalty, wanted, allow_unused=True), strict=True):
        if gradient is not None:
            assert parameter.grad is not None
            parameter.grad.add_(gradient)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # Some optimizers write through parameter.data, which no version counter sees.
    stepped = _rates(optimizer)
    for state, lr in _stepping(stepped, "after_step"):
        with torch.no_grad():
            state.method.after_step(state.raw(), lr)
    layers: list[Any] = list(_ADAPTED)
    for layer in layers:
        if layer.live is None:
            continue
        if id(layer.adapters[layer.live].values) in stepped or versions(layer) != layer.written:
            write(layer)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


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
