"""In which dtype this machine multiplies matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def _emulates_bfloat16() -> bool:
    """Whether the CPU is one of x86 without instructions for bfloat16, where a product of it takes three to five times as long."""
    has = (getattr(torch.cpu, name, lambda: True)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and not any(has)


EMULATES_BFLOAT16 = _emulates_bfloat16()  # asked once: torch.compile cannot trace the question


def goes_wide(x: Tensor) -> bool:
    """Whether a product with x is quicker through float32."""
    return EMULATES_BFLOAT16 and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed in float32 or wider and rounded once, whichever way is quick here. Both of one dtype.

    Only for gradients: a forward of ours uses the base's own product, so that an adapter starts as the base to the bit.
    """
    if goes_wide(left):
        return (left.float() @ right.float()).to(left.dtype)
    return left @ right
