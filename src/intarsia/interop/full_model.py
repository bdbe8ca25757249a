"""The whole model: the base with the edits folded in, as a folder that transformers and every engine reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia import store
from intarsia.bases import packing_of
from intarsia.calibrate import Progress
from intarsia.edits import place
from intarsia.errors import IntarsiaError, nearest
from intarsia.interop.output import Written, check_output, made_aside, measured
from intarsia.interop.peft_folder import check_model
from intarsia.pretrained import Pretrained, hushed
from intarsia.site import operator_at

CONFIG = "config.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write(
    adapter: store.Adapter,
    pretrained: Pretrained,
    folder: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write model and tokenizer. In the base's own dtype the weights are the very bits that a deck sets in.

    Args:
        dtype: float32, float16 or bfloat16; by default the base's. Changed weights are rounded to it once, from float32.

    Raises:
        IntarsiaError: for an adapter of another base, a folder that exists, a packed base, numbers that are not finite in
            the dtype. Nothing is written then.
    """
    path = Path(folder)
    check_output(path, overwrite, "a model", marks=(CONFIG,))
    state = folded(adapter, pretrained, dtype, progress)
    if progress:
        progress(len(adapter.edits), len(adapter.edits), "writing")
    with made_aside(path) as work, hushed():
        pretrained.model.save_pretrained(work, state_dict=state)
        pretrained.tokenizer.save_pretrained(work)
        if dtype is not None:
            _say_dtype(work / CONFIG, dtype)
        (work / "README.md").write_text(_card(path.name, adapter, pretrained), encoding="utf-8")
        work.chmod(0o755)
    return measured(path, dtype=dtype or adapter.base.dtype)


def check_dtype(dtype: str | None) -> torch.dtype | None:
    """The dtype of that name. Raises IntarsiaError for one that models are not written in."""
    if dtype is not None and dtype not in DTYPES:
        raise IntarsiaError(f"dtype {dtype!r} is none that a model is written in; {nearest(dtype, DTYPES)}")
    return DTYPES[dtype] if dtype is not None else None


def folded(
    adapter: store.Adapter, pretrained: Pretrained, dtype: str | None = None, progress: Progress | None = None
) -> dict[str, Tensor]:
    """The model's state with the adapter folded in; what it does not change is the model's own memory, not a copy."""
    wanted, model = check_dtype(dtype), pretrained.model
    check_model(model, adapter)
    packed = [weight for weight in adapter.edits if not packing_of(model.get_parameter(weight)).in_place]
    if packed:
        raise IntarsiaError(
            f"{packed[0]} is stored in {packing_of(model.get_parameter(packed[0])).name(model.get_parameter(packed[0]))}; a model is "
            "written from plain weights. Load the base without load_in"
        )
    made: dict[int, Tensor] = {}  # by memory: a tied weight is one tensor under two names, and stays one
    for done, weight in enumerate(adapter.edits, 1):
        stored, operator = model.get_parameter(weight).detach(), operator_at(model, weight)
        wide = stored if wanted in (None, stored.dtype) else stored.to(torch.promote_types(stored.dtype, torch.float32))
        after = wide.clone()
        place(weight, operator.matrix(wide), [(1.0, adapter.edits[weight].to(stored.device))]).write(
            operator.matrix(after)
        )
        made[stored.data_ptr()] = after
        if progress:
            progress(done, len(adapter.edits), "folding in")
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        here = made.setdefault(tensor.data_ptr(), tensor.detach()) if tensor.numel() else tensor
        if wanted is not None and here.is_floating_point() and here.dtype != wanted:
            here = made[tensor.data_ptr()] = here.to(wanted)
            if not bool(here.isfinite().all()):
                raise IntarsiaError(f"{name} has numbers that are too large for {dtype}; take bfloat16 or float32")
        state[name] = here
    return state


def _say_dtype(config: Path, dtype: str) -> None:
    content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    content.pop("torch_dtype", None)
    config.write_text(json.dumps(content | {"dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(name: str, adapter: store.Adapter, pretrained: Pretrained) -> str:
    source = adapter.base.source
    front = f"base_model: {source}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
    return f"""---
library_name: transformers
tags: [intarsia]
{front}---

# {name}

`{source or "An unnamed base"}` with the adapter `{adapter.name}` (method `{adapter.method.get("name", "?")}`) folded into its
weights: it changes up to {adapter.touched:,} of the {adapter.size:,} entries of {len(adapter.edits)} weights. Written by intarsia.

| | |
|---|---|
| adapter's SHA-256 | `{adapter.digest}` |
| base's SHA-256 | `{adapter.base.digest}` ({adapter.base.dtype}) |
"""
