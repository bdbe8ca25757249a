"""Codings: how the indices of a support are stored. Exact, and the smallest is chosen for each weight.

    seed    nothing is stored: the support is what a key draws (``intarsia.support.Drawn``)
    gaps    the differences of the sorted indices, less 1, in u8 or u16
    plain   the indices themselves, int32 (int64 for weights of 2^31 entries and more)

and where a weight's values are coded too (:mod:`intarsia.store.values`), so that a byte for each index would be much:

    rice    the gaps by Rice's code
    ranks   of a part of what a key draws: which ones they are, sorted, as gaps by Rice's code

In ``gaps`` a gap g is written as g // e times the highest number e (255 or 65535), which says "go on", and then g % e.
So the sum of all numbers up to the end of the j-th gap, plus j, is the j-th index.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.store import packing
from intarsia.store.digest import tensor_digest
from intarsia.store.values import CODINGS as VALUE_CODINGS
from intarsia.support import Drawn, Shape, permute, ranks

INDEX_BYTES = 8  # in memory, where indices are int64
MOST_INDICES = 64  # bytes of indices in memory for each byte of the file: seeds give 4 at most, gaps less than 3
NOT_STORED = ("seed", "same")  # codings of tensors that are not in the file under their names
GAPS = (torch.uint8, torch.uint16)
SINCE_3 = ("rice", "ranks", *VALUE_CODINGS)  # codings that format 2 had not
KNOWN = ("seed", "gaps", "same", *SINCE_3)
FEW = 64  # indices: as random ones, the largest of their ranks is below half of all with a chance of 2^-64
ENTRY = {
    "seed": 64,
    "gaps": 192,
    "ranks": 48,
}  # bytes that a coding takes in the head (less the header's entry that it saves)


def encode(
    index: Tensor, shape: Shape, units: int, key: int | None, tight: bool = False
) -> tuple[dict[str, Any], Tensor | None]:
    """Sorted indices of 0..units-1, as a file's plain tensor -> what the head says of them (nothing: plain), what is stored.

    ``key`` is the one that may have drawn them; ``tight``: in as few bits as can be.
    """
    count = len(index)
    drawn = None if key is None or index.nbytes <= ENTRY["seed"] else Drawn.of(index, shape, units, key)
    if drawn is not None:
        rows = {} if drawn.rows is None else {"rows": drawn.rows}
        return {"coding": "seed", "units": units, "count": count, "key": f"{drawn.key:016x}"} | rows, None
    if tight and count:
        return _tight(index.to(torch.int64), units, key)
    gaps = packing.gaps(index.numpy())
    sizes = {dtype: _numbers(gaps, dtype) * dtype.itemsize for dtype in GAPS}
    best = min(GAPS, key=lambda dtype: sizes[dtype])
    if sizes[best] + ENTRY["gaps"] >= index.nbytes:
        return {}, index
    stored = torch.from_numpy(_write_gaps(gaps, best))
    return {"coding": "gaps", "count": count, "sha256": tensor_digest(stored)}, stored


def _tight(index: Tensor, units: int, key: int | None) -> tuple[dict[str, Any], Tensor]:
    """The smaller one of ``rice`` and ``ranks``."""
    between = packing.gaps(index.numpy())
    bits = packing.rice_bits(between)
    entry, data = {"coding": "rice", "count": len(index), "bits": bits}, packing.rice_encode(between, bits)
    if key is not None and len(index) and int(ranks(index[:FEW], units, key).max()) < units // 2:
        between = packing.gaps(ranks(index, units, key).sort().values.numpy())
        bits = packing.rice_bits(between)
        drawn = packing.rice_encode(between, bits)
        if len(drawn) + ENTRY["ranks"] < len(data):
            entry = {"coding": "ranks", "units": units, "count": len(index), "key": f"{key:016x}", "bits": bits}
            data = drawn
    return entry, torch.from_numpy(data)


def count_of(entry: Mapping[str, Any], shape: Shape, stored: tuple[torch.dtype, int] | None) -> int:
    """How many indices a coded tensor has, from the head's entry, the weight's shape, and type and length of what is stored.

    Raises:
        IntarsiaError: where they do not fit each other. Nothing is drawn or decoded before that.
    """
    coding, count = entry.get("coding"), entry.get("count")
    if not _whole(count) or count > shape[0] * shape[1]:
        raise IntarsiaError(
            f"its coding says count {_short(count)}; expected a whole number up to the weight's entries"
        )
    if coding == "gaps":
        if stored is None or stored[0] not in GAPS or stored[1] < count:
            found = "nothing" if stored is None else f"{stored[1]} numbers of {stored[0]}"
            raise IntarsiaError(
                f"{count} gaps are said to be stored, found {found}; expected one row of uint8 or uint16"
            )
        if not isinstance(entry.get("sha256"), str):
            raise IntarsiaError("its coding has no sha256")
    elif coding == "seed":
        _drawn(entry, shape)
    elif coding in ("rice", "ranks"):
        _check_rice(entry, count, stored)
        if coding == "ranks":
            _drawn({**entry, "rows": None}, shape)
    else:
        raise IntarsiaError(f"unknown coding {_short(coding)}; this version knows {', '.join(sorted(KNOWN))}")
    return count


def _check_rice(entry: Mapping[str, Any], count: int, stored: tuple[torch.dtype, int] | None) -> None:
    bits = entry.get("bits")
    if not _whole(bits) or bits > packing.MOST_BITS:
        raise IntarsiaError(f"its coding says bits {_short(bits)}; expected a whole number up to {packing.MOST_BITS}")
    least = packing.packed_bytes(count, bits) + packing.packed_bytes(count, 1)
    if stored is None or stored[0] != torch.uint8 or stored[1] < least:
        found = "nothing" if stored is None else f"{stored[1]} numbers of {stored[0]}"
        raise IntarsiaError(f"{count} indices are said to be stored, found {found}; expected {least} of uint8 or more")


def decode(entry: Mapping[str, Any], shape: Shape, stored: Tensor | None) -> Tensor:
    """The indices of a coded tensor whose entry :func:`count_of` has nothing against. -> (count,) int64.

    Raises:
        IntarsiaError: where what is stored is damaged.
    """
    if stored is None:
        return _drawn(entry, shape).index(entry["units"], entry["count"])
    if entry["coding"] in ("rice", "ranks"):
        places = packing.from_gaps(packing.rice_decode(stored.numpy(), entry["count"], entry["bits"]))
        if entry["coding"] == "rice":
            return torch.from_numpy(places)
        units = entry["units"]
        # Beyond them the permutation is not defined, and its walk may never end.
        if len(places) and not (places[0] >= 0 and (np.diff(places) > 0).all() and places[-1] < units):
            raise IntarsiaError(f"its ranks lie beyond {units - 1}; the file was changed or damaged")
        return permute(torch.from_numpy(places), units, int(entry["key"], 16)).sort().values
    if tensor_digest(stored) != entry["sha256"]:
        raise IntarsiaError("its bytes do not match its digest; the file was changed or damaged")
    numbers = stored.numpy()
    ends = numbers != np.iinfo(numbers.dtype).max
    if int(ends.sum()) != entry["count"] or not ends[-1:].all():
        raise IntarsiaError(
            f"it holds {int(ends.sum())} gaps, expected {entry['count']}; the file was changed or damaged"
        )
    return torch.from_numpy(np.cumsum(numbers, dtype=np.int64)[ends] + np.arange(entry["count"]))


def _drawn(entry: Mapping[str, Any], shape: Shape) -> Drawn:
    units, count, key, rows = (entry.get(name) for name in ("units", "count", "key", "rows"))
    if not _whole(units) or not _whole(count) or not count <= units <= shape[0] * shape[1]:
        raise IntarsiaError(f"its coding says units {_short(units)}; expected from its count to the weight's entries")
    if not isinstance(key, str) or len(key) != 16 or not set(key) <= set("0123456789abcdef"):
        raise IntarsiaError(f"its coding says key {_short(key)}; expected 16 hexadecimal digits")
    if rows is not None and not (_whole(rows) and rows and units % rows == 0 and count % rows == 0):
        raise IntarsiaError(f"its coding says rows {_short(rows)}; expected a divisor of units and count")
    return Drawn(int(key, 16), rows)


def _whole(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _short(value: Any) -> str:
    try:
        return repr(value)[:40]
    except RecursionError:
        return "a nest of lists"


def _numbers(gaps: NDArray[np.int64], dtype: torch.dtype) -> int:
    """How many numbers the gaps take in this type."""
    return len(gaps) + int((gaps // torch.iinfo(dtype).max).sum())


def _write_gaps(gaps: NDArray[np.int64], dtype: torch.dtype) -> NDArray[Any]:
    most = torch.iinfo(dtype).max
    times, rest = np.divmod(gaps, most)
    ends = np.cumsum(times + 1) - 1
    out = np.full(int(ends[-1]) + 1 if len(ends) else 0, most, dtype=np.uint8 if dtype == torch.uint8 else np.uint16)
    out[ends] = rest
    return out
