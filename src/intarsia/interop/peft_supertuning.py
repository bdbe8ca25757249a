"""PEFT's Super-Tuning: entries at flat positions, and in its Supra mode a low-rank update beside them.

W' = W + scatter(supertuning_values, supertuning_indices) + (lora_alpha / r) B A
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.edits import Edit, LowRank, Sum
from intarsia.errors import IntarsiaError
from intarsia.interop.peft_folder import CONFIG, Folder, field_faults, module_faults, wide
from intarsia.interop.peft_shira import as_shira, in_order
from intarsia.operators import LINEAR, operator_of
from intarsia.site import layer_at, site_at, weight_name

KIND = "SUPERTUNING"
VALUES, INDICES = "supertuning_values", "supertuning_indices"
A, B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
PARTS = (VALUES, INDICES, A, B)
UNDERSTOOD = ("sparsity", "select_top", "r", "lora_alpha", "lora_dropout", "init_weights", "save_precomputed_indices")
OFF = {"modules_to_save": None}


def read(folder: Folder, model: nn.Module) -> tuple[dict[str, Edit], dict[str, Any], list[str]]:
    """Edits by weight, the method's config, and all that keeps the folder from being read."""
    config = folder.config
    faults = field_faults(config, UNDERSTOOD, OFF) + module_faults(model, folder.modules)
    if not config.get("save_precomputed_indices", True):
        faults.append(
            f"{CONFIG}: save_precomputed_indices=false, so the positions are not in the folder, and choosing them anew may break ties "
            "otherwise. Load it in PEFT and save it with save_precomputed_indices=True"
        )
    r, alpha = config.get("r"), config.get("lora_alpha")
    if r is not None and (not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float | None)):
        faults.append(f"{CONFIG}: r={r!r} and lora_alpha={alpha!r}; expected a whole number and a number")
    if faults:
        return {}, {}, faults
    edits: dict[str, Edit] = {}
    for name, parts in folder.modules.items():
        try:
            edits[weight_name(model, name)] = _edit(model, name, parts, r, 2 * r if r and alpha is None else alpha)
        except IntarsiaError as error:
            faults.append(f"{name}: {error}")
    return edits, _method(edits, config), faults


def _edit(model: nn.Module, name: str, parts: Mapping[str, Tensor], r: int | None, alpha: float | None) -> Edit:
    if operator_of(layer_at(model, name)) != LINEAR:
        raise IntarsiaError("PEFT's Super-Tuning sits on Linear layers alone, and this is none")
    expected = {VALUES, INDICES} | ({A, B} if r else set())
    if parts.keys() != expected:
        raise IntarsiaError(f"found {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}")
    shape, index, values = site_at(model, name).shape, parts[INDICES].to(torch.int64), wide(parts[VALUES])
    if values.ndim != 1 or index.shape != values.shape:
        raise IntarsiaError(
            f"{INDICES} are {tuple(index.shape)} and {VALUES} {tuple(values.shape)}; expected one row each"
        )
    sparse = in_order(shape, index, values)
    if not r:
        return sparse
    if parts[A].shape[0] != r:
        raise IntarsiaError(f"{A} is {tuple(parts[A].shape)}; by {CONFIG} its rank is {r}")
    assert alpha is not None
    return Sum(shape, (sparse, LowRank.build(shape, {"A": wide(parts[A]), "B": wide(parts[B])}, {"scale": alpha / r})))


def _method(edits: Mapping[str, Edit], config: Mapping[str, Any]) -> dict[str, Any]:
    r = config.get("r")
    if not r:
        return as_shira(edits)
    density, alpha = 1 - config.get("sparsity", 0.99), config.get("lora_alpha")
    low_rank = {"rank": r, "alpha": None if alpha is None else float(alpha), "scaling": "lora"}
    return {"name": "rosa", "density": density, "scorer": "magnitude", "scale": 1.0} | low_rank
