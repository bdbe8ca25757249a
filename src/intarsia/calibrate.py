"""Calibration: the loss gradient of chosen weights over some data, one weight at a time.

Each weight's gradient is handed on as soon as backward has finished it and is freed at once, so the peak memory is one
layer's gradient. Over several batches the running sums live in a temporary file, mapped into memory, not in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.errors import IntarsiaError

Loss = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int, str], None]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model computes itself from a batch with labels."""
    if not isinstance(batch, Mapping):
        raise IntarsiaError(
            f"a calibration batch is a {type(batch).__name__}; expected a mapping of the model's inputs, labels among them, "
            "or pass loss=function(model, batch)"
        )
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise IntarsiaError(
            "the model returned no loss for a calibration batch; give it labels, or pass loss=function(model, batch)"
        )
    return loss


def gather_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    data: Iterable[Any],
    use: Callable[[str, Tensor], None],
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> None:
    """Call ``use(name, G)`` for every weight, G (O, I) its loss gradient summed over the batches, float32 or wider.

    The model runs in eval mode, so that the gradient is the same at every call; modes, ``requires_grad`` and ``.grad`` are
    as before when this returns or raises. G is only valid during the call.

    Raises:
        IntarsiaError: for no batches, a batch without loss, or a weight that the loss does not depend on.
    """
    batches = list(data)
    if not batches:
        raise IntarsiaError("the calibration data is empty; gradient scorers need at least one batch")
    loss = loss or model_loss
    remaining = dict(weights)
    with _only_requiring_grad(model, list(weights.values())), _Sums(len(batches) > 1) as sums:
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1

            def take(parameter: Tensor, name: str, last: bool = last) -> None:
                total = sums.add(name, parameter.grad)
                parameter.grad = None
                if last:
                    use(name, total)
                    remaining.pop(name, None)

            hooks = [
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(p, name))
                for name, parameter in weights.items()
            ]
            try:
                loss(model, batch).backward()
            finally:
                for hook in hooks:
                    hook.remove()
            if progress:
                progress(number + 1, len(batches), "calibrating")
        for name in list(
            remaining
        ):  # the last batch need not reach a weight that an earlier one did, such as an expert
            if name in sums.totals:
                use(name, sums.totals[name].to(remaining.pop(name).device))
    if remaining:
        raise IntarsiaError(
            f"the loss of the calibration data does not depend on {', '.join(remaining)}; exclude them or give other data"
        )


class _Sums:
    """Running sums by name: passed through for a single batch, in a mapped temporary file otherwise."""

    def __init__(self, several: bool):
        self.several = several
        self.totals: dict[str, Tensor] = {}

    def __enter__(self) -> _Sums:
        self.folder = tempfile.TemporaryDirectory(prefix="intarsia-") if self.several else None
        return self

    def __exit__(self, *_: object) -> None:
        self.totals.clear()
        if self.folder:
            self.folder.cleanup()

    def add(self, name: str, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if self.folder is None:
            return gradient
        if name not in self.totals:
            file = os.path.join(self.folder.name, f"{len(self.totals)}.bin")
            total = torch.from_file(file, shared=True, size=gradient.numel(), dtype=gradient.dtype)
            self.totals[name] = total.view(gradient.shape)
        self.totals[name].add_(gradient.to("cpu"))
        return self.totals[name].to(gradient.device)


@contextmanager
def _only_requiring_grad(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, training in modes:
            module.training = training
