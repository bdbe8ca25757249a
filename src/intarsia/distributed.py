"""Training in several processes: one base sharded over all of them (FSDP2), or a copy in each (DDP), and checkpoints.

The base is sharded, an adapter is not: it is small, so every process holds all of it, and its gradients are averaged.
Attach first, then shard; a weight that is sharded already cannot be adapted. A sparse adapter stays live: its values are
set into each process's own rows of the weight, and the base's bits there are kept, so taking out restores the very bits.

    torchrun --nproc-per-node 2 train.py        # with, in train.py:

    intarsia.attach(model, intarsia.Shira(density=0.01), seed=0)
    intarsia.shard(model)                       # or: replica = intarsia.replicate(model)
    ...any training loop; each process takes its own rows of the batch...
    intarsia.save(model, "out/skill")           # every process calls it, the first one writes

See docs/processes.md.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import chain, processes
from intarsia.bases import packing_of
from intarsia.errors import IntarsiaError, nearest
from intarsia.model import activate, active_names, adapter_state, load_adapter_state, record
from intarsia.operators import DECODER, STACK
from intarsia.store import tensor_digest


# ------------------------------------------------------------------ sharding and copying
def shard(model: nn.Module, blocks: Iterable[nn.Module] | None = None, **options: Any) -> nn.Module:
    """Shard the base of an adapted model over all processes, in place, with FSDP2's ``fully_shard``. -> the model.

    Every process calls this, with the same base and the same adapters. The adapters are left whole; from now on their
    gradients are averaged over the processes at the end of each backward pass. ``activate``, ``detach``, ``digest``,
    ``export`` and ``save`` work on the sharded model, the last three called by every process.

    Args:
        blocks: what is gathered as one: the layers of a transformer, unless given.
        options: of ``torch.distributed.fsdp.fully_shard``, such as ``mesh`` or ``mp_policy``.

    Raises:
        IntarsiaError: for a model without adapters, one that is sharded already, a single process without a process group,
            blocks that are not in the model, a base in fewer bits, bases or adapters that differ between processes. Nothing is changed then.
    """
    from torch.distributed.fsdp import fully_shard

    record(model)
    _must_be_started("shard")
    if "ignored_params" in options or "shard_placement_fn" in options:
        raise IntarsiaError(
            "shard() itself says which parameters are ignored and how rows are dealt out; leave these out"
        )
    if processes.is_sharded(model):
        raise IntarsiaError("this model is sharded already; attach every adapter first, then call intarsia.shard once")
    wholes = _blocks(model) if blocks is None else _checked(model, list(blocks))
    check_alike(model)
    packed = [name for name, p in model.named_parameters() if not packing_of(p).in_place]
    if packed:
        raise IntarsiaError(
            f"{packed[0]} is stored in fewer bits, and FSDP2 cannot deal its codes out by rows; call intarsia.replicate(model)"
        )
    layers = chain.adapted_layers(model)
    if stacks := [name for name, layer in layers.items() if layer.operator.kind == STACK]:
        raise IntarsiaError(
            f"{stacks[0]} is a stack of matrices, which FSDP2 deals out by matrices and an adapter here cannot follow; "
            "call intarsia.replicate(model)"
        )
    if decoders := [name for name, layer in layers.items() if layer.operator.kind == DECODER]:
        raise IntarsiaError(
            f"{decoders[0]} has something before its tokens, which is computed with no weight that FSDP2 would gather for it; call "
            "intarsia.replicate(model)"
        )
    ours = {p: None for layer in layers.values() for p in layer.adapters.parameters()}
    active = active_names(model)
    activate(model)  # what is sharded is the base
    for block in [*reversed(wholes), model]:
        fully_shard(block, ignored_params=set(ours), **options)
    _find_shards(model, layers)
    _Average(list(ours), _groups(model))
    activate(model, *active)
    model._is_accelerate_prepared = True  # type: ignore[assignment]  # accelerate would wrap it into DDP
    return model


def replicate(model: nn.Module, **options: Any) -> nn.Module:
    """The adapted model in ``DistributedDataParallel``: a whole base in each process, gradients averaged. -> the wrapper.

    Call the wrapper in the training loop, and everything of intarsia with the model itself. A plain
    ``DistributedDataParallel(model)``, as accelerate makes it, does the same without checking.

    Args:
        options: of ``torch.nn.parallel.DistributedDataParallel``.

    Raises:
        IntarsiaError: for a model without adapters, a single process without a process group, bases or adapters that
            differ between processes.
    """
    record(model)
    _must_be_started("replicate")
    check_alike(model)
    device = next(model.parameters()).device
    on = {"device_ids": [device.index]} if device.type == "cuda" else {}
    return nn.parallel.DistributedDataParallel(model, **on | options)


def check_alike(model: nn.Module) -> None:
    """Raise IntarsiaError where the base or the adapters are not the same, to the bit, in every process.

    They are when every process loads the same base and attaches with the same settings, seed and calibration data.
    """
    mine: dict[str, Any] = {
        f"base {name}": _fingerprint(p) for name, p in model.named_parameters() if not p.requires_grad
    }
    for name in record(model).adapters:
        mine |= {f"adapter {name} {k}": tensor_digest(t) for k, t in adapter_state(model, name).items()}
    everyones = processes.gathered(mine)
    differing = sorted({k for other in everyones for k in mine.keys() | other.keys() if mine.get(k) != other.get(k)})
    faults = processes.gathered(differing)
    differing = sorted({k for found in faults for k in found})
    if differing:
        more = [f"... and {len(differing) - 5} more"] if len(differing) > 5 else []
        raise IntarsiaError(
            "these tensors differ between the processes; load the same base, and attach with the same settings, seed and "
            "calibration data, in every process:\n  " + "\n  ".join(differing[:5] + more)
        )


def share_first(model: nn.Module) -> None:
    """Give the first process's adapters to all where they differ: on a GPU a gradient, and so a support, may.

    Raises IntarsiaError where the bases differ, or adapters in more than their numbers.
    """
    for name in record(model).adapters if processes.count() > 1 else ():
        mine = adapter_state(model, name)
        digests = processes.gathered({k: (tensor_digest(t), tuple(t.shape)) for k, t in mine.items()})
        shapes = [{k: shape for k, (_, shape) in one.items()} for one in digests]
        if any(other != digests[0] for other in digests) and all(other == shapes[0] for other in shapes):
            theirs = {k: t.cpu() for k, t in mine.items()}
            load_adapter_state(model, name, processes.first_does(partial(dict, theirs)))
    if processes.count() > 1:
        check_alike(model)


def _fingerprint(weight: Tensor) -> tuple[Any, ...]:
    packing = packing_of(weight)
    if not packing.in_place:
        return tuple((k, tensor_digest(t)) for k, t in sorted(packing.stored(weight).items()))
    # Exact and independent of the order of summing, unlike a sum of floats; far quicker than a SHA-256.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.dtype.itemsize]
    numbers = weight.detach().view(bits)
    return tuple(weight.shape), str(weight.dtype), int(numbers.sum(dtype=torch.int64))


def _must_be_started(what: str) -> None:
    if not processes.started():
        raise IntarsiaError(
            f"{what}() needs a process group: start the program with torchrun and call "
            "torch.distributed.init_process_group() first"
        )


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers says belong together, otherwise the members of the outermost lists of modules."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    named = [m for m in model.modules() if type(m).__name__ in kinds]
    if named:
        return named
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [m for n, m in lists if not any(n.startswith(f"{above}.") for above, _ in lists if above != n)]
    return [
        block
        for found in outer
        for block in found
        if not isinstance(block, chain.Adapted) and next(block.parameters(), None) is not None
    ]


def _checked(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    order = {module: (number, name) for number, (name, module) in enumerate(model.named_modules())}
    for block in blocks:
        if block not in order or block is model:
            raise IntarsiaError(f"blocks: {type(block).__name__} is not a module inside this {type(model).__name__}")
        if isinstance(block, chain.Adapted | nn.ModuleList | nn.ModuleDict):
            raise IntarsiaError(
                f"blocks: {order[block][1]} is a {type(block).__name__}; give modules with a forward of their own that "
                "hold adapted layers, such as the layers of a transformer"
            )
    return sorted(blocks, key=lambda block: order[block])


def _find_shards(model: nn.Module, layers: Mapping[str, Any]) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    owners = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    for site, layer in layers.items():
        weight = layer.weight
        owner = next(m for n, m in reversed(owners) if not n or site.startswith(f"{n}."))  # the innermost
        shape, start = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        layer.shard = chain.Shard(owner, model, start[0], shape[0], weight.device)
        if weight.device.type != "cpu":  # what is ignored has not been moved
            layer.adapters.to(weight.device)


def _groups(model: nn.Module) -> list[Any]:
    """The groups over which gradients are averaged: one for each dimension of the mesh."""
    weight: Any = next(p for p in model.parameters() if processes.is_shard(p))
    mesh = weight.device_mesh
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


class _Average:
    """Averages the gradients of adapters over processes, all in one message at the end of each backward pass.

    Where gradients accumulate over several passes, what was averaged before is averaged again and stays what it is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Sequence[Any]) -> None:
        self.parameters, self.groups = parameters, groups
        self.size = 1
        for group in groups:
            self.size *= torch.distributed.get_world_size(group)
        self.backward = -1  # the pass at whose end the averaging stands already
        for parameter in parameters:
            trained = parameter.requires_grad
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._note)
            parameter.requires_grad_(trained)

    def _note(self, _: Tensor) -> None:
        now = torch._C._current_graph_task_id()
        if now != self.backward:
            self.backward = now
            torch.autograd.Variable._execution_engine.queue_callback(self._all)

    @torch.no_grad()
    def _all(self) -> None:
        self.backward = -1
        kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for parameter in self.parameters:
            if parameter.requires_grad:
                kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        for parameters in kinds.values():
            self._average(parameters)

    def _average(self, parameters: list[nn.Parameter]) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        present = gradients[0].new_tensor([p.grad is not None for p in parameters])
        flat = torch.cat([*(g.reshape(-1) for g in gradients), present])
        for group in self.groups:
            torch.distributed.all_reduce(flat, group=group)
        *parts, present = flat.split([*(g.numel() for g in gradients), len(parameters)])
        for parameter, part, anywhere in zip(parameters, parts, present.tolist(), strict=True):
            if anywhere:  # a parameter that no process used keeps no gradient, and so no optimizer state
                mean = (part / self.size).view_as(parameter)
                parameter.grad = mean if parameter.grad is None else parameter.grad.copy_(mean)


# ------------------------------------------------------------------ checkpoints
def save_checkpoint(
    model: nn.Module,
    folder: str | Path,
    optimizer: torch.optim.Optimizer | None = None,
    name: str | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter's whole training state with torch's distributed checkpoints, each process a part. -> the folder.

    It holds the adapter's tensors, the optimizer's state and ``extra``, not the base. It can be loaded by any number of
    processes, sharded or not. Every process calls this. A half-written checkpoint never stands under the folder's name.

    Args:
        optimizer: one that trains this adapter and nothing else.
        name: which adapter, where the model has several.
        extra: plain JSON values, such as the step.

    Raises:
        IntarsiaError: for a folder that exists, an optimizer that trains something else, values that are no JSON.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    folder, name = Path(folder), _name(model, name)
    tensors: dict[str, Tensor] = {f"adapter/{k}": t for k, t in adapter_state(model, name).items()}
    about = {"name": name, "method": record(model).adapters[name].method.config(), "extra": dict(extra or {})}
    if optimizer is not None:
        more, about["optimizer"] = _optimizer_state(optimizer, _names(model, name))
        tensors |= more
    try:
        tensors["about"] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    except (TypeError, ValueError) as error:
        raise IntarsiaError(f"checkpoint: what it is to hold is no plain JSON value ({error})") from error
    aside = folder.with_name(f".{folder.name}.part")
    processes.first_does(lambda: _make_room(folder, aside))
    try:
        with _alone_is_no_fault():
            save(tensors, checkpoint_id=aside)
        processes.first_does(lambda: aside.rename(folder))
    finally:
        if processes.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def load_checkpoint(
    model: nn.Module, folder: str | Path, optimizer: torch.optim.Optimizer | None = None, name: str | None = None
) -> dict[str, Any]:
    """Give an attached adapter, and the optimizer that trains it, the state of :func:`save_checkpoint`. -> its ``extra``.

    The adapter is attached as it was before, by the same settings; its support comes from the checkpoint. Every process
    calls this. torch reads a part of the checkpoint by pickle: load your own only.

    Raises:
        IntarsiaError: for a folder that is no checkpoint, another method, missing, extra or misshapen tensors, an optimizer
            with other parameters. Nothing is changed then.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    folder, name = Path(folder), _name(model, name)
    try:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise IntarsiaError(f"{folder} is not a checkpoint of torch.distributed, or it is damaged: {error}") from error
    tensors = {
        key: torch.empty(facts.size, dtype=facts.properties.dtype)
        for key, facts in found.items()
        if isinstance(facts, TensorStorageMetadata)
    }
    with _alone_is_no_fault():
        load(tensors, checkpoint_id=folder)
    about = json.loads(bytes(tensors.pop("about").tolist())) if "about" in tensors else {}
    method = record(model).adapters[name].method.config()
    if json.loads(json.dumps(method)) != about.get("method"):
        raise IntarsiaError(f"{folder} holds an adapter of {about.get('method')}; {name!r} on this model is {method}")
    state = None
    if optimizer is not None:
        state = _optimizer_dict(optimizer, _names(model, name), tensors, about.get("optimizer"), str(folder))
    load_adapter_state(
        model, name, {k.removeprefix("adapter/"): t for k, t in tensors.items() if k.startswith("adapter/")}
    )
    if optimizer is not None and state is not None:
        optimizer.load_state_dict(state)
    return dict(about.get("extra", {}))


def _name(model: nn.Module, name: str | None) -> str:
    names = list(record(model).adapters)
    if name is None and len(names) != 1:
        raise IntarsiaError(f"the model has {len(names)} adapters ({', '.join(names)}); say which: name=...")
    if name is not None and name not in names:
        raise IntarsiaError(f"no adapter {name!r} on this model; {nearest(name, names)}")
    return name or names[0]


def _names(model: nn.Module, name: str) -> dict[int, str]:
    """Every trained tensor of an adapter by its id -> the name that it has in a checkpoint."""
    return {
        id(parameter): f"{site}/{k}"
        for site, layer in chain.adapted_layers(model).items()
        if name in layer.adapters
        for k, parameter in layer.adapters[name].named_parameters()
    }


def _make_room(folder: Path, aside: Path) -> None:
    if folder.exists():
        raise IntarsiaError(f"{folder} exists already; a checkpoint is written to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)


def _optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> tuple[dict[str, Tensor], Any]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        if any(id(p) not in names for p in group["params"]):
            raise IntarsiaError("checkpoint: the optimizer also trains what does not belong to this adapter")
        groups.append({k: _number(v) for k, v in group.items() if k != "params"})
        groups[-1]["params"] = [names[id(p)] for p in group["params"]]
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{names[id(parameter)]}/{key}"] = value
                else:
                    numbers.setdefault(names[id(parameter)], {})[key] = value
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "numbers": numbers}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _optimizer_dict(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor], about: Any, where: str
) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, parameters found by name."""
    if about is None:
        raise IntarsiaError(f"{where} holds no optimizer state; leave the optimizer out")
    mine = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    theirs = [group["params"] for group in about["groups"]]
    if type(optimizer).__name__ != about["class"] or mine != theirs:
        raise IntarsiaError(
            f"{where} holds the state of {about['class']} for {sum(map(len, theirs))} tensors in {len(theirs)} group(s); this "
            f"is {type(optimizer).__name__} for {sum(map(len, mine))} in {len(mine)}, or they are other tensors or in another "
            "order"
        )
    state: dict[int, dict[str, Any]] = {}
    groups, number = [], 0
    for saved, group in zip(about["groups"], optimizer.param_groups, strict=True):
        kept = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items() if k != "params"}
        groups.append(kept | {"params": list(range(number, number + len(saved["params"])))})
        for name in saved["params"]:
            prefix = f"optimizer/{name}/"
            found = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            found |= about["numbers"].get(name, {})
            if found:
                state[number] = found
            number += 1
    return {"state": state, "param_groups": groups}


@contextmanager
def _alone_is_no_fault() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
