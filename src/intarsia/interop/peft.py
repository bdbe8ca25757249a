"""Adapters of HF PEFT, read as they stand in their folders: LoRA with DoRA and rsLoRA, SHiRA, Super-Tuning. Needs no PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from intarsia import store
from intarsia.edits import Edit
from intarsia.interop import peft_lora, peft_shira, peft_supertuning
from intarsia.interop.peft_folder import Folder, check_base, raise_all, read_folder
from intarsia.model import base_of, check_fits

Reader = Callable[[Folder, nn.Module], tuple[Mapping[str, Edit], dict[str, Any], list[str]]]
KINDS = (peft_lora, peft_shira, peft_supertuning)
READERS: dict[str, Reader] = {kind.KIND: kind.read for kind in KINDS}


def read_peft(folder: str | Path, model: nn.Module) -> store.Adapter:
    """A PEFT adapter as an adapter of this model, which is the base that it was trained on.

    PEFT's folders do not say which weights they were trained on, so only names and shapes can be checked, except in
    folders that were written here.

    Raises:
        IntarsiaError: for a folder that is not whole, a kind or a setting that is not computed here (by its name), tensors
            that do not fit the model; all faults at once.
    """
    return as_adapter(open_peft(folder), model)


def open_peft(folder: str | Path) -> Folder:
    """What stands in a PEFT folder, before its base is at hand. Raises IntarsiaError where it is not whole."""
    return read_folder(Path(folder), {kind.KIND: kind.PARTS for kind in KINDS})


def as_adapter(found: Folder, model: nn.Module) -> store.Adapter:
    """The rest of :func:`read_peft`."""
    edits, method, faults = READERS[found.kind](found, model)
    raise_all(found.path, faults)
    check_base(model, found)
    base, layouts = base_of(model, edits)
    origin = {key: found.config[key] for key in ("peft_type", "peft_version") if found.config.get(key)}
    sites = [weight.removesuffix(".weight") for weight in edits]
    about = {"targets": sites, "exclude": [], "seed": 0, "from": origin} | layouts
    adapter = store.Adapter(found.path.resolve().name, edits, base, method, about)
    check_fits(model, adapter, str(found.path), base.digest)
    return adapter
