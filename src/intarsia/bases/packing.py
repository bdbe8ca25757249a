"""Packings: how a weight is stored. A plain one is a matrix of floats; packed ones are codes and scales.

One stateless object a kind, so that a layer may carry it through deepcopy and pickle:

    read        the numbers that the stored bits stand for
    product     x W^T + b without an O x I tensor that outlives the call; backward reads the weight again
    in_place    whether numbers can be set into the stored weight: among codes they cannot, for the scale of a whole block
                would change with them

Nothing here writes a weight. The packages are imported by whoever made it, so none is needed to import this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Weight = Any  # a tensor, with what its package hangs on it


class Packing(ABC):
    """One way to store the weight (O, I) of a Linear."""

    in_place: ClassVar[bool] = False

    @abstractmethod
    def holds(self, weight: Weight) -> bool:
        """Whether this weight is stored so."""

    @abstractmethod
    def name(self, weight: Weight) -> str:
        """As in ``load_in`` and in an adapter's file, e.g. ``nf4``; a plain weight's is its dtype."""

    @abstractmethod
    def dtype(self, weight: Weight) -> torch.dtype:
        """Of the numbers that the bits stand for."""

    def shape(self, weight: Weight) -> torch.Size:
        """(O, I)."""
        return weight.shape  # type: ignore[no-any-return]

    @abstractmethod
    def read(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I): a new tensor without a graph where the weight is packed."""

    def fault(self, weight: Weight) -> str | None:
        """Why the weight cannot be read, or None."""
        return None

    def stored(self, weight: Weight) -> dict[str, Tensor]:
        """The plain tensors that a state dict's entry for the weight is made of, by the rest of their name."""
        return {"": weight}

    def product(self, x: Tensor, weight: Weight, b: Tensor | None) -> Tensor:
        """x W^T + b. (..., I) -> (..., O)."""
        x = x.to(_autocast_dtype(x) or x.dtype)
        return _Product.apply(x, None if b is None else b.to(x.dtype), None, partial(self.read, weight))  # type: ignore[no-any-return, no-untyped-call]


class Plain(Packing):
    """Floats. ``read`` gives the weight itself where the dtype is its own."""

    in_place = True

    def holds(self, weight: Weight) -> bool:
        return True

    def name(self, weight: Weight) -> str:
        return str(weight.dtype).removeprefix("torch.")

    def dtype(self, weight: Weight) -> torch.dtype:
        return weight.dtype  # type: ignore[no-any-return]

    def read(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype)  # type: ignore[no-any-return]


class FourBit(Packing):
    """bitsandbytes' Linear4bit: NF4 or FP4 codes, a scale for 64 of them, the scales 8-bit codes again or floats."""

    def holds(self, weight: Weight) -> bool:
        return _made_by(weight, "bitsandbytes", "Params4bit")

    def name(self, weight: Weight) -> str:
        return str(weight.quant_type)

    def dtype(self, weight: Weight) -> torch.dtype:
        return weight.quant_state.dtype  # type: ignore[no-any-return]

    def shape(self, weight: Weight) -> torch.Size:
        return torch.Size(weight.quant_state.shape)

    def read(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        numbers: Tensor = dequantize_4bit(weight.detach(), weight.quant_state)
        return numbers.to(dtype)

    def fault(self, weight: Weight) -> str | None:
        if weight.quant_state is None:
            return NOT_YET
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            return (
                "bitsandbytes has rearranged its weight for this CPU in a forward pass in eval mode, and rounded its "
                "scales; load the model again, and attach before the first such pass"
            )
        return None

    def product(self, x: Tensor, weight: Weight, b: Tensor | None) -> Tensor:
        # Not the layer's own forward, which writes: it casts the bias in place, and repacks on some CPUs (see keep_bits).
        x = x.to(_autocast_dtype(x) or x.dtype)
        if torch.is_grad_enabled() or x.dtype == torch.float64:
            return super().product(x, weight, b)
        from bitsandbytes import matmul_4bit

        b = None if b is None else b.to(x.dtype)
        return matmul_4bit(x, weight, quant_state=weight.quant_state, bias=b)  # type: ignore[no-any-return]


class EightBit(Packing):
    """bitsandbytes' Linear8bitLt: int8 codes with a scale a row. Its own forward rounds x to int8 too; here x is as it is."""

    def holds(self, weight: Weight) -> bool:
        return _made_by(weight, "bitsandbytes", "Int8Params") and not getattr(weight, "has_fp16_weights", False)

    def name(self, weight: Weight) -> str:
        return "llm-int8"

    def dtype(self, weight: Weight) -> torch.dtype:
        return torch.float32  # of the scales; from what they were made is not kept

    def read(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        numbers: Tensor = weight.detach().float() * (weight.SCB.float()[:, None] / 127)
        return numbers.to(dtype)

    def fault(self, weight: Weight) -> str | None:
        return NOT_YET if weight.SCB is None else None


class TorchAO(Packing):
    """A tensor subclass of torchao in an ordinary nn.Linear, such as int8 codes with a scale a row."""

    def holds(self, weight: Weight) -> bool:
        return _made_by(weight, "torchao") and hasattr(weight, "dequantize")

    def name(self, weight: Weight) -> str:
        return type(weight).__name__.removesuffix("Tensor").lower()

    def dtype(self, weight: Weight) -> torch.dtype:
        return weight.dtype  # type: ignore[no-any-return]

    def read(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        numbers: Tensor = weight.detach().dequantize()
        return numbers.to(dtype)

    def stored(self, weight: Weight) -> dict[str, Tensor]:
        names, _ = weight.__tensor_flatten__()
        return {
            f".{name}{rest}": tensor
            for name in names
            for rest, tensor in packing_of(getattr(weight, name)).stored(getattr(weight, name)).items()
        }


NOT_YET = "its weight is quantised when the model is moved to a device; do that first: model.to(device)"
PLAIN = Plain()
PACKINGS: tuple[Packing, ...] = (FourBit(), EightBit(), TorchAO(), PLAIN)


def packing_of(weight: Weight) -> Packing:
    """How a weight is stored."""
    return next(packing for packing in PACKINGS if packing.holds(weight))


def keep_bits(model: nn.Module) -> None:
    """Have bitsandbytes leave its weights as they are.

    On a CPU with AVX512-BF16, Linear4bit repacks its weight with loss in the first forward in eval mode; Linear8bitLt
    moves the scales away from the weight in any forward, and takes them from there again.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
        weight: Any = getattr(module, "weight", None)
        if isinstance(packing_of(weight), EightBit) and weight.SCB is None:
            weight.CB, weight.SCB = module.state.CB, module.state.SCB


def _made_by(weight: Tensor, package: str, name: str | None = None) -> bool:
    kind = type(weight)
    return kind.__module__.partition(".")[0] == package and name in (None, kind.__name__)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes on x's device, or None outside of it."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # autocast leaves float64 alone
        return None
    return torch.get_autocast_dtype(device)


@contextmanager
def differentiable(layers: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Within the block the layers' weights have gradients. -> for each layer its weight, or what stands in for a packed one.

    Codes have no gradient, so a leaf of the weight's shape and without memory of its own takes that of the numbers. Only
    tensors that require it get one, and only while a forward within the block is differentiated.
    """
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
    packed = {name: layer for name, layer in layers.items() if not packing_of(layer.weight).in_place}
    try:
        for name, layer in packed.items():
            weight, packing = layer.weight, packing_of(layer.weight)
            leaf = torch.zeros((), device=weight.device, dtype=packing.dtype(weight)).expand(packing.shape(weight))
            layer.forward, weights[name] = partial(_sensed, layer, leaf), leaf
        yield weights
    finally:
        for layer in packed.values():
            vars(layer).pop("forward", None)


def _sensed(layer: Any, leaf: Tensor, x: Tensor) -> Tensor:
    weight, b = layer.weight, layer.bias
    x = x.to(_autocast_dtype(x) or x.dtype)
    b = None if b is None else b.to(x.dtype)
    return _Product.apply(x, b, leaf, partial(packing_of(weight).read, weight))  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    """y = x W^T + b. Keeps no numbers of W: backward reads it again. ``leaf``: what takes dL/dW, if anything does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, leaf: Tensor | None, read: partial[Tensor]) -> Tensor:
        ctx.read = read
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None)
        return F.linear(x, read(x.dtype), b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        tokens = gy.reshape(-1, gy.shape[-1])
        gx = gy @ ctx.read(gy.dtype) if ctx.needs_input_grad[0] else None
        gb = tokens.sum(0) if ctx.needs_input_grad[1] else None
        gW = tokens.mT @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[2] else None
        return gx, gb, gW, None
