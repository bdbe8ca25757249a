"""The bundle: what a head says of each weight and tensor, and the coded numbers, as two tensors instead of a table of names.

Names and digests of a compressed adapter may take many times the bytes of its numbers. In a bundled folder ``adapter.json`` keeps what is
for people; ``edits``, ``tensors`` and ``codings`` lie, as JSON made small by zlib, in the tensor ``head`` of ``adapter.safetensors``, and the coded
numbers one after another in ``numbers``. No other tensor has a name without a dot. A digest takes 32 bytes however it is made small, so a reader
knows how many tensors a file of some size can have.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.store.tensorfile import TensorFile

MOVED = ("edits", "tensors", "codings")
HEAD, NUMBERS = "head", "numbers"
SMALL = 8192  # bytes; below it a head stays as people can read it
MOST = 64  # bytes of a head for each byte that it is made small to: a digest alone is 64 letters of 32 bytes

Spans = dict[str, tuple[int, int]]


def bundle(head: Mapping[str, Any], stored: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The head without what moves, and the tensors to store; both unchanged where little would be gained."""
    coded = [name for name in stored if name in head["codings"]]
    moved = {key: head[key] for key in MOVED} | {"lengths": {name: len(stored[name]) for name in coded}}
    text = json.dumps(moved, separators=(",", ":")).encode()
    if len(text) < SMALL or any(stored[name].dtype != torch.uint8 for name in coded):
        return dict(head), dict(stored)
    rest = {key: value for key, value in head.items() if key not in MOVED} | {"bundled": True}
    numbers = torch.cat([stored[name] for name in coded]) if coded else torch.empty(0, dtype=torch.uint8)
    small = torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)
    return rest, {name: t for name, t in stored.items() if name not in coded} | {HEAD: small, NUMBERS: numbers}


def unbundle(head: Mapping[str, Any], file: TensorFile) -> tuple[dict[str, Any], Spans]:
    """The whole head again, and from which to which byte of ``numbers`` each coded tensor lies.

    Raises:
        IntarsiaError: where the bundle is damaged, or would grow beyond what such a head can say.
    """
    sizes = {}
    for name in (HEAD, NUMBERS):
        entry = file.entries.get(name)
        if entry is None or entry.dtype != torch.uint8 or len(entry.shape) != 1:
            raise IntarsiaError(f"it is said to be bundled, and has no row of bytes named {name}")
        sizes[name] = entry.shape[0]
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(file.read(HEAD).numpy().tobytes(), MOST * sizes[HEAD] + 1)
        if not inflate.eof or inflate.unused_data:
            raise IntarsiaError("its bundled head is cut off, or made to fill memory")
        moved = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise IntarsiaError(f"its bundled head cannot be read: {error}") from error
    if not isinstance(moved, dict) or moved.keys() != {*MOVED, "lengths"}:
        raise IntarsiaError(f"its bundled head has other keys than {', '.join(MOVED)} and lengths")
    lengths = moved.pop("lengths")
    if not isinstance(lengths, dict) or not all(type(n) is int and 0 <= n <= sizes[NUMBERS] for n in lengths.values()):
        raise IntarsiaError("the lengths in its bundled head are no whole numbers")
    if sum(lengths.values()) != sizes[NUMBERS]:
        raise IntarsiaError(
            f"its bundled numbers are {sizes[NUMBERS]} bytes, and the lengths sum up to {sum(lengths.values())}"
        )
    # What moved and stands in the head too is no part of it: the checksum tells.
    whole = moved | {key: value for key, value in head.items() if key != "bundled"}
    ends = accumulate(lengths.values(), initial=0)
    return whole, dict(zip(lengths, pairwise(ends), strict=True))
