"""The order of bytes: whatever a file or a digest holds is little-endian, on every machine."""

from __future__ import annotations

import sys

from torch import Tensor


def little_endian(raw: Tensor, itemsize: int) -> Tensor:
    """Bytes of numbers, from this machine's order to the file's, or back again: the same, or each number's turned round.

    (n * itemsize,) uint8 -> as many.
    """
    if sys.byteorder == "little" or itemsize == 1:
        return raw
    return raw.view(-1, itemsize).flip(1).reshape(-1)
