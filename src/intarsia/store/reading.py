"""Reading an adapter's folder: strictly, without the method's code and without pickle.

``open`` reads and checks the head, and the sizes of all tensors; a weight's numbers are read and checked when its edit is
asked for. ``read`` does all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from intarsia.edits import Edit, build_edit
from intarsia.errors import IntarsiaError
from intarsia.store import bundle
from intarsia.store.adapter import HEAD, TENSORS, Adapter, Base, LazyEdits, edits_digest
from intarsia.store.bundle import Spans, unbundle
from intarsia.store.coding import INDEX_BYTES, MOST_INDICES, NOT_STORED, count_of, decode
from intarsia.store.digest import tensor_digest
from intarsia.store.head import check_head, read_head
from intarsia.store.normal import Code
from intarsia.store.tensorfile import TensorFile, Unreadable
from intarsia.store.values import CODINGS as VALUE_CODINGS
from intarsia.store.values import MOST_NUMBERS, decode_values, shape_of
from intarsia.store.writing import checksum
from intarsia.support import Shape, file_index_dtype

T = TypeVar("T")

MOST_ENTRIES = 1 << 62  # of a weight: flat positions are int64


def read(folder: str | Path) -> Adapter:
    """An adapter from its folder, checked whole. Needs neither a model nor the method's code.

    Raises:
        IntarsiaError: for a missing, truncated or changed file, a newer format, missing or extra tensors, indices out of
            range, numbers that are not finite; all faults at once.
    """
    folder = Path(folder)
    adapter = open(folder)
    edits, faults = {}, []
    for weight in adapter.edits:
        try:
            edits[weight] = adapter.edits[weight]
        except IntarsiaError as error:
            faults.append(str(error).removeprefix(_not_whole(folder, [])))
    _raise(folder, faults)
    return replace(adapter, edits=edits)


def open(folder: str | Path) -> Adapter:
    """An adapter whose ``edits`` are read one by one, each when it is first asked for. Needs neither a model nor the method.

    Checked at once: the head with its checksum, and that names, types, shapes and sizes of all tensors fit it. A weight's
    digest, range of indices and finiteness are checked when ``edits[weight]`` is first asked for, which then raises what
    this would. The file is not mapped: a weight's numbers are copied, and one that was changed since is refused.

    Raises:
        IntarsiaError: for a missing, truncated or newer file, a changed head, missing or extra tensors; all faults at once.
    """
    folder = Path(folder)
    head = read_head(folder)
    try:
        file = TensorFile.open(folder / TENSORS)
    except Unreadable as error:
        raise IntarsiaError(_unreadable(folder, error)) from error
    spans: Spans = {}
    if head.get("bundled"):
        try:
            head, spans = unbundle(head, file)
        except Unreadable as error:
            raise IntarsiaError(_unreadable(folder, error)) from error
        except IntarsiaError as error:
            raise IntarsiaError(_not_whole(folder, [str(error)])) from error
        check_head(folder, head)
    source = _Source(folder, file, head["edits"], head["tensors"], head.get("codings", {}), spans)
    faults = source.misnamed()
    if not faults and not _fits_itself(head):
        faults.append(f"{HEAD} does not match its own digest; it was edited or damaged")
    _raise(folder, faults)
    outlines: dict[str, Edit] = {}
    faults = [f"{weight}: tensors of a weight that has no edit" for weight in source.unclaimed()]
    for weight in head["edits"]:
        try:
            outlines[weight] = source.outline(weight)
        except IntarsiaError as error:
            faults.append(str(error))
    indices = sum(edit.tensors()[part].numel() for edit in outlines.values() for part in edit.supports())
    if not faults and indices * INDEX_BYTES > MOST_INDICES * file.size:
        faults.append(
            f"it claims {indices:,} indices, and {TENSORS} has {file.size:,} bytes; it is damaged, or made to fill memory"
        )
    coded = source.coded_bytes(outlines)
    if not faults and coded > MOST_NUMBERS * file.size:
        faults.append(
            f"it claims {coded:,} bytes of coded numbers, and {TENSORS} has {file.size:,}; it is damaged, or made to fill memory"
        )
    _raise(folder, faults)
    edits = LazyEdits(outlines, head["tensors"], source.edit)
    base = Base(head["base"]["digest"], head["base"]["dtype"], head["base"].get("source", ""))
    return Adapter(head["name"], edits, base, head["method"], head.get("about", {}), head.get("note", {}), source.codes)


class _Source:
    """The tensors of a folder, by their names in it."""

    def __init__(
        self,
        folder: Path,
        file: TensorFile,
        facts: Mapping[str, Any],
        digests: Mapping[str, str],
        codings: Mapping[str, Any],
        spans: Spans,
    ):
        self.spans = spans  # of the coded tensors in a bundle
        self.folder, self.file, self.facts, self.digests, self.codings = folder, file, facts, digests, codings
        self.codes: dict[str, Code] = {}  # of the tensors that were read and have one
        self.names: dict[str, dict[str, str]] = {}  # weight -> part -> whole name
        for name in digests:
            weight, _, part = name.rpartition(".")
            self.names.setdefault(weight, {})[part] = name
        # Tensors that others are the same as, while an edit holds them: none is in memory twice.
        self._shared: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def misnamed(self) -> list[str]:
        """What is wrong with the names of tensors in the head and the file."""
        faults = [
            f"{HEAD} has a coding of {name}, which is no tensor of it"
            for name in sorted(self.codings.keys() - self.digests.keys())
        ]
        wanted = {name for name in self.digests if self._coding(name).get("coding") not in NOT_STORED}
        found = self.file.entries.keys() - ({bundle.HEAD, bundle.NUMBERS} if self.spans else set())
        faults += [f"{name} is bundled and has no coding" for name in sorted(self.spans.keys() - self.codings.keys())]
        faults += [f"{name} is stored twice" for name in sorted(self.spans.keys() & found)]
        found |= self.spans.keys()
        faults += [f"missing tensor {name}" for name in sorted(wanted - found)]
        faults += [f"unexpected tensor {name}" for name in sorted(found - wanted)]
        return faults

    def unclaimed(self) -> list[str]:
        """Weights that have tensors and no edit."""
        return sorted(self.names.keys() - self.facts.keys())

    def outline(self, weight: str) -> Edit:
        """The edit without its numbers: tensors on the meta device. Raises IntarsiaError where sizes do not fit."""

        def build() -> Edit:
            shape = _shape(self.facts[weight]["shape"])
            parts = self.names.get(weight, {}).items()
            return _build(self.facts[weight], {part: self._outline(name, shape) for part, name in parts})

        return _checked(weight, build)

    def coded_bytes(self, outlines: Mapping[str, Edit]) -> int:
        """How many bytes the coded numbers have when they are decoded."""
        return sum(
            tensor.nbytes
            for weight, edit in outlines.items()
            for part, tensor in edit.tensors().items()
            if self._coding(f"{weight}.{part}").get("coding") in VALUE_CODINGS
        )

    def edit(self, weight: str) -> Edit:
        """The edit with its numbers, checked."""
        shape = _shape(self.facts[weight]["shape"])
        tensors, faults = {}, []
        for part, name in self.names.get(weight, {}).items():
            try:
                tensors[part] = self._tensor(name, shape)
            except Unreadable as error:
                raise IntarsiaError(_unreadable(self.folder, error)) from error
            except IntarsiaError as error:
                faults.append(f"{name}: {error}")
        _raise(self.folder, faults)
        try:
            return _checked(weight, lambda: _build(self.facts[weight], tensors))
        except IntarsiaError as error:
            raise IntarsiaError(_not_whole(self.folder, [str(error)])) from error

    def _coding(self, name: str) -> Mapping[str, Any]:
        entry: Mapping[str, Any] = self.codings.get(name, {})
        return entry

    def _outline(self, name: str, shape: Shape) -> Tensor:
        entry = self._coding(name)
        if entry.get("coding") == "same":
            return self._outline(self._same(name), shape)
        stored = self.file.entries.get(name)
        if not entry and stored is not None:
            return torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        row = None if stored is None or len(stored.shape) != 1 else (stored.dtype, stored.shape[0])
        if name in self.spans:
            row = torch.uint8, self.spans[name][1] - self.spans[name][0]
        try:
            if entry.get("coding") in VALUE_CODINGS:
                sizes, dtype = shape_of(entry, row)
                return torch.empty(sizes, dtype=dtype, device="meta")
            return torch.empty(count_of(entry, shape, row), dtype=torch.int64, device="meta")
        except IntarsiaError as error:
            raise IntarsiaError(f"{name.rpartition('.')[2]}: {error}") from error

    def _tensor(self, name: str, shape: Shape) -> Tensor:
        """A tensor with its numbers, which match its digest."""
        entry = self._coding(name)
        if entry.get("coding") == "same":
            other = self._same(name)
            if self.digests[name] != self.digests[other]:
                raise IntarsiaError(
                    f"it is said to be the same as {other}, which has another digest; the file was changed or damaged"
                )
            return self._tensor(other, shape)
        tensor = self._shared.get(name)
        if tensor is not None:
            return tensor
        stored = self.file.read(name) if name in self.file.entries else None
        if name in self.spans:
            stored = self.file.read(bundle.NUMBERS, self.spans[name])
        if entry.get("coding") in VALUE_CODINGS:
            assert stored is not None
            tensor, code = decode_values(entry, stored)
            found = tensor_digest(tensor)
            if code is not None:
                self.codes[name] = code
        elif entry:
            tensor = decode(entry, shape, stored)
            found = tensor_digest(tensor.to(file_index_dtype(shape)))
        else:
            assert stored is not None
            tensor, found = stored, tensor_digest(stored)
        if found != self.digests[name]:
            raise IntarsiaError("its bytes do not match its digest; the file was changed or damaged")
        self._shared[name] = tensor
        return tensor

    def _same(self, name: str) -> str:
        """The tensor that this one is said to be the same as."""
        other = self._coding(name).get("as")
        if not isinstance(other, str) or other not in self.digests or self._coding(other).get("coding") == "same":
            raise IntarsiaError(
                f"{name.rpartition('.')[2]} is said to be the same as what is no stored tensor; {HEAD} is damaged"
            )
        return other


def _build(fact: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    return build_edit(fact["type"], _shape(fact["shape"]), tensors, fact)


def _checked(weight: str, build: Callable[[], T]) -> T:
    """What ``build`` makes of a weight's entry. Raises one IntarsiaError, whatever is wrong with it."""
    try:
        return build()
    except IntarsiaError as error:
        raise IntarsiaError(f"{weight}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise IntarsiaError(f"{weight}: its entry in {HEAD} is damaged") from error


def _fits_itself(head: Mapping[str, Any]) -> bool:
    try:
        whole = edits_digest(head["edits"], head["tensors"], head["base"]["digest"])
        return bool(whole == head["digest"] and checksum(head) == head["checksum"])
    except RecursionError:
        return False


def _raise(folder: Path, faults: list[str]) -> None:
    if faults:
        raise IntarsiaError(_not_whole(folder, faults))


def _not_whole(folder: Path, faults: list[str]) -> str:
    shown = faults[:10] + ([f"... and {len(faults) - 10} more"] if len(faults) > 10 else [])
    return f"{folder} is not a whole adapter:\n  " + "\n  ".join(shown)


def _unreadable(folder: Path, error: Unreadable) -> str:
    return f"{folder / TENSORS} cannot be read: {error}; it is cut off or not a safetensors file. Fetch it again"


def _shape(value: Any) -> tuple[int, int]:
    rows, columns = value
    if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0):
        raise ValueError(value)
    if rows * columns >= MOST_ENTRIES:
        raise ValueError(value)
    return rows, columns
