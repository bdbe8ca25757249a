"""What is named on a command line: adapters, as a folder, a version in the registry or NAME=either, and their model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from intarsia.errors import IntarsiaError

FLOATS = ("float32", "bfloat16", "float16", "float64")

if TYPE_CHECKING:
    from intarsia.pretrained import Pretrained
    from intarsia.store import Adapter
    from intarsia.train.progress import Progress


def adapter_folder(text: str) -> Path:
    """The folder of an adapter, given as a path or as NAME@VERSION: :func:`intarsia.store.folder_of`."""
    from intarsia.store import folder_of

    return folder_of(text)


def read_adapters(given: Iterable[str]) -> dict[str, Adapter]:
    """Read every folder, under its own name or the one given with it. All mistakes at once.

    Raises:
        IntarsiaError: for folders that are not whole, and names that are taken twice.
    """
    from intarsia import store

    found: dict[str, Adapter] = {}
    faults: list[str] = []
    for text in given:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).exists():
            name, folder = Path(text).resolve().name, text
            if not Path(text).exists():
                name = name.partition("@")[0]
        try:
            if name in found:
                raise IntarsiaError(f"two adapters are named {name!r}; give one another name: other={folder}")
            if not name or any(c.isspace() or c in "=/" for c in name):
                raise IntarsiaError(f"{text!r}: an adapter's name has no spaces, '=' or '/'; name it: other={folder}")
            found[name] = dataclasses.replace(store.read(adapter_folder(folder)), name=name)
        except IntarsiaError as error:
            faults.append(str(error))
    if faults:
        raise IntarsiaError("\n".join(faults))
    return found


def named_files(option: str, given: Iterable[str]) -> dict[str, str]:
    """NAME=FILE, several times: rows of the skill of the adapter of that name. Raises IntarsiaError where it is not that."""
    found: dict[str, str] = {}
    for text in given:
        name, sign, file = text.partition("=")
        if not sign or not name or not file:
            raise IntarsiaError(
                f"{option} {text}: expected NAME=FILE, rows of the skill that the adapter NAME was trained for"
            )
        if name in found:
            raise IntarsiaError(f"{option}: {name} is given twice")
        found[name] = file
    return found


def base_of(adapters: Mapping[str, Adapter], model: str | None) -> str:
    """The model to load: the one that was named, else the one that all adapters say they were made on."""
    bases = {name: adapter.base.digest for name, adapter in adapters.items()}
    if len(set(bases.values())) > 1:
        lines = [
            f"  {name}: {adapters[name].base.source or 'a model'}, {digest[:12]}" for name, digest in bases.items()
        ]
        raise IntarsiaError("these adapters belong to different bases:\n" + "\n".join(lines))
    if model is not None:
        return model
    sources = [adapter.base.source for adapter in adapters.values() if adapter.base.source]
    if not sources:
        raise IntarsiaError(f"{', '.join(adapters)}: the file does not say which model it belongs to; name it: --model")
    return sources[0]


def load_base(adapters: Mapping[str, Adapter], model: str | None, progress: Progress) -> Pretrained:
    """Load the base of adapters, in the type that they were made on: in another one it would be another base.

    Raises:
        IntarsiaError: for adapters of different bases, and a model that is not named or cannot be loaded.
    """
    name = base_of(adapters, model)
    dtypes = {adapter.base.dtype for adapter in adapters.values()}
    return load_model(
        name, progress, named=model is not None, adapters=list(adapters), dtype=dtypes.pop() if len(dtypes) == 1 else "auto"
    )  # fmt: skip


def load_model(
    name: str, progress: Progress, *, named: bool = True, adapters: Sequence[str] = (), dtype: str = "auto"
) -> Pretrained:
    """Load a model, on the GPU where there is one. ``named=False``: the name comes from an adapter's file.

    ``dtype``: the type of the base that an adapter says it was made on, such as ``float32`` or ``nf4``; by default the file's.
    """
    import torch

    from intarsia import pretrained
    from intarsia.bases import LOAD_IN

    try:
        packed = dtype in LOAD_IN
        dtype = dtype if packed or dtype in FLOATS else "auto"
        return pretrained.load(
            name, dtype="auto" if packed else dtype, load_in=dtype if packed else None,
            device="cuda" if torch.cuda.is_available() else None, progress=progress.say,
        )  # fmt: skip
    except IntarsiaError as error:
        if named:
            raise
        raise IntarsiaError(
            f"{error}\n{', '.join(adapters)} was made on that model; name it where it is now: --model"
        ) from error
