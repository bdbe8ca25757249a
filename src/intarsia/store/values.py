"""Codings of values: what a compressed tensor of floating-point numbers is stored as. Exact to the bit, whatever the machine.

    ternary   only -c, 0 and c: c, where the numbers are that are not 0 (gaps by Rice's code), a bit for each sign
    masks     the same as two bit masks, one of the +c, one of the -c: larger, and ready for counting bits
    nonzero   many zeros: where the others are, and the others as they are
    normal    2^b levels around a mean (:mod:`intarsia.store.normal`): mean, standard deviation, b bits a number

All that is stored is uint8. A number's own bytes are little-endian; "0" is the number of bits 0, so that -0.0 is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intarsia.errors import IntarsiaError
from intarsia.store.normal import BITS, Code
from intarsia.store.packing import (
    MOST_BITS,
    Bytes,
    from_gaps,
    gaps,
    pack,
    packed_bytes,
    rice_bits,
    rice_decode,
    rice_encode,
    unpack,
)

CODINGS = ("ternary", "masks", "nonzero", "normal")
ENTRY = 256  # bytes that a coding has to save: those that it takes in the head, and more
MOST_NUMBERS = 256  # bytes of coded numbers in memory for each byte of the file: a density of 5 % takes 94
MOST_COUNT = 1 << 48

_WORDS: dict[torch.dtype, tuple[str, torch.dtype]] = {
    torch.float64: ("<i8", torch.int64), torch.float32: ("<i4", torch.int32),
    torch.float16: ("<i2", torch.int16), torch.bfloat16: ("<i2", torch.int16),
}  # fmt: skip
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _WORDS}

Words = NDArray[Any]


def encode_values(
    tensor: Tensor, code: Code | None = None, masks: bool = False
) -> tuple[dict[str, Any], Tensor] | None:
    """What the head says of a tensor of numbers, and what is stored; None where it is best stored as it is.

    Args:
        code: the code that the numbers may have been rounded in.
        masks: store three-valued numbers as two bit masks, for speed, instead of what is smallest.
    """
    if tensor.dtype not in _WORDS or not tensor.numel():
        return None
    words = _words(tensor)
    top = words.dtype.type(np.iinfo(words.dtype).min)  # the sign's bit
    kept = np.flatnonzero(words)
    sizes = words[kept] & ~top
    found: list[tuple[dict[str, Any], Bytes]] = []
    if not len(kept) or (sizes == sizes[0]).all():
        scalar = sizes[:1] if len(kept) else np.zeros(1, words.dtype)
        minus = words[kept] < 0
        found = [_masks(len(words), kept, scalar, minus) if masks else _ternary(len(words), kept, scalar, minus)]
    elif len(kept) < len(words):
        found = [_nonzero(len(words), kept, words[kept])]
    if code is not None and np.array_equal(
        _words(torch.from_numpy(code.table).to(tensor.dtype))[code.nearest(tensor)], words
    ):
        numbers = np.array([code.mu, code.sd], dtype="<f4").view(np.uint8)
        found.append(
            ({"coding": "normal", "bits": code.bits}, np.concatenate([numbers, pack(code.nearest(tensor), code.bits)]))
        )
    if not found:
        return None
    entry, data = min(found, key=lambda one: len(one[1]))
    if len(data) + ENTRY > 0.9 * tensor.nbytes:
        return None
    dtype = {} if tensor.dtype == torch.float32 else {"dtype": str(tensor.dtype).removeprefix("torch.")}
    return entry | {"shape": list(tensor.shape)} | dtype, torch.from_numpy(data)


def shape_of(entry: Mapping[str, Any], stored: tuple[torch.dtype, int] | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a coded tensor, from the head's entry, and type and length of what is stored.

    Raises:
        IntarsiaError: where they do not fit each other. Nothing is decoded or allocated before that.
    """
    shape, name, coding = entry.get("shape"), entry.get("dtype", "float32"), entry.get("coding")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_whole(each, 1 << 48) for each in shape):
        raise IntarsiaError(f"its coding says shape {_short(shape)}; expected a list of whole numbers")
    if not isinstance(name, str) or name not in _NAMES:
        raise IntarsiaError(f"its coding says dtype {_short(name)}; expected one of {', '.join(_NAMES)}")
    count, dtype = math.prod(shape), _NAMES[name]
    if count > MOST_COUNT:
        raise IntarsiaError(f"its coding says shape {_short(shape)}; that is more numbers than any weight has")
    if stored is None or stored[0] != torch.uint8:
        raise IntarsiaError(f"numbers in the coding {coding} are said to be stored; expected one row of uint8")
    least, most = _bytes(entry, count, dtype.itemsize)
    if not least <= stored[1] <= most:
        expected = f"{least}" if least == most else f"{least} to {most}"
        raise IntarsiaError(
            f"{stored[1]} bytes are stored of it; {count} numbers in the coding {coding} need {expected}"
        )
    return tuple(shape), dtype


def decode_values(entry: Mapping[str, Any], stored: Tensor) -> tuple[Tensor, Code | None]:
    """The numbers of a coded tensor whose entry :func:`shape_of` has nothing against, and their code where they have one.

    Raises:
        IntarsiaError: where what is stored is damaged.
    """
    shape, dtype = shape_of(entry, (stored.dtype, len(stored)))
    data, count, coding, size = stored.numpy(), math.prod(shape), entry["coding"], dtype.itemsize
    if coding == "normal":
        mu, sd = np.frombuffer(data[:8].tobytes(), dtype="<f4")
        if not (np.isfinite(mu) and np.isfinite(sd)):
            raise IntarsiaError("its mean or standard deviation is no finite number; the file was changed or damaged")
        code = Code(entry["bits"], float(mu), float(sd))
        with np.errstate(over="ignore"):  # a number that is not finite is refused with the edit
            table = torch.from_numpy(code.table).to(dtype)
        return table[torch.from_numpy(unpack(data[8:], count, code.bits))].view(shape), code
    words = np.zeros(count, dtype=_WORDS[dtype][0])
    if coding == "masks":
        scalar = np.frombuffer(data[:size].tobytes(), dtype=words.dtype)[0]
        plus, minus = (unpack(mask, count, 1).astype(bool) for mask in data[size:].reshape(2, -1))
        if (plus & minus).any():
            raise IntarsiaError("numbers are both positive and negative; the file was changed or damaged")
        words[plus], words[minus] = scalar, scalar | np.iinfo(words.dtype).min
        return _tensor(words, shape, dtype), None
    kept = entry["kept"]
    numbers = size if coding == "ternary" else kept * size
    tail = packed_bytes(kept, 1) if coding == "ternary" else 0
    places = _places(data[numbers : len(data) - tail], entry, count)
    head = np.frombuffer(data[:numbers].tobytes(), dtype=words.dtype)
    if coding == "ternary":
        signs = unpack(data[len(data) - tail :], kept, 1).astype(words.dtype)
        words[places] = head[0] | (signs << (8 * size - 1))
    else:
        words[places] = head
    return _tensor(words, shape, dtype), None


def _ternary(count: int, kept: Words, scalar: Words, minus: NDArray[np.bool_]) -> tuple[dict[str, Any], Bytes]:
    entry, places = _coded_places(count, kept)
    signs = np.packbits(minus, bitorder="little")
    return {"coding": "ternary"} | entry, np.concatenate([_raw(scalar), places, signs])


def _masks(count: int, kept: Words, scalar: Words, minus: NDArray[np.bool_]) -> tuple[dict[str, Any], Bytes]:
    halves = np.zeros((2, count), dtype=bool)
    halves[minus.astype(np.int64), kept] = True
    return {"coding": "masks"}, np.concatenate(
        [_raw(scalar), *(np.packbits(half, bitorder="little") for half in halves)]
    )


def _nonzero(count: int, kept: Words, words: Words) -> tuple[dict[str, Any], Bytes]:
    entry, places = _coded_places(count, kept)
    return {"coding": "nonzero"} | entry, np.concatenate([_raw(words), places])


def _coded_places(count: int, kept: Words) -> tuple[dict[str, Any], Bytes]:
    if len(kept) == count:
        return {"kept": count}, np.empty(0, dtype=np.uint8)
    between = gaps(kept)
    bits = rice_bits(between)
    return {"kept": len(kept), "bits": bits}, rice_encode(between, bits)


def _places(data: Bytes, entry: Mapping[str, Any], count: int) -> NDArray[np.int64]:
    if entry["kept"] == count:
        return np.arange(count)
    places = from_gaps(rice_decode(data, entry["kept"], entry["bits"]))
    if len(places) and not (places[0] >= 0 and (np.diff(places) > 0).all() and places[-1] < count):
        raise IntarsiaError(f"its numbers lie beyond place {count - 1}; the file was changed or damaged")
    return places


def _bytes(entry: Mapping[str, Any], count: int, size: int) -> tuple[int, int]:
    """How many bytes the coding takes at least and at most. Raises IntarsiaError for an entry that makes no sense."""
    coding, bits, kept = (entry.get(key) for key in ("coding", "bits", "kept"))
    if coding == "normal":
        if not _whole(bits, 8) or bits not in BITS:
            raise IntarsiaError(f"its coding says bits {_short(bits)}; expected one of {', '.join(map(str, BITS))}")
        return (exact := 8 + packed_bytes(count, bits)), exact
    if coding == "masks":
        return (exact := size + 2 * packed_bytes(count, 1)), exact
    if not _whole(kept, count):
        raise IntarsiaError(f"its coding says kept {_short(kept)}; expected a whole number up to its {count} numbers")
    numbers = size + packed_bytes(kept, 1) if coding == "ternary" else kept * size
    if kept == count:
        return numbers, numbers
    if not _whole(bits, MOST_BITS):
        raise IntarsiaError(f"its coding says bits {_short(bits)}; expected a whole number up to {MOST_BITS}")
    low = numbers + packed_bytes(kept, bits)
    return low + packed_bytes(kept, 1), low + packed_bytes(kept + (count >> bits), 1)


def _words(tensor: Tensor) -> Words:
    """The bits of the numbers as whole numbers. -> (n,)."""
    order, whole = _WORDS[tensor.dtype]
    return tensor.detach().contiguous().view(-1).view(whole).numpy().astype(order, copy=False)


def _tensor(words: Words, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    native = words.astype(words.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(native).view(dtype).view(shape)


def _raw(words: Words) -> Bytes:
    return np.frombuffer(words.tobytes(), dtype=np.uint8)


def _whole(value: Any, most: int) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= most


def _short(value: Any) -> str:
    try:
        return repr(value)[:40]
    except RecursionError:
        return "a nest of lists"
