"""All targets of ``intarsia convert`` in one table, and the one function behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from intarsia import store
from intarsia.calibrate import Progress
from intarsia.edits import Edit
from intarsia.errors import IntarsiaError, nearest
from intarsia.interop import full_model, gguf, patch, peft_alora, peft_folder, peft_lora, peft_shira
from intarsia.interop.output import Written, check_output, measured
from intarsia.interop.peft import as_adapter, open_peft
from intarsia.interop.views import as_elements
from intarsia.pretrained import Pretrained


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        options: which of rank, dense and dtype it takes.
        suffix: of its file; empty for a folder.
        marks: files of which a folder that may be replaced has one.
        whole: whether it is written from model and tokenizer; else from the weights alone, or (base False) from nothing.
        check: raises IntarsiaError for an adapter that it cannot hold, before the base is loaded.
        outcome: what becomes of an edit: ``exact``, the option that accepts it, or ``refused``.
    """

    title: str
    write: Callable[..., Written]
    outcome: Callable[[Edit], str]
    check: Callable[[store.Adapter], None] = peft_folder.check_folds
    options: tuple[str, ...] = ()
    suffix: str = ""
    marks: tuple[str, ...] = ()
    whole: bool = False
    base: bool = True


def _write_ours(adapter: store.Adapter, _: Any, folder: Path, *, overwrite: bool, progress: Progress | None) -> Written:
    return measured(store.write(adapter, folder, overwrite))


def _or(view: Callable[[Edit], Any], option: str) -> Callable[[Edit], str]:
    return lambda edit: option if isinstance(view(edit), str) else "exact"


def _always(edit: Edit) -> str:
    return "exact"


def _of_weights(outcome: Callable[[Edit], str]) -> Callable[[Edit], str]:
    return lambda edit: "refused" if edit.inserts() else outcome(edit)


def _activated_or(outcome: Callable[[Edit], str]) -> Callable[[Edit], str]:
    return lambda edit: "exact" if peft_alora.low_rank(edit) is not None else outcome(edit)


def _check_lora(adapter: store.Adapter) -> None:
    peft_folder.check_folds(peft_alora.as_lora(adapter)[0])


TARGETS: dict[str, Target] = {
    "peft-lora": Target("a PEFT adapter", peft_lora.write, _activated_or(_of_weights(_or(peft_lora.exact, "--rank"))), _check_lora, ("rank",),
                        marks=(peft_folder.CONFIG,)),
    "peft-shira": Target("a PEFT adapter", peft_shira.write, _of_weights(_or(as_elements, "refused")), marks=(peft_folder.CONFIG,)),
    "weight-patch": Target("a weight patch", patch.write, _of_weights(_or(as_elements, "--dense")), options=("dense",), suffix=patch.SUFFIX),
    "full-model": Target("a model", full_model.write, _of_weights(_always), options=("dtype",), marks=(full_model.CONFIG,), whole=True),
    "gguf": Target("a GGUF model", gguf.write, _of_weights(_always), options=("dtype",), suffix=gguf.SUFFIX, whole=True),
    "intarsia": Target("an adapter", _write_ours, _always, marks=(store.HEAD,), base=False),
}  # fmt: skip


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    load: Callable[[store.Adapter | None], Pretrained],
    rank: int | None = None,
    dense: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Read an adapter's folder, ours or PEFT's, and write it in another format.

    Args:
        to: a name in :data:`TARGETS`.
        load: called for the base, where it is needed, with the adapter of ours that says which it is, or None.
        rank, dense, dtype: see the targets that take them.

    Raises:
        IntarsiaError: for an unknown target, an option that it does not take, a folder that is no adapter, and whatever keeps the
            adapter from being written. Nothing is written then.
    """
    if to not in TARGETS:
        raise IntarsiaError(f"no format {to!r} to convert to; {nearest(to, TARGETS)}")
    target, path, out = TARGETS[to], Path(source), Path(output)
    given = {"rank": rank, "dense": dense or None, "dtype": dtype}
    options = {name: value for name, value in given.items() if value is not None}
    if unwanted := [name for name in options if name not in target.options]:
        takers = ", ".join(name for name, other in TARGETS.items() if unwanted[0] in other.options)
        raise IntarsiaError(f"{to} takes no {unwanted[0]} (--{unwanted[0]}); that is for {takers}")
    full_model.check_dtype(dtype)
    if path.resolve() == out.resolve():
        raise IntarsiaError(f"{out} is what is converted; choose another place for what comes of it")
    check_output(out, overwrite, target.title, target.suffix, target.marks)
    theirs = peft_folder.is_peft(path) and not (path / store.HEAD).exists()
    if not theirs and not (path / store.HEAD).exists():
        raise IntarsiaError(_no_adapter(path))
    folder, adapter = (open_peft(path), None) if theirs else (None, store.read(path))
    if adapter is not None and not target.base:
        return target.write(adapter, None, out, overwrite=overwrite, progress=progress)
    if adapter is not None:
        target.check(adapter)
    base = load(adapter)
    if adapter is None:
        assert folder is not None
        adapter = as_adapter(folder, base.model)
    on: Pretrained | nn.Module = base if target.whole else base.model
    return target.write(adapter, on, out, overwrite=overwrite, progress=progress, **options)


def _no_adapter(path: Path) -> str:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        return f"{path} {what}; expected the folder of an adapter, with {store.HEAD} or {peft_folder.CONFIG}"
    found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    return f"{path} holds no adapter: neither {store.HEAD} nor {peft_folder.CONFIG} (found {found})"
