"""A model with adapters: attach, activate, detach, per-row adapters, save, load.

Everything is checked before anything is changed; whatever fails, the model is as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import chain, disjoint, families, processes, registry, store
from intarsia.bases import LOAD_IN, differentiable, keep_bits, packing_of
from intarsia.calibrate import GATHERED, OF_BACKWARD, ON_CPU, Loss, Mapped, Progress, gather
from intarsia.edits import Seen
from intarsia.errors import IntarsiaError, nearest
from intarsia.method import Method, Start
from intarsia.operators import PLAIN, STACK
from intarsia.site import (
    ALL_LINEAR,
    Site,
    adaptable_layers,
    editable,
    every_layer,
    find_sites,
    layer_at,
    layer_of,
    operator_at,
    partners,
    site_at,
    unfit,
    weight_name,
    weight_of,
)


@dataclass(frozen=True)
class Attached:
    """One adapter of a model: how it was attached."""

    method: Method
    targets: tuple[str, ...]
    exclude: tuple[str, ...]
    seed: int
    avoid: tuple[tuple[str, str], ...] = ()  # name and digest of each adapter whose entries it leaves alone


@dataclass
class _Record:
    """What is kept on a model while it has adapters."""

    adapters: dict[str, Attached]
    required_grad: dict[str, bool]  # of the base's parameters, to be given back
    ddp_ignored: list[str] | None  # what DistributedDataParallel was to leave alone before
    active: tuple[str, ...] = ()  # in order; a layer knows only those that it has
    seen: dict[str, Seen] = field(default_factory=dict)  # of adapters that ask for the model's tokens
    avoided: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by adapter and site; none of a loaded one


_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # torch's name for names that DistributedDataParallel leaves alone


# Who has set what into a model. Weak on both sides: neither a model nor a deck is kept alive by the other one's entry.
_OCCUPIED: weakref.WeakKeyDictionary[nn.Module, tuple[str, weakref.ref[object], str]] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    method: Method,
    targets: str | Iterable[str] = ALL_LINEAR,
    *,
    name: str = "default",
    exclude: str | Iterable[str] = (),
    avoid: disjoint.Avoid = (),
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    gathered: Mapping[str, Mapping[str, Tensor]] | None = None,
    original: nn.Module | Mapping[str, Tensor] | None = None,
) -> None:
    """Freeze the base, put one adapter on every targeted layer, and make it the only active one. In place.

    Args:
        targets: see :mod:`intarsia.site`; every pattern must match something. The default is ``method.default_targets``.
        avoid: adapters of this base (folders, or :class:`intarsia.Adapter`) whose entries this one leaves alone, so that
            fusing them keeps the values of each to the bit. For methods that choose a support.
        data: calibration batches for methods that choose by gradients or inputs (``method.needs()``): mappings of the
            model's inputs, with labels where gradients are needed, or whatever ``loss(model, batch)`` takes.
        seed: with the layer's name, all that random choices depend on.
        progress: called with (done, all, what) during long work.
        gathered: what the method needs of data, where it is known already: tensors by site and need, shaped as the weights.
        original: for methods that repair a compressed base: the model before it was compressed, or its weights (O, I) by site.

    Raises:
        IntarsiaError: for targets that match nothing, a weight that cannot be adapted, a method that does not fit,
            missing calibration data, a name that is taken; for an adapter to avoid that is of another base or leaves too
            little. The model is untouched then.
    """
    if not isinstance(method, Method):
        raise IntarsiaError(f"method is {method!r}; expected a method such as intarsia.Shira(density=0.01)")
    _free(model)
    _check_name(model, name)
    targets, exclude = _patterns(targets), _patterns(exclude)
    targeted = find_sites(model, targets, exclude, method.default_targets)
    others = _to_avoid(model, method, avoid)
    if "movement" in method.needs() and gathered is None:
        raise IntarsiaError(
            f"{method.name} chooses by movement, which a first training makes: call intarsia.lottery instead"
        )
    wanted = method.needs() & GATHERED
    if wanted and data is None and gathered is None:
        raise IntarsiaError(
            f"{method.name} chooses by {', '.join(sorted({'observed': 'inputs'}.get(n, n) for n in wanted))} and needs calibration data: pass data=[batch, ...]"
            f"{' with labels' if wanted & OF_BACKWARD else ''}"
        )
    keep_bits(model)
    with _base_bits(model):
        sites = _beside(model, others, _taken(model, method, targeted))
        _planned(method, sites, seed)
        before = _originals(method, sites, original)
        states = _start(model, method, sites, data, loss, seed, progress, gathered, before)
    avoided = {name: site.avoid for name, site in sites.items() if site.avoid is not None}
    attached = Attached(method, targets, exclude, seed, tuple((other.name, other.digest) for other in others))
    _put_on(model, name, attached, states, avoided)


def _to_avoid(model: nn.Module, method: Method, avoid: disjoint.Avoid) -> list[store.Adapter]:
    """The adapters to avoid, which are of this base."""
    found = disjoint.adapters_to_avoid(avoid, method)
    base = digest(model) if found else None
    for adapter in found:
        check_fits(model, adapter, f"{adapter.name}, which is to be avoided,", base, "leave it out of avoid")
    return found


def _beside(model: nn.Module, others: Sequence[store.Adapter], sites: Mapping[str, Site]) -> Mapping[str, Site]:
    return disjoint.beside(others, sites, {name: weight_name(model, name) for name in sites}) if others else sites


def _raise(faults: list[str]) -> None:
    if faults:
        raise IntarsiaError("\n".join(faults[:8] + ([f"... and {len(faults) - 8} more"] if len(faults) > 8 else [])))


def _misplaced(method: Method, site: Site) -> str | None:
    """Why a method cannot sit at a site of this kind, or None."""
    kinds = {site.operator.kind} | ({"tied"} if site.tied else set())
    for kind in sorted(kinds - method.sits_at()):
        what = f"shares its weight with {', '.join(site.tied)}" if kind == "tied" else f"is of the kind {kind}"
        able = ", ".join(name for name, cls in registry.methods().items() if kind in cls.kinds)
        why = (
            ""
            if kind not in method.kinds
            else " as it is set: the norms of inputs, and roles, are known for linear layers only"
        )
        return f"{site.name} {what}, where {method.name} cannot sit{why}; exclude it, or take another method ({able})"
    return None


def plan(
    model: nn.Module,
    method: Method,
    targets: str | Iterable[str] = ALL_LINEAR,
    exclude: str | Iterable[str] = (),
    avoid: disjoint.Avoid = (),
) -> dict[str, int]:
    """What :func:`attach` would train: numbers by the name of each layer that would get an adapter. Changes nothing.

    Where the shares are of the whole model and chosen by score or chance, the number of units is exact and the parts are a plan. What
    layers share counts at the first of them.

    Raises:
        IntarsiaError: for targets that match nothing, or of which the method takes none, or that it does not fit; for an
            adapter to avoid that is of another base or leaves too little.
    """
    others = _to_avoid(model, method, avoid)
    sites = _beside(model, others, _taken(model, method, find_sites(model, targets, exclude, method.default_targets)))
    found, shared = {}, set()
    for name, here in _planned(method, sites, 0).items():
        shape = sites[name].shape
        found[name] = here.trained_count(shape) + (0 if shape in shared else here.shared_count(shape))
        shared.add(shape)
    return found


def _planned(method: Method, sites: Mapping[str, Site], seed: int) -> dict[str, Method]:
    """The method as it would be at each site. Raises one IntarsiaError where it does not fit."""
    found = {name: here for name, (here, _) in method.settle(sites, None, seed).items()}
    _raise([fault for name, here in found.items() if (fault := here.check(sites[name]))])
    return found


def _taken(model: nn.Module, method: Method, targeted: Mapping[str, Site]) -> Mapping[str, Site]:
    """The sites that the method takes, with their roles where it asks for them."""
    _raise([fault for site in targeted.values() if (fault := _misplaced(method, site))])
    layout = method.roles_from()
    roles = families.roles(families.blocks(model, layout)) if layout else {}
    return method.takes({name: replace(site, roles=roles.get(name, ())) for name, site in targeted.items()})


def _originals(
    method: Method, sites: Mapping[str, Site], original: nn.Module | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The weights before the base was compressed, (O, I), where the method asks for them."""
    if "original" not in method.needs():
        return {}
    if original is None:
        raise IntarsiaError(
            f"{method.name} computes from what the compression of the base changed: pass original=the model before it, or its "
            "weights by site"
        )
    found, faults = {}, []
    there = adaptable_layers(original) if isinstance(original, nn.Module) else original
    for name, site in sites.items():
        if name not in there:
            faults.append(f"{name}: original has no such weight; {nearest(name, there)}")
            continue
        W = site_at(original, name).weight if isinstance(original, nn.Module) else original[name]
        if tuple(W.shape) != tuple(site.shape) or not W.is_floating_point():
            faults.append(f"{name}: original has {tuple(W.shape)} of {W.dtype}; expected {tuple(site.shape)} of floats")
        found[name] = W.detach()
    _raise(faults)
    return found


def _start(
    model: nn.Module,
    method: Method,
    sites: Mapping[str, Site],
    data: Iterable[Any] | None,
    loss: Loss | None,
    seed: int,
    progress: Progress | None,
    gathered: Mapping[str, Mapping[str, Tensor]] | None = None,
    originals: Mapping[str, Tensor] | None = None,
) -> dict[str, chain.State]:
    states: dict[str, chain.State] = {}

    def starting(name: str, found: Mapping[str, Any]) -> Start:
        rows, columns = sites[name].shape
        return Start.at(name, seed, common=Start.at(f"shape {rows} x {columns}", seed).key, **found)

    def make(name: str, here: Method, found: Mapping[str, Any]) -> None:
        site = sites[name]
        with torch.no_grad():
            states[name] = chain.State(here, site, here.init(site, starting(name, found)))
            if site.avoid is not None:
                disjoint.require_disjoint(name, here.edit(states[name].raw()), site.avoid)
        if progress:
            progress(len(states), len(sites), "attaching")

    def use(name: str, found: Mapping[str, Any]) -> None:
        operator = sites[name].operator
        as_it_is = ON_CPU | {"observed"}
        found = {n: t if n in as_it_is or t.ndim < 2 else operator.matrix(t) for n, t in found.items()}
        if originals:
            found["original"] = originals[name].to(sites[name].weight.device)
        if method.chooses_together():
            surveys.set(name, method.survey(sites[name], starting(name, found)))
        else:
            make(name, method, found)

    with Mapped() as surveys:
        wanted = method.needs() & GATHERED
        if wanted and gathered is None:
            observers = {name: method.observer(site) for name, site in sites.items()} if "observed" in wanted else None
            with differentiable({name: layer_at(model, name) for name in sites}) as weights:
                gather(model, weights, wanted, data or (), use, loss, progress, observers, method.confer)
        else:
            for name in sites:
                use(name, gathered[name] if gathered else {})
        if method.chooses_together():
            for name, (here, found) in method.settle(sites, surveys.tensors, seed).items():
                make(name, here, found)
    found = {name: states[name] for name in sites if name in states}
    _tie(found)
    return found


def _tie(states: Mapping[str, chain.State]) -> None:
    """Make the tensors that sites of one shape share one parameter. Raises IntarsiaError where their numbers differ."""
    first: dict[tuple[Any, ...], tuple[str, nn.Parameter]] = {}
    for site, state in states.items():
        for name in sorted(state.method.shares()):
            mine = state.get_parameter(name)
            other, one = first.setdefault((name, state.shape, mine.dtype, mine.device), (site, mine))
            if one.shape != mine.shape or not torch.equal(one, mine):
                raise IntarsiaError(f"{name} of {site} is to be that of {other}, and has other numbers")
            setattr(state, name, one)


def _put_on(
    model: nn.Module,
    name: str,
    attached: Attached,
    states: Mapping[str, chain.State],
    avoided: Mapping[str, Tensor] | None = None,
) -> None:
    """The step that changes the model; all that can be wrong has been checked before."""
    fresh = not hasattr(model, "_intarsia")
    active = active_names(model)
    try:
        if fresh:
            flags = {n: p.requires_grad for n, p in model.named_parameters()}
            model._intarsia = _Record({}, flags, getattr(model, _DDP_IGNORES, None))  # type: ignore[assignment]
            model.requires_grad_(False)
        record(model).adapters[name] = attached
        if avoided is not None:
            record(model).avoided[name] = dict(avoided)
        if attached.method.watches:
            seen = record(model).seen[name] = Seen()
            seen.watch(model)
            for state in states.values():
                state.seen = seen
        shared = {site: partners(model, site).items() for site in states}
        for site, state in states.items():
            with_it = [(model.get_submodule(other), operator) for other, operator in shared[site]]
            chain.put_on(layer_at(model, site), name, state, with_it)
        _tell_ddp(model)
        activate(model, name)
    except BaseException:
        if name in record(model).adapters:
            for layer in chain.adapted_layers(model).values():
                chain.set_active(layer, [a for a in active if a != name])
            record(model).active = tuple(active)
            _remove(model, name)
        elif fresh:
            _give_back(model)
        raise


def activate(model: nn.Module, *names: str) -> None:
    """Make exactly these adapters act, in this order from the base upwards; none: the base, to the bit.

    Their tensors become trainable, those of the others frozen. A sparse adapter in the lowest place is set into the base
    weights (live).

    Raises:
        IntarsiaError: for an unknown or repeated name, and for a method that computes from the weight below it (DoRA) above one that
            folds into none (a bottleneck); nothing is changed then.
    """
    if not names and not hasattr(model, "_intarsia"):
        return
    attached = record(model).adapters
    for name in names:
        if name not in attached:
            raise IntarsiaError(f"no adapter {name!r} on this model; {nearest(name, attached)}")
    if len(set(names)) < len(names):
        raise IntarsiaError(f"an adapter is named twice: {', '.join(names)}")
    if names:
        check_unoccupied(model)
    layers = list(chain.adapted_layers(model).values())
    stacks = [n for n, layer in chain.adapted_layers(model).items() if layer.operator.kind == STACK]
    for stack in stacks:
        acting = [n for n in names if n in layer_at(model, stack).adapters]
        if len(acting) > 1:
            raise IntarsiaError(
                f"{stack} is a parameter that its module reads itself, so one adapter can act on it, not {', '.join(acting)}"
            )
    _check_stack(model, names)
    if any(layer.rows is not None for layer in layers):
        raise IntarsiaError("rows() is in force; leave its block before activating other adapters")
    with chain.transaction(layers):
        for layer in layers:
            chain.set_active(layer, names)
    record(model).active = names
    for layer in layers:
        for name, state in layer.adapters.items():
            state.requires_grad_(name in names)


def _check_stack(model: nn.Module, names: Sequence[str]) -> None:
    """Raise where a method asks for the weight of all that lies below, and something there folds into none."""
    methods = {name: record(model).adapters[name].method for name in names}
    for number, name in enumerate(names):
        below = [other for other in names[:number] if not methods[other].mergeable]
        together = [other for other in below if states(model, other).keys() & states(model, name).keys()]
        if methods[name].reads_weights_below and together:
            raise IntarsiaError(
                f"{name} ({methods[name].name}) computes from the weight below it, and {together[0]} ({methods[together[0]].name}) folds "
                f"into no weight; activate {name} below {together[0]}, or alone"
            )


def detach(model: nn.Module, name: str) -> None:
    """Remove an adapter without a trace. With the last one, classes and ``requires_grad`` are the base's again.

    Raises:
        IntarsiaError: for an unknown name.
    """
    if name not in record(model).adapters:
        raise IntarsiaError(f"no adapter {name!r} on this model; {nearest(name, record(model).adapters)}")
    activate(model, *(a for a in active_names(model) if a != name))
    _remove(model, name)


def _remove(model: nn.Module, name: str) -> None:
    for layer in chain.adapted_layers(model).values():
        if name in layer.adapters:
            chain.take_off(layer, name)
    del record(model).adapters[name]
    record(model).avoided.pop(name, None)
    if name in record(model).seen:
        record(model).seen.pop(name).leave(model)
    _tell_ddp(model)
    if not record(model).adapters:
        _give_back(model)


def _tell_ddp(model: nn.Module) -> None:
    """Keep DistributedDataParallel from sending the supports, which never change, around before every forward."""
    layers = chain.adapted_layers(model)
    names = [f"{site}.adapters.{k}" for site, layer in layers.items() for k, _ in layer.adapters.named_buffers()]
    setattr(model, _DDP_IGNORES, [*(record(model).ddp_ignored or ()), *names])


def _give_back(model: nn.Module) -> None:
    flags = record(model).required_grad
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    ignored = record(model).ddp_ignored
    if ignored is not None:
        setattr(model, _DDP_IGNORES, ignored)
    elif hasattr(model, _DDP_IGNORES):
        delattr(model, _DDP_IGNORES)
    del model._intarsia


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, row i of every batch is computed with the adapter ``names[i]`` alone, or with the base for None.

    Each row equals that row alone, forward and gradients; keep the backward pass inside the block too. The batch must be the
    first dimension in every adapted layer.

    Raises:
        IntarsiaError: for an unknown name, or when a layer meets another number of rows.
    """
    attached = record(model).adapters
    for name in names:
        if name is not None and name not in attached:
            raise IntarsiaError(f"no adapter {name!r} on this model; {nearest(name, attached)}")
    check_unoccupied(model)
    layers = chain.adapted_layers(model)
    if stacks := [n for n, layer in layers.items() if layer.operator.kind == STACK]:
        raise IntarsiaError(
            f"{stacks[0]} is a parameter that its module reads itself, so it cannot differ from row to row"
        )
    active = active_names(model)
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    activate(model)
    try:
        for layer in layers.values():
            device = layer.weight.device
            layer.rows = tuple((() if n is None else (n,), torch.tensor(r, device=device)) for n, r in groups.items())
            layer.row_count = len(names)
            for name, state in layer.adapters.items():
                state.requires_grad_(name in groups)
        yield
    finally:
        for layer in layers.values():
            layer.rows, layer.row_count = None, 0
        activate(model, *active)


def sync(model: nn.Module) -> None:
    """Write the values of live adapters into the weights, after they were changed by hand. Optimizers do it by themselves."""
    for layer in chain.adapted_layers(model).values():
        chain.write(layer)


# ------------------------------------------------------------------ looking
def record(model: nn.Module) -> _Record:
    """What is attached. Raises IntarsiaError for a model without adapters."""
    found: _Record | None = getattr(model, "_intarsia", None)
    if found is None:
        raise IntarsiaError(
            f"no adapter is attached to this {type(model).__name__}; call intarsia.attach or intarsia.load first"
        )
    return found


def attached_names(model: nn.Module) -> list[str]:
    """Names of all adapters on the model, in the order of attaching."""
    return list(record(model).adapters) if hasattr(model, "_intarsia") else []


def active_names(model: nn.Module) -> list[str]:
    """Names of the adapters that act, lowest first."""
    return list(record(model).active) if "_intarsia" in vars(model) else []


def states(model: nn.Module, name: str) -> dict[str, chain.State]:
    """The state of an adapter at each of its sites."""
    if name not in record(model).adapters:
        raise IntarsiaError(f"no adapter {name!r} on this model; {nearest(name, record(model).adapters)}")
    return {site: layer.adapters[name] for site, layer in chain.adapted_layers(model).items() if name in layer.adapters}


def digest(model: nn.Module) -> str:
    """SHA-256 over all weights of the base, as hex: adapters on the model, live ones too, do not count."""
    # By layer, not by the word: a base may have modules of its own that are called adapters.
    ours = tuple(f"{name}.adapters.".lstrip(".") for name in chain.adapted_layers(model))
    keep_bits(model)
    with _base_bits(model):
        named = ((k, t) for k, t in model.state_dict().items() if not k.startswith(ours))
        return store.weights_digest((k + rest, t) for k, w in named for rest, t in packing_of(w).stored(w).items())


def _by_name(model: nn.Module, name: str) -> dict[tuple[str, str], tuple[str, Tensor]]:
    """Every tensor of an adapter by (site, name): under which name it is saved, which is the first site's where several share it."""
    first: dict[int, str] = {}
    return {
        (site, k): (first.setdefault(id(t), f"{site}/{k}"), t)
        for site, state in states(model, name).items()
        for k, t in state.tensors().items()
    }


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every tensor of an adapter, supports included, by ``<site>/<tensor>``, one that sites share once; for training checkpoints."""
    return {key: tensor.detach() for key, tensor in _by_name(model, name).values()}


def load_adapter_state(model: nn.Module, name: str, saved: Mapping[str, Tensor]) -> None:
    """Give an adapter the tensors of :func:`adapter_state`. All or nothing.

    Raises:
        IntarsiaError: listing every missing, extra or misshapen tensor.
    """
    wanted = dict(_by_name(model, name).values())
    faults = [f"missing {k}" for k in sorted(wanted.keys() - saved.keys())]
    faults += [f"unexpected {k}" for k in sorted(saved.keys() - wanted.keys())]
    faults += [
        f"{k}: given {tuple(saved[k].shape)} {saved[k].dtype}, the model has {tuple(t.shape)} {t.dtype}"
        for k, t in wanted.items()
        if k in saved and (saved[k].shape != t.shape or saved[k].dtype != t.dtype)
    ]
    if faults:
        raise IntarsiaError(f"this state does not fit the adapter {name!r}:\n  " + "\n  ".join(faults[:10]))
    _check_numbers(model, name, saved)
    active = active_names(model)
    activate(model)  # the support may change, so nothing may be live while it does
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(saved[key])
        for state in states(model, name).values():
            state.replan()
    activate(model, *active)


def _check_numbers(model: nn.Module, name: str, saved: Mapping[str, Tensor]) -> None:
    """Raise for indices out of range and numbers that are not finite, by building the edits that the state would make."""
    called = _by_name(model, name)
    for site, state in states(model, name).items():
        given = {k: saved[called[site, k][0]] for k in state.tensors()}
        p = chain.Tensors(given, state.shape, operator=state.operator)
        edit = state.method.edit(p)
        try:
            edit.made_of(edit.tensors())
            disjoint.require_disjoint(site, edit, record(model).avoided.get(name, {}).get(site))
        except IntarsiaError as error:
            raise IntarsiaError(f"this state does not fit the adapter {name!r}:\n  {site}: {error}") from error


# ------------------------------------------------------------------ saving and loading
def export(
    model: nn.Module, name: str | None = None, *, called: str = "", note: Mapping[str, Any] | None = None
) -> store.Adapter:
    """The adapter as edits with its metadata: what :func:`save` writes and a deck holds."""
    check_unoccupied(model)  # or it would be said to belong to a base that nobody has
    name = _only(model) if name is None else name
    attached = record(model).adapters.get(name)
    edits = {}
    for site, state in states(model, name).items():
        edits[weight_name(model, site)] = state.method.edit(state.raw())
        if chain.bias(layer_at(model, site)) is not None and (edit := state.method.bias_edit(state.raw())) is not None:
            edits[f"{site}.bias"] = edit
    assert attached is not None
    about: dict[str, Any] = {
        "targets": list(attached.targets),
        "exclude": list(attached.exclude),
        "seed": attached.seed,
    }
    if attached.avoid:
        about["avoid"] = [{"name": other, "digest": sha256} for other, sha256 in attached.avoid]
    base, layouts = base_of(model, edits)
    return store.Adapter(called or name, edits, base, attached.method.config(), about | layouts, note or {})


def base_of(model: nn.Module, weights: Iterable[str]) -> tuple[store.Base, dict[str, Any]]:
    """What an adapter's file says of its base and of how the weights, named as in the model, are stored there."""
    weights = list(weights)
    layouts = {weight: operator_at(model, weight).layout for weight in weights}
    otherwise = {weight: layout for weight, layout in layouts.items() if layout != PLAIN}
    base = store.Base(digest(model), _dtype(model, weights), _source(model))
    return base, {"layouts": otherwise} if otherwise else {}


def save(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    note: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    coding: str = "compact",
    values: str | None = None,
) -> Path:
    """Write an adapter's folder, whole or not at all; the base is not in it. -> the folder.

    Of a sharded model every process calls this, and the first one writes.

    Args:
        name: which adapter, where the model has several.
        note: remarks for its card, such as losses.
        coding: ``compact``, or ``plain`` for programs that read the tensors as they are; both are exact.
        values: ``bfloat16`` or ``float16`` to round what was learned once; None keeps every bit.

    Raises:
        IntarsiaError: when the folder exists, cannot be written, or the adapter holds numbers that are not finite.
    """
    adapter = export(model, name, called=Path(folder).name, note=note)

    def write() -> Path:
        return store.write(adapter, folder, overwrite, coding=coding, values=values)

    return processes.first_does(write) if processes.is_sharded(model) else write()


def load(model: nn.Module, folder: str | Path, name: str | None = None, *, any_base: bool = False) -> str:
    """Attach a saved adapter, trainable as it was, and make it the only active one. -> its name (the folder's by default).

    Raises:
        IntarsiaError: for a folder that is not whole, another base (``any_base=True`` takes that risk), a method that is not
            installed, weights that the model lacks or that have other shapes. The model is untouched then.
    """
    adapter = store.read(folder)
    name = Path(folder).name if name is None else name
    _free(model)
    _check_name(model, name)
    attached = _made(adapter, str(folder))
    method = attached.method
    check_fits(model, adapter, str(folder), None if any_base else digest(model))
    names = [n for n in every_layer(model) if weight_name(model, n) in adapter.edits]
    with _base_bits(model):
        sites = {n: site_at(model, n) for n in names}
        made = {}
        for n, site in sites.items():
            edit = adapter.edits[weight_name(model, n)].to(site.stored.device)
            with torch.no_grad():
                here = method.at(edit, site)
                made[n] = chain.State(here, site, here.restore(edit, site))
        _tie(made)
    _put_on(model, name, attached, made)
    return name


def _made(adapter: store.Adapter, where: str) -> Attached:
    """How a saved adapter was attached."""
    if adapter.method.get("name") == store.MERGE:
        made_of = ", ".join(adapter.made_of) or "others"
        raise IntarsiaError(
            f"{where} was merged of {made_of}, and nothing trains on from a merge. Set it into the weights: "
            f"intarsia.Deck(model).add({where!r}); or load one of those that it was made of"
        )
    method, about = registry.build(adapter.method), adapter.about
    targets, exclude, seed = about.get("targets", []), about.get("exclude", []), about.get("seed", 0)
    names = all(
        isinstance(group, list | tuple) and all(isinstance(n, str) for n in group) for group in (targets, exclude)
    )
    avoid = about.get("avoid", [])
    known = isinstance(avoid, list | tuple) and all(
        isinstance(other, Mapping) and isinstance(other.get("name"), str) and isinstance(other.get("digest"), str)
        for other in avoid
    )
    if not names or not known or not isinstance(seed, int):
        raise IntarsiaError(f"{where}: what it says of its making is damaged: {dict(about)}")
    avoided = tuple((other["name"], other["digest"]) for other in avoid)
    return Attached(method, tuple(targets), tuple(exclude), seed, avoided)


def check_fits(
    model: nn.Module,
    adapter: store.Adapter,
    where: str,
    base_digest: str | None,
    otherwise: str = "pass any_base=True to use it all the same",
) -> None:
    """Raise one IntarsiaError with everything that keeps the adapter from sitting on this model.

    ``otherwise``: what to do about another base, besides loading that one."""
    weights = editable(model)
    layouts = adapter.about.get("layouts", {})
    faults = []
    for name, edit in adapter.outlines.items():
        operator = weights.get(name)
        if operator is None:
            faults.append(f"{name}: the model has no such weight that can be adapted; {nearest(name, weights)}")
        elif isinstance(operator, str):
            faults.append(f"{name}: {operator}")
        elif (found := _shape_at(model, name)) != tuple(edit.shape):
            faults.append(f"{name}: the adapter edits {tuple(edit.shape)}, the model has {found}")
        elif wrong := [insert for _, insert in edit.inserts() if operator.kind not in insert.sits_at]:
            faults.append(
                f"{name}: an insert ({wrong[0].inserted.what}) acts at layers of the kind {', '.join(wrong[0].sits_at)}; this one is of "
                f"the kind {operator.kind}"
            )
        elif (said := layouts.get(name, PLAIN) if isinstance(layouts, Mapping) else "?") != operator.layout:
            faults.append(f"{name}: the adapter edits a weight stored {said}, the model stores it {operator.layout}")
    if not adapter.edits:
        faults.append("it edits nothing")
    if not faults:
        faults = unfit(model, dict.fromkeys(map(layer_of, adapter.edits)))
    if faults:
        more = [f"... and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise IntarsiaError(f"{where} does not fit this model:\n  " + "\n  ".join(faults[:8] + more))
    if base_digest is not None and base_digest != adapter.base.digest:
        dtype = _dtype(model, adapter.edits)
        why = (
            f"it was made on {adapter.base.dtype}, this model is {dtype}"
            if dtype != adapter.base.dtype
            else "its weights differ"
        )
        so = f" with load_in={adapter.base.dtype!r}" if adapter.base.dtype in LOAD_IN else ""
        raise IntarsiaError(
            f"{where} belongs to another base ({why}): made on {adapter.base.source or 'a model'} with digest "
            f"{adapter.base.digest[:12]}, this model has {base_digest[:12]}. Load that base{so}, or {otherwise}"
        )


def _shape_at(model: nn.Module, parameter: str) -> tuple[int, int]:
    """(O, I) of a weight, (O, 1) of a bias; without unpacking anything."""
    site = site_at(model, layer_of(parameter))
    return (site.shape[0], 1) if parameter.endswith(".bias") else site.shape


# ------------------------------------------------------------------ who may write the weights
def occupy(model: nn.Module, by: str | None, owner: object, how: str = "by a deck; call its off() first") -> None:
    """Note what ``owner`` (a deck) has set into the weights, and how it is taken out; None: they are the base's again."""
    if by is None:
        _OCCUPIED.pop(model, None)
    else:
        _OCCUPIED[model] = (by, weakref.ref(owner), how)


def check_unoccupied(model: nn.Module, owner: object = None) -> None:
    """Raise IntarsiaError where something other than an adapter here, and other than ``owner``, is set into the weights."""
    if model not in _OCCUPIED:
        return
    by, reference, how = _OCCUPIED[model]
    found = reference()
    if found is None:
        raise IntarsiaError(
            f"{by} is set into this model by a deck that is gone, and the base's bits with it; load the base again"
        )
    if found is not owner:
        raise IntarsiaError(f"{by} is set into this model {how}")


def _free(model: nn.Module) -> None:
    check_unoccupied(model)
    if any(layer.rows is not None for layer in chain.adapted_layers(model).values()):
        raise IntarsiaError("rows() is in force on this model; leave its block first")


@contextmanager
def _base_bits(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base; afterwards the same adapters are active again, to the bit."""
    before = [
        (layer, layer.active, layer.live is not None) for layer in chain.adapted_layers(model).values() if layer.active
    ]
    try:
        for layer, _, _ in before:
            chain.set_active(layer, ())
        yield
    finally:
        chain.give_back(before)


def _check_name(model: nn.Module, name: str) -> None:
    if not name or "." in name or "/" in name:
        raise IntarsiaError(
            f"an adapter cannot be named {name!r}: a name is not empty and has no dot or slash; pass name=..."
        )
    if hasattr(nn.ModuleDict(), name):
        raise IntarsiaError(f"an adapter cannot be named {name!r}: torch needs that word for itself; pass name=...")
    if name in attached_names(model):
        raise IntarsiaError(f"an adapter named {name!r} is attached already; detach it or pass another name=...")
    taken = [
        n for n, m in adaptable_layers(model).items() if hasattr(m, "adapters") and not isinstance(m, chain.Adapted)
    ]
    if taken:
        raise IntarsiaError(
            f"{taken[0]} has an attribute 'adapters' already; another adapter library holds this model. Unload it first"
        )


def _patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _only(model: nn.Module) -> str:
    names = attached_names(model)
    if len(names) != 1:
        record(model)
        raise IntarsiaError(f"the model has {len(names)} adapters ({', '.join(names)}); say which: name=...")
    return names[0]


def _dtype(model: nn.Module, weights: Iterable[str]) -> str:
    weight = weight_of(layer_at(model, layer_of(next(iter(weights)))))
    return packing_of(weight).name(weight)


def _source(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or "")
