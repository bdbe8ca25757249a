"""PEFT's SHiRA: r (O + I) single entries of every targeted Linear.    W' = W + scatter(shira_weight, shira_indices)

``shira_indices`` (2, k) are rows and columns. The count k = r (O + I) is PEFT's own: an adapter of another count is filled up
with entries that change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import store
from intarsia.calibrate import Progress
from intarsia.edits import Edit, Sparse, elements
from intarsia.errors import IntarsiaError
from intarsia.interop.output import Written, check_output
from intarsia.interop.peft_folder import (
    CONFIG,
    Folder,
    base_name,
    check_model,
    field_faults,
    layer_names,
    module_faults,
    targets,
    task,
    wide,
    write_folder,
)
from intarsia.interop.views import as_elements
from intarsia.operators import LINEAR, operator_of
from intarsia.site import layer_at, site_at, weight_name
from intarsia.support import Shape

KIND = "SHIRA"
VALUES, INDICES = "shira_weight", "shira_indices"
PARTS = (VALUES, INDICES)
UNDERSTOOD = ("r", "mask_type", "random_seed", "init_weights")
OFF = {"modules_to_save": None}


# ------------------------------------------------------------------ reading
def read(folder: Folder, model: nn.Module) -> tuple[dict[str, Edit], dict[str, Any], list[str]]:
    """Edits by weight, the method's config, and all that keeps the folder from being read."""
    faults = field_faults(folder.config, UNDERSTOOD, OFF) + module_faults(model, folder.modules)
    if faults:
        return {}, {}, faults
    edits: dict[str, Edit] = {}
    for name, parts in folder.modules.items():
        try:
            edits[weight_name(model, name)] = _edit(model, name, parts, folder.config.get("r", 32))
        except IntarsiaError as error:
            faults.append(f"{name}: {error}")
    return edits, as_shira(edits), faults


def _edit(model: nn.Module, name: str, parts: Mapping[str, Tensor], r: Any) -> Edit:
    if operator_of(layer_at(model, name)) != LINEAR:
        raise IntarsiaError("PEFT's SHiRA sits on Linear layers alone, and this is none")
    if parts.keys() != set(PARTS):
        raise IntarsiaError(f"found {', '.join(sorted(parts))}; expected {', '.join(PARTS)}")
    (rows, columns), where, values = site_at(model, name).shape, parts[INDICES], wide(parts[VALUES])
    if values.ndim != 1 or tuple(where.shape) != (2, len(values)):
        raise IntarsiaError(
            f"{INDICES} are {tuple(where.shape)} and {VALUES} {tuple(values.shape)}; expected (2, k), (k,)"
        )
    if len(values) != (count := r * (rows + columns) if isinstance(r, int) else None):
        raise IntarsiaError(f"it has {len(values)} values; r={r!r} of {CONFIG} asks for {count}")
    where = where.to(torch.int64)  # of float32 where it was saved on Windows
    if len(values) and (int(where.min()) < 0 or int(where[0].max()) >= rows or int(where[1].max()) >= columns):
        raise IntarsiaError(f"{INDICES} reach beyond the {rows} x {columns} weight")
    return in_order((rows, columns), where[0] * columns + where[1], values)


def in_order(shape: Shape, index: Tensor, values: Tensor) -> Sparse:
    """Elements in any order as an edit; a place that comes twice gets the sum, as a sparse tensor has it."""
    places, which = index.unique(return_inverse=True)
    total = values.new_zeros(len(places)).index_add(0, which, values)
    return Sparse.of(elements(shape, places, total).granularity, shape, {"indices": places, "values": total})


def as_shira(edits: Mapping[str, Edit]) -> dict[str, Any]:
    """The method that goes on with such a support, whatever each weight's count is: a budget of the whole model. That needs a

    scorer that ranks, which is never asked, for the support stands; how it was chosen is PEFT's affair.
    """
    size = sum(edit.shape[0] * edit.shape[1] for edit in edits.values())
    density = sum(edit.touched for edit in edits.values()) / size if size else 0.0
    return {"name": "shira", "density": density, "scorer": "magnitude", "scale": 1.0, "budget": "model"}


# ------------------------------------------------------------------ writing
def write(
    adapter: store.Adapter,
    model: nn.Module,
    folder: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a PEFT SHiRA adapter, exact for everything that is a set of entries.

    r is the smallest whose r (O + I) holds the entries of every weight; the rest are entries of value 0.

    Raises:
        IntarsiaError: for an adapter of another base, a folder that exists, edits that change every entry, layers other than
            Linear, and more entries than PEFT lets a weight have. Nothing is written then.
    """
    path = Path(folder)
    check_output(path, overwrite, "a PEFT adapter", marks=(CONFIG,))
    check_model(model, adapter)
    names = layer_names(model, adapter)
    found, faults = {}, []
    for weight, name in names.items():
        view = as_elements(adapter.edits[weight])
        if operator_of(layer_at(model, name)) != LINEAR:
            faults.append(f"{weight}: PEFT's SHiRA sits on Linear layers alone, and this is none")
        elif isinstance(view, str):
            faults.append(f"{weight}: {view}, and SHiRA holds single entries; convert it to peft-lora or full-model")
        else:
            found[name] = view
    r = max([1, *(math.ceil(len(edit.index) / sum(edit.shape)) for edit in found.values())])
    for name, edit in found.items():
        if r * sum(edit.shape) > math.prod(edit.shape):
            faults.append(
                f"{name}: PEFT has one r for all weights and r (O + I) entries in each; the fullest weight needs r={r}, which is "
                f"more than the {math.prod(edit.shape)} entries that this one has"
            )
    if faults:
        more = [f"... and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise IntarsiaError("a PEFT SHiRA cannot hold this adapter:\n  " + "\n  ".join(faults[:8] + more))
    tensors, filled = {}, 0
    for done, (name, edit) in enumerate(found.items(), 1):
        index, values = _filled(edit, r * sum(edit.shape))
        filled += len(index) - len(edit.index)
        columns = edit.shape[1]
        tensors[f"{name}.{INDICES}"] = torch.stack([index // columns, index % columns]).to(torch.int32)
        tensors[f"{name}.{VALUES}"] = values
        if progress:
            progress(done, len(found), "converting")
    config = {
        "peft_type": KIND,
        "task_type": task(model),
        "base_model_name_or_path": base_name(adapter),
        "inference_mode": True,
        "target_modules": targets(model, found),
        "r": r,
        "mask_type": "random",  # what PEFT draws when it loads is replaced by the indices of the file
        "random_seed": 0,
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }
    return write_folder(path, adapter, KIND, config, tensors, 0.0, r=r, filled=filled)


def _filled(edit: Sparse, count: int) -> tuple[Tensor, Tensor]:
    """The entries and as many others, of value 0, as are missing to the count: the first ones that are free."""
    missing = count - len(edit.index)
    # Among the first `count` places at most len(index) are taken, so `missing` of them are free.
    free = torch.ones(count, dtype=torch.bool, device=edit.index.device)
    free[edit.index[edit.index < count]] = False
    more = free.nonzero().squeeze(1)[:missing]
    index = torch.cat([edit.index, more])
    order = index.argsort()
    return index[order], torch.cat([edit.values, edit.values.new_zeros(missing)])[order]
