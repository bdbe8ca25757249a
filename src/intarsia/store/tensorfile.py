"""A safetensors file of which single tensors are read: first its header alone, then each tensor when it is asked for.

Bytes are read into memory of our own and never mapped: a file that another program cuts off while it is mapped ends the
process (SIGBUS), one that is read gives an error. Nothing is allocated that the header, checked against the file's size,
does not account for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.store.order import little_endian

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MOST_DIMENSIONS = 8


class Unreadable(Exception):
    """The file is cut off, damaged or no safetensors file; the message says where. For the store alone."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the file: ``begin`` and ``end`` in bytes from its start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file."""

    path: Path
    entries: dict[str, Entry]
    size: int  # of the file, in bytes

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header and check it against the file's size.

        Raises:
            Unreadable: where they do not fit, or the file cannot be read.
        """
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                first = file.read(8)
                length = int.from_bytes(first, "little")
                if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):
                    raise Unreadable(f"its header of {length} bytes does not fit in its {size} bytes")
                header = json.loads(file.read(length))
        except (OSError, ValueError, RecursionError) as error:
            raise Unreadable(str(error)) from error
        return cls(path, _entries(header, 8 + length, size), size)

    def read(self, name: str, span: tuple[int, int] | None = None) -> Tensor:
        """One tensor, in memory of its own; of a row of bytes perhaps those of a span alone.

        Raises:
            Unreadable: where the file has become shorter since it was opened, or is gone.
        """
        entry = self.entries[name]
        if span is not None:
            entry = Entry(torch.uint8, (span[1] - span[0],), entry.begin + span[0], entry.begin + span[1])
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(entry.begin)
                found = file.readinto(data.numpy().data) if len(data) else 0
        except OSError as error:
            raise Unreadable(str(error)) from error
        if found != len(data):
            raise Unreadable(f"it ends within {name}")
        if not len(data):
            return torch.empty(entry.shape, dtype=entry.dtype)
        return little_endian(data, entry.dtype.itemsize).view(entry.dtype).view(entry.shape)


def _entries(header: Any, start: int, size: int) -> dict[str, Entry]:
    if not isinstance(header, dict) or not isinstance(header.pop("__metadata__", {}), dict):
        raise Unreadable("its header is no table of tensors")
    entries = {name: _entry(name, found, start) for name, found in header.items()}
    at = start
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if entry.begin != at:
            raise Unreadable(f"{name} begins at byte {entry.begin}, expected {at}: tensors overlap or leave a gap")
        at = entry.end
    if at != size:
        raise Unreadable(f"its tensors end at byte {at}, and it has {size} bytes")
    return entries


def _entry(name: str, found: Any, start: int) -> Entry:
    if not isinstance(found, dict) or found.keys() != {"dtype", "shape", "data_offsets"}:
        raise Unreadable(f"the header's entry of {name} is damaged")
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Unreadable(f"{name} is of the type {dtype!r}, which is not known here")
    if not (_sizes(shape) and len(shape) <= MOST_DIMENSIONS and _sizes(offsets) and len(offsets) == 2):
        raise Unreadable(f"shape or place of {name} is damaged")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise Unreadable(f"{name} of shape {tuple(shape)} does not fill its {end - begin} bytes")
    return Entry(DTYPES[dtype], tuple(shape), start + begin, start + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 62 for each in value)
