"""The adapter: a set of edits with its metadata. Which folder holds it: :mod:`intarsia.store.writing` and ``reading``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from intarsia.edits import Edit, Insert
from intarsia.errors import IntarsiaError
from intarsia.store.digest import json_digest, tensor_digest
from intarsia.store.normal import Code

FORMAT = 3  # the newest that is read; a file is written in the oldest one that can say what is in it
TENSORS, HEAD, CARD = "adapter.safetensors", "adapter.json", "README.md"
MERGE = "merge"  # the method of an adapter that was made of others: no method, nothing trains on from it
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Base:
    """Which base an adapter belongs to: SHA-256 of all its weights, their dtype, and where it came from."""

    digest: str
    dtype: str
    source: str = ""


class LazyEdits(Mapping[str, Edit]):
    """Edits of a file, each made when it is first asked for, and kept.

    Attributes:
        outlines: every edit with tensors on torch's meta device: kind, shape and sizes, no numbers.
        digests: SHA-256 of every tensor of the edits, by its name.
    """

    def __init__(self, outlines: Mapping[str, Edit], digests: Mapping[str, str], make: Callable[[str], Edit]):
        self.outlines, self.digests, self._make = outlines, digests, make
        self._made: dict[str, Edit] = {}

    def __getitem__(self, weight: str) -> Edit:
        """The edit of a weight. Raises IntarsiaError where the file is damaged there, or was changed since it was opened."""
        if weight not in self.outlines:
            raise KeyError(weight)
        if weight not in self._made:
            # Two threads may make it at once; the first one's is kept by both.
            self._made.setdefault(weight, self._make(weight))
        return self._made[weight]

    def __contains__(self, weight: object) -> bool:
        return weight in self.outlines

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)

    @property
    def made(self) -> tuple[str, ...]:
        """The weights whose edits are in memory."""
        return tuple(self._made)

    def forget(self) -> None:
        """Drop the edits that are in memory; they are read again when they are asked for."""
        self._made = {}


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is saved, switched, fused and served: edits by weight name, and what is to be known of them.

    Attributes:
        method: the config of the method that trained it, ``{"name": "shira", ...}``.
        about: targets, seed and what else belongs to its making.
        note: free remarks of whoever made it, such as losses; not part of the digest.
        codes: the code that a tensor's numbers were rounded in, by its name, so that they are stored in as few bits;
            numbers that are not in it are stored as they are. Of a lazily opened file: of those that were read.
    """

    name: str
    edits: Mapping[str, Edit]
    base: Base
    method: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)
    codes: Mapping[str, Code] = field(default_factory=dict)

    @property
    def outlines(self) -> Mapping[str, Edit]:
        """The edits as far as kind, shape and sizes go: of a lazily opened file their tensors are on the meta device."""
        return self.edits.outlines if isinstance(self.edits, LazyEdits) else self.edits

    @property
    def made_of(self) -> dict[str, str]:
        """The adapters that it was merged of: their digests, by the names that they had then; none of one that was trained."""
        merged = self.about.get("merged", {})
        parts = merged.items() if isinstance(merged, Mapping) else ()
        return {
            str(name): str(part["digest"]) for name, part in parts if isinstance(part, Mapping) and "digest" in part
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every number of the adapter, by its name in the file."""
        return {f"{w}.{k}": t for w, edit in self.edits.items() for k, t in edit.tensors().items()}

    def facts(self) -> dict[str, Any]:
        """Type, shape and constants of each edit, as plain JSON values."""
        return {w: {"type": e.kind, "shape": list(e.shape)} | e.facts() for w, e in self.outlines.items()}

    @property
    def digest(self) -> str:
        """SHA-256 over edits and base: equal for equal adapters, whatever their name and notes, and however they are stored."""
        if isinstance(self.edits, LazyEdits):
            return edits_digest(self.facts(), self.edits.digests, self.base.digest)
        return edits_digest(self.facts(), {k: tensor_digest(t) for k, t in self.tensors().items()}, self.base.digest)

    @property
    def inserts(self) -> dict[str, list[Insert]]:
        """What it inserts beside the layers of weights, as far as the outlines tell; no weight can hold that."""
        return {w: [one for _, one in e.inserts()] for w, e in self.outlines.items() if e.inserts()}

    @property
    def multiplications(self) -> int:
        """Of numbers for every token, by what it inserts; 0 where all of it is set into weights."""
        return sum(one.multiplications for many in self.inserts.values() for one in many)

    @property
    def touched(self) -> int:
        """Entries of the base that it can change."""
        return sum(edit.touched for edit in self.outlines.values())

    @property
    def size(self) -> int:
        """Entries of the weights that it edits."""
        return sum(edit.shape[0] * edit.shape[1] for edit in self.outlines.values())

    @property
    def share(self) -> float:
        """Of the entries of those weights, the ones that it can change."""
        return self.touched / self.size if self.size else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of its numbers."""
        return sum(edit.bytes for edit in self.outlines.values())

    def rounded(self, values: str) -> Adapter:
        """The same adapter with what its edits add rounded once to ``bfloat16`` or ``float16``; its head and card say so.

        Lengths of rescaled edits and factors of kernels stay as they are.

        Raises:
            IntarsiaError: for another type, and for numbers that it cannot hold.
        """
        if values not in NARROW:
            raise IntarsiaError(f"values={values!r}; expected one of {', '.join(NARROW)}, or none to keep them exactly")
        edits = {weight: edit.rounded(NARROW[values]) for weight, edit in self.edits.items()}
        large = [
            f"{weight}.{part}"
            for weight, edit in edits.items()
            for part, tensor in edit.tensors().items()
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]
        if large:
            raise IntarsiaError(f"{', '.join(large[:5])}: numbers that {values} cannot hold; keep them exactly")
        return replace(self, edits=edits, about={**self.about, "rounded": values})


def edits_digest(facts: Mapping[str, Any], digests: Mapping[str, str], base: str) -> str:
    """The digest of an adapter, from the facts of its edits, the digests of their tensors and that of its base."""
    return json_digest({"edits": facts, "tensors": digests, "base": base})


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
