"""A model's weights into fewer bits and back, layer by layer, in place."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from intarsia.bases.packing import PLAIN, packing_of
from intarsia.errors import IntarsiaError, nearest

Progress = Callable[[int, int, str], None]  # done, all, what


def quantise(
    model: nn.Module, load_in: str, keep: tuple[str, ...] = (), progress: Progress | None = None
) -> dict[str, nn.Linear]:
    """Store every linear weight but the output head's in fewer bits, in place. -> the layers, by dotted name.

    ``nf4``: 4-bit codes in blocks of 64 with scales that are 8-bit codes themselves (Dettmers et al. 2023, "QLoRA",
    arXiv:2305.14314), by bitsandbytes; about 0.52 bytes an entry. ``int8``: 8-bit codes with one scale a row, by torchao;
    about 1 byte. The weights are rounded for good; what they stand for afterwards is the base, to the bit.
    A packed weight stays where the model is, and each layer is freed before the next is packed.

    Args:
        keep: layers to leave alone, by dotted name or its last part.

    Raises:
        IntarsiaError: for another word, a missing package, names in ``keep`` that match nothing, a model with adapters,
            or one whose linear weights are packed already. Nothing is changed then.
    """
    check_load_in(load_in)
    pack = LOAD_IN[load_in]
    _no_adapters(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    faults = [
        f"keep={word!r} matches none of the {len(layers)} linear layers; {nearest(word, layers)}"
        for word in keep
        if not any(_named(name, word) for name in layers)
    ]
    chosen = {name: m for name, m in layers.items() if not any(_named(name, word) for word in keep)}
    chosen = {name: m for name, m in chosen.items() if not _shared(model, m)}
    for name, layer in chosen.items():
        if packing_of(layer.weight) is not PLAIN:
            faults.append(f"{name}: its weight is stored in {packing_of(layer.weight).name(layer.weight)} already")
        elif not layer.weight.is_floating_point() or layer.weight.is_meta:
            faults.append(
                f"{name}: its weight has no numbers to quantise: {layer.weight.dtype} on {layer.weight.device}"
            )
    if not chosen:
        faults.append(f"{type(model).__name__} has no linear weight to store in {load_in}")
    if faults:
        raise IntarsiaError("\n".join(faults[:8] + ([f"... and {len(faults) - 8} more"] if len(faults) > 8 else [])))
    packed = {}
    for done, (name, layer) in enumerate(chosen.items(), 1):
        with torch.no_grad():
            packed[name] = _replace(model, name, layer, pack(layer))
        if progress:
            progress(done, len(chosen), f"storing the weights in {load_in}")
    return packed


def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, nn.Linear]:
    """Every packed weight becomes the plain matrix that it stands for, in place. -> the layers, by dotted name.

    The numbers are those that the packed base computed with, rounded to ``dtype`` (by default their own); the digest is
    another one, so an adapter of the packed base needs ``any_base=True`` here.

    Raises:
        IntarsiaError: for a model with adapters, or without packed weights.
    """
    _no_adapters(model)
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and packing_of(m.weight) is not PLAIN
    }
    faults = [f"{name}: {fault}" for name, m in layers.items() if (fault := packing_of(m.weight).fault(m.weight))]
    if not layers:
        faults.append(f"{type(model).__name__} has no quantised weight")
    if faults:
        raise IntarsiaError("\n".join(faults[:8]))
    return {name: _replace(model, name, m, _plain(m, dtype)) for name, m in layers.items()}


# ------------------------------------------------------------------ one layer
def _nf4(layer: nn.Linear) -> nn.Linear:
    with _quiet():
        from bitsandbytes.nn import Linear4bit, Params4bit

    weight = layer.weight.detach()
    packed = Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(weight.device)
    packed.quant_state = packed.weight.quant_state
    packed.support_avx512bf16_for_cpu = False  # see keep_bits
    packed.bias = layer.bias
    return packed  # type: ignore[no-any-return]


def _int8(layer: nn.Linear) -> nn.Linear:
    with _quiet():
        from torchao.quantization import Int8Tensor, PerRow

    weight = Int8Tensor.from_hp(layer.weight.detach(), PerRow())
    return _linear(layer, weight)


def _plain(layer: nn.Linear, dtype: torch.dtype | None) -> nn.Linear:
    weight: Any = layer.weight
    packing = packing_of(weight)
    return _linear(layer, packing.read(weight, dtype or packing.dtype(weight)))


def _linear(layer: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = layer.bias
    return made


LOAD_IN: dict[str, Callable[[nn.Linear], nn.Linear]] = {"nf4": _nf4, "int8": _int8}
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}


def _replace(model: nn.Module, name: str, old: nn.Linear, new: nn.Linear) -> nn.Linear:
    """Put ``new`` wherever the model has ``old``: a module may be shared under several names."""
    new.train(old.training)
    for module in list(model.modules()):
        for child, found in list(module.named_children()):
            if found is old:
                setattr(module, child, new)
    return new


def _shared(model: nn.Module, layer: nn.Linear) -> bool:
    """The output head, and any weight that something else reads as a plain matrix too."""
    get = getattr(model, "get_output_embeddings", None)
    if callable(get) and get() is layer:
        return True
    owners = [m for m in model.modules() if any(p is layer.weight for p in m._parameters.values())]
    return len(owners) > 1 or any(
        isinstance(m, nn.MultiheadAttention) and layer in m.children() for m in model.modules()
    )


def _named(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def check_load_in(load_in: str) -> None:
    """Raise IntarsiaError for an unknown word or a package that is not installed."""
    if load_in not in LOAD_IN:
        raise IntarsiaError(f"load_in={load_in!r}: expected {' or '.join(LOAD_IN)}; {nearest(load_in, LOAD_IN)}")
    package = PACKAGES[load_in]
    if importlib.util.find_spec(package) is None:
        raise IntarsiaError(
            f"load_in={load_in!r} needs the package {package}, which is not installed: pip install 'intarsia[{load_in}]'"
        )


def _no_adapters(model: nn.Module) -> None:
    if hasattr(model, "_intarsia"):
        raise IntarsiaError("the model has adapters; detach them before its weights are stored in another way")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """At import both packages tell of kernels that they cannot load on this machine, and torch of torchao's enums."""
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
