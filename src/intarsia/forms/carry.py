"""Notes from a forward: what it saw, for ``before_step`` to read.    grad(carrier) += TINY * amount(dL/dy)

A forward writes nothing, and yet a routed mixture has to know how often each expert was chosen, and an allocator how much a change
mattered. Such sums travel on the gradient of a parameter of their own, the *carrier* (``Method.carriers``): so they add up over
accumulated batches, are right under both modes of gradient checkpointing, and are averaged over processes, all without a further word.
No optimizer moves a carrier: its gradient is gone after ``before_step``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = 2.0**-64  # a power of two, so no bit is lost; so small that clipping the norm of all gradients does not feel it


def carry(y: Tensor, carrier: Tensor, amount: Callable[[Tensor], Tensor]) -> Tensor:
    """y as it is. In backward the carrier's gradient gets ``TINY * amount(dL/dy)``, shaped as the carrier, in its dtype.

    Whoever runs backward on a loss that is scaled (fp16) scales what was carried as well where amount depends on the gradient.
    """
    if not (torch.is_grad_enabled() and carrier.requires_grad):
        return y
    return _Carry.apply(y, carrier, amount)  # type: ignore[no-any-return, no-untyped-call]


def carried(carrier: Tensor) -> Tensor | None:
    """What was carried since the last optimizer step, summed; None where no backward came by."""
    return None if carrier.grad is None else carrier.grad / TINY


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, carrier: Tensor, amount: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.amount, ctx.like = amount, (carrier.shape, carrier.dtype)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor, None]:
        shape, dtype = ctx.like
        return gy, (TINY * ctx.amount(gy).to(dtype)).reshape(shape), None
