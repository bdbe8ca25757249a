"""A model with thin layers as a folder, which every command and :func:`intarsia.pretrained.load` read like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intarsia.bases.thin import RANKS, ranks, write_ranks
from intarsia.errors import IntarsiaError
from intarsia.interop.output import Written, check_output, made_aside, measured
from intarsia.pretrained import hushed


def save(model: Any, tokenizer: Any, folder: str | Path, *, overwrite: bool = False) -> Written:
    """Write a transformers model with thin layers, and its tokenizer, whole or not at all.

    Raises:
        IntarsiaError: for a model without thin layers or with adapters, or a folder that stands there.
    """
    folder = Path(folder)
    check_output(folder, overwrite, "a model with thin layers", marks=(RANKS,))
    if hasattr(model, "_intarsia"):
        raise IntarsiaError("the model has adapters; detach them before it is written, and save them by themselves")
    if not ranks(model):
        raise IntarsiaError(f"no layer of this {type(model).__name__} is thin; call intarsia.shrink.factorize first")
    with made_aside(folder) as work, hushed():
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        write_ranks(model, work)
        work.chmod(0o755)
    return measured(folder)
