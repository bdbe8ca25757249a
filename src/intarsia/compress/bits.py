"""Numbers in 1, 2, 4 or 8 bits, after training.    w' = mu + sd * q, q the nearest of 2^b medians of a standard normal

Jie, Wang & Deng 2023 (Bi-LoRA, Bi-AdaptFormer); the code itself is :mod:`intarsia.store.normal`. Each matrix has its own mean and standard deviation:
b bits a number and 8 bytes. The authors train with the rounding in the forward pass; here what was trained is rounded once.
"""

from __future__ import annotations

from intarsia.compress.numbers import made_of, numbers
from intarsia.errors import IntarsiaError
from intarsia.store import BITS, Adapter, Code


def in_bits(adapter: Adapter, bits: int) -> Adapter:
    """Every learned number as one of 2^bits of its matrix. The support of a sparse adapter stays as it is.

    Raises:
        IntarsiaError: for another number of bits, and edits that cannot be compressed.
    """
    if bits not in BITS or isinstance(bits, bool):
        raise IntarsiaError(f"bits={bits!r}; expected one of {', '.join(map(str, BITS))}")
    found = numbers(adapter)
    codes = {name: Code.of(tensor, bits) for name, tensor in found.items() if tensor.numel()}
    rounded = {name: codes[name].rounded(tensor) if name in codes else tensor for name, tensor in found.items()}
    return made_of(adapter, rounded, {"to": "bits", "bits": bits}, codes)
