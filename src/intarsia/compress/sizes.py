"""What an adapter takes, now and in every coding and compression: written for real, and measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from intarsia import store
from intarsia.compress.bits import in_bits
from intarsia.compress.numbers import Progress
from intarsia.compress.rank import change_error
from intarsia.compress.sparsify import prune, stc
from intarsia.errors import IntarsiaError
from intarsia.store import BITS, Adapter

DENSITIES = (0.5, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Size:
    """One way to store an adapter.

    Attributes:
        bytes: of the folder: head, numbers and card.
        numbers: bytes of the file of numbers alone.
        share_32, share_16: bytes / those of the folder with float32 and bfloat16 values.
        error: ||D - D'|| / ||D||; 0 for what is exact, None where it depends on the base's weights.
        refused: why it cannot be had; then there are no sizes.
    """

    name: str
    bytes: int = 0
    numbers: int = 0
    share_32: float = 0.0
    share_16: float = 0.0
    error: float | None = None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def folder_bytes(adapter: Adapter, coding: str = "compact") -> int:
    """Bytes of the adapter's folder, as :func:`intarsia.store.write` writes it."""
    return sum(_written(adapter, coding))


def sizes(adapter: Adapter, progress: Progress | None = None) -> list[Size]:
    """What the adapter takes in every coding, and compressed by rules that need no data, largest freedom first."""
    ways: dict[str, tuple[Callable[[], Adapter], str]] = {
        "float32": (lambda: adapter, "compact"),
        "float32, plain": (lambda: adapter, "plain"),
        "float32, without the seed": (lambda: replace(adapter, about={**adapter.about, "seed": None}), "compact"),
        "bfloat16": (lambda: adapter.rounded("bfloat16"), "compact"),
    }
    ways |= {f"{bits} bits": (lambda bits=bits: in_bits(adapter, bits), "compact") for bits in reversed(BITS)}  # type: ignore[misc]
    ways |= {f"prune {d:.0%}": (lambda d=d: prune(adapter, d), "compact") for d in DENSITIES}  # type: ignore[misc]
    ways |= {f"ternary {d:.0%}": (lambda d=d: stc(adapter, d), "compact") for d in DENSITIES}  # type: ignore[misc]
    ways["ternary 20%, bit masks"] = (lambda: stc(adapter, 0.2), "masks")
    found: list[Size] = []
    for done, (name, (make, coding)) in enumerate(ways.items(), 1):
        try:
            made = make()
            head, numbers = _written(made, coding)
            error = 0.0 if name.startswith("float32") else change_error(adapter, made)
            found.append(Size(name, head + numbers, numbers, error=error))
        except IntarsiaError as refused:
            found.append(Size(name, refused=str(refused).splitlines()[0]))
        if progress:
            progress(done, len(ways), name)
    wide, narrow = (next(one.bytes for one in found if one.name == name) for name in ("float32", "bfloat16"))
    return [
        one if one.refused else replace(one, share_32=one.bytes / wide, share_16=one.bytes / (narrow or wide))
        for one in found
    ]


def _written(adapter: Adapter, coding: str) -> tuple[int, int]:
    """Bytes of head and card, and of the numbers."""
    with tempfile.TemporaryDirectory() as place:
        folder = store.write(adapter, Path(place) / "adapter", coding=coding)
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
    numbers = files.pop(store.TENSORS)
    return sum(files.values()), numbers
