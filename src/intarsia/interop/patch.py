"""The weight patch: one safetensors file of the entries that an adapter changes, with the values that they get.

    <weight>.indices   (k,) int32, ascending flat positions in the weight as the model stores it
    <weight>.values    (k,) the new values, absolute, in the base's dtype; without indices: all of the weight, in order

Metadata: format, values ("absolute"), full_shapes (JSON: weight -> shape), base_digest, new_digest, checksum, adapter.
What inference engines take as sparse weight updates: name, full shape, indices, values. Only entries whose bits change
are in it, so it fits its own base alone, and on it gives the very bits of a deck that has the adapter set in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from intarsia import store
from intarsia.calibrate import Progress
from intarsia.deck import Deck
from intarsia.edits import place
from intarsia.errors import IntarsiaError, nearest
from intarsia.interop.output import Written, check_output, made_aside, measured
from intarsia.interop.peft_folder import check_model
from intarsia.interop.views import as_elements
from intarsia.model import active_names, check_unoccupied, digest
from intarsia.site import operator_at
from intarsia.store import json_digest, tensor_digest, weights_digest

FORMAT = "intarsia weight patch 1"
SUFFIX = ".safetensors"
MOST = 2**31 - 1  # the last flat position that int32 can name
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PatchedWeight:
    """New values of one weight. ``indices`` None: of all of it, in order."""

    full_shape: tuple[int, ...]
    indices: Tensor | None
    values: Tensor


@dataclass(frozen=True)
class Patch:
    """What stands in a patch file, checked."""

    weights: Mapping[str, PatchedWeight]
    base_digest: str
    new_digest: str


# ------------------------------------------------------------------ writing
def write(
    adapter: store.Adapter,
    model: nn.Module,
    file: str | Path,
    *,
    dense: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write what the adapter, set in at full strength, changes of this model's weights.

    Args:
        dense: also for edits that change every entry, such as low rank; these weights are then written whole where that is
            shorter.

    Raises:
        IntarsiaError: for an adapter of another base, a file that exists, edits that change every entry, a packed base.
            Nothing is written then.
    """
    path = Path(file)
    check_output(path, overwrite, "a weight patch", SUFFIX)
    base = check_model(model, adapter)
    names = list(adapter.edits)
    faults = [
        f"{weight}: {why}"
        for weight, edit in adapter.edits.items()
        if not dense and isinstance(why := as_elements(edit), str)
    ]
    faults += [
        f"{weight}: it has {model.get_parameter(weight).numel()} entries, more than int32 positions can name"
        for weight in names
        if model.get_parameter(weight).numel() > MOST + 1
    ]
    if faults:
        more = [f"... and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise IntarsiaError(
            "a weight patch is for sparse changes:\n  "
            + "\n  ".join(faults[:8] + more)
            + "\nWrite whole weights where need be: dense=True (--dense); or convert it to full-model or peft-lora"
        )
    deck = Deck(model)
    deck.add(adapter)  # refuses a packed base
    tensors: dict[str, Tensor] = {}
    changed = 0
    for done, weight in enumerate(names, 1):
        found = _change(model, weight, adapter)
        tensors |= found
        changed += len(found[f"{weight}.values"])
        if progress:
            progress(done, len(names), "comparing")
    deck.use(adapter.name)
    try:
        new = digest(model)
    finally:
        deck.off()
    shapes = {weight: list(model.get_parameter(weight).shape) for weight in names}
    facts = {
        "format": FORMAT,
        "values": "absolute",
        "full_shapes": json.dumps(shapes),
        "base_digest": base,
        "new_digest": new,
    }
    facts |= {"adapter": adapter.digest, "source": adapter.base.source}
    with made_aside(path, SUFFIX) as work:
        save_file(tensors, work, facts | {"checksum": _checksum(facts, tensors)})
        work.chmod(0o644)  # safetensors keeps its file from all but the owner
    total = sum(math.prod(shape) for shape in shapes.values())
    return measured(path, weights=len(names), changed=changed, of=total, new_digest=new)


def _change(model: nn.Module, weight: str, adapter: store.Adapter) -> dict[str, Tensor]:
    """Where the bits of the stored weight change, and what they become; the whole weight where that is shorter."""
    stored = model.get_parameter(weight).detach()
    operator = operator_at(model, weight)
    after = stored.clone()
    place(weight, operator.matrix(stored), [(1.0, adapter.edits[weight].to(stored.device))]).write(
        operator.matrix(after)
    )
    kind = BITS[stored.element_size()]
    before, flat = stored.reshape(-1).view(kind), after.reshape(-1)
    indices = (flat.view(kind) != before).nonzero().squeeze(1)
    if isinstance(as_elements(adapter.edits[weight]), str) and (
        len(indices) * (4 + stored.element_size()) > stored.numel() * stored.element_size()
    ):
        return {f"{weight}.values": flat.cpu()}
    return {f"{weight}.indices": indices.to(torch.int32).cpu(), f"{weight}.values": flat[indices].cpu()}


def _checksum(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return json_digest([dict(facts), sorted((name, tensor_digest(tensor)) for name, tensor in tensors.items())])


# ------------------------------------------------------------------ reading
def read(file: str | Path) -> Patch:
    """A patch from its file, checked whole.

    Raises:
        IntarsiaError: for a file that is cut off, changed or no patch; all faults at once.
    """
    path = Path(file)
    try:
        content = path.read_bytes()
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        facts = dict(json.loads(content[8 : 8 + length]).get("__metadata__") or {})
    except OSError as error:
        raise IntarsiaError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise IntarsiaError(f"{path} is no weight patch: {error}; it is cut off or not a safetensors file") from error
    if facts.get("format") != FORMAT or facts.get("values") != "absolute":
        raise IntarsiaError(
            f"{path} is no weight patch: its metadata say format {facts.get('format')!r}, expected {FORMAT!r}"
        )
    claimed = facts.pop("checksum", None)
    if claimed != _checksum(facts, tensors):
        raise IntarsiaError(f"{path} does not match its own checksum; it was changed or damaged. Fetch it again")
    try:
        shapes = {weight: tuple(int(n) for n in shape) for weight, shape in json.loads(facts["full_shapes"]).items()}
        base, new = facts["base_digest"], facts["new_digest"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise IntarsiaError(f"{path}: its metadata are damaged: {error!r}") from error
    weights, faults = {}, []
    for weight, shape in shapes.items():
        indices, values = tensors.pop(f"{weight}.indices", None), tensors.pop(f"{weight}.values", None)
        if values is None:
            faults.append(f"missing tensor {weight}.values")
        elif fault := _fault(shape, indices, values):
            faults.append(f"{weight}: {fault}")
        else:
            weights[weight] = PatchedWeight(shape, indices, values)
    faults += [f"unexpected tensor {name}" for name in tensors]
    if faults:
        raise IntarsiaError(f"{path} is not a whole patch:\n  " + "\n  ".join(faults[:10]))
    return Patch(weights, base, new)


def _fault(shape: tuple[int, ...], indices: Tensor | None, values: Tensor) -> str | None:
    size = math.prod(shape)
    if not values.is_floating_point() or values.ndim != 1 or not bool(values.isfinite().all()):
        return f"values are {tuple(values.shape)} {values.dtype}; expected one row of finite numbers"
    if indices is None:
        return None if len(values) == size else f"{len(values)} values; {shape} has {size}"
    if indices.dtype != torch.int32 or indices.shape != values.shape:
        return f"indices are {tuple(indices.shape)} {indices.dtype}; expected {len(values)} of int32"
    index = indices.long()
    if len(index) and not (int(index[0]) >= 0 and int(index[-1]) < size and bool((index.diff() > 0).all())):
        return f"indices are not ascending positions in 0..{size - 1}"
    return None


# ------------------------------------------------------------------ applying
def apply_patch(
    target: nn.Module | MutableMapping[str, Tensor], patch: str | Path | Patch, *, any_base: bool = False
) -> str:
    """Write a patch into a model's weights or a state dict's tensors, in place. All or nothing. -> the digest afterwards.

    Raises:
        IntarsiaError: for another base (``any_base=True`` takes that risk), weights that are missing or of other shapes or
            dtypes, a model with an adapter in force, and where the outcome is not what the patch was made to give; the
            weights are then what they were.
    """
    given = patch if isinstance(patch, Patch) else read(patch)
    if isinstance(target, nn.Module):
        if active := active_names(target):
            raise IntarsiaError(f"{', '.join(active)} is active on this model; call intarsia.activate(model) first")
        check_unoccupied(target)
        weights: Mapping[str, Tensor] = dict(target.named_parameters(remove_duplicate=False))
    else:
        weights = target
    faults = [fault for name, one in given.weights.items() if (fault := _misfit(weights, name, one))]
    if faults:
        raise IntarsiaError("the patch does not fit:\n  " + "\n  ".join(faults[:8]))
    found = _digest(target)
    if not any_base and found != given.base_digest:
        raise IntarsiaError(
            f"the patch belongs to another base: made for weights with digest {given.base_digest[:12]}, these have "
            f"{found[:12]}. Load that base, or pass any_base=True to write it all the same"
        )
    kept: list[tuple[Tensor, Tensor | None, Tensor]] = []
    try:
        for name, one in given.weights.items():
            flat = weights[name].detach().view(-1)
            index = None if one.indices is None else one.indices.to(flat.device, torch.int64)
            kept.append((flat, index, flat.clone() if index is None else flat[index]))
            _put(flat, index, one.values.to(flat.device))
        found = _digest(target)
        if not any_base and found != given.new_digest:
            raise IntarsiaError(
                f"the patched weights have digest {found[:12]} and not {given.new_digest[:12]}; the patch is broken, and the "
                "weights are what they were"
            )
    except BaseException:
        for flat, index, bits in reversed(kept):
            _put(flat, index, bits)
        raise
    return found


def _put(flat: Tensor, index: Tensor | None, bits: Tensor) -> None:
    with torch.no_grad():
        if index is None:
            flat.copy_(bits)
        else:
            flat.index_copy_(0, index, bits)


def _misfit(weights: Mapping[str, Tensor], name: str, one: PatchedWeight) -> str | None:
    if name not in weights:
        return f"{name}: there is no such weight; {nearest(name, weights)}"
    here = weights[name]
    if tuple(here.shape) != one.full_shape or here.dtype != one.values.dtype:
        return (
            f"{name}: the patch is for {one.full_shape} {one.values.dtype}, here it is {tuple(here.shape)} {here.dtype}"
        )
    return None if here.is_contiguous() else f"{name}: it is not contiguous in memory; store a .contiguous() copy first"


def _digest(target: nn.Module | Mapping[str, Tensor]) -> str:
    return digest(target) if isinstance(target, nn.Module) else weights_digest(target.items())
