"""Calibration: what is gathered of data for choosing a support, one weight at a time. See ``intarsia.support.scorers``.

``gradient`` and ``fisher`` take a backward pass a batch. Each weight's gradient is handed on as soon as backward has finished
it and is freed at once, so the peak memory is one layer's gradient; over several batches the running sums live in temporary
files, mapped into memory, not in memory. ``inputs``, ``magnitudes``, ``gram`` and ``mean`` take a forward pass a batch and no labels; they
keep one number an input, but ``gram`` one for every two inputs, in temporary files as well. Observers take as many passes as
they ask for. Layers that are given the very same tensor share a gram, and an observer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.errors import IntarsiaError
from intarsia.observe import Observer, Watch, observe, same_inputs

Loss = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int, str], None]
Use = Callable[[str, Mapping[str, Any]], None]

OF_BACKWARD = frozenset({"gradient", "fisher"})
ON_CPU = frozenset(
    {"gram", "mean"}
)  # in float64, which not every device has; what is made of them is a matter of seconds
OF_FORWARD = frozenset({"inputs", "magnitudes", "gram", "mean"})
GATHERED = OF_BACKWARD | OF_FORWARD | {"observed"}


def shape_of(need: str, shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape of what is gathered, for a weight (O, I)."""
    rows = {"gram": shape[1:] * 2, "mean": shape[1:], "inputs": shape[1:], "magnitudes": shape[1:]}
    return rows.get(need, shape)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model computes itself from a batch with labels."""
    loss = getattr(model(**_mapping(batch)), "loss", None)
    if not isinstance(loss, Tensor):
        raise IntarsiaError(
            "the model returned no loss for a calibration batch; give it labels, or pass loss=function(model, batch)"
        )
    return loss


def _mapping(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise IntarsiaError(
            f"a calibration batch is a {type(batch).__name__}; expected a mapping of the model's inputs, labels among them, "
            "or pass loss=function(model, batch)"
        )
    return batch


def gather(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    needs: frozenset[str],
    data: Iterable[Any],
    use: Use,
    loss: Loss | None = None,
    progress: Progress | None = None,
    observers: Mapping[str, Observer] | None = None,
    confer: Callable[[Mapping[str, Any]], None] = lambda observers: None,
) -> None:
    """Call ``use(name, found)`` once for every weight, ``found`` holding what is needed, float32 or wider:

        gradient  (O, I)  sum over batches of G, the loss gradient of the weight
        fisher    (O, I)  sum over batches of G^2
        inputs    (I,)    ||x_j|| over all tokens that reach the layer; those that ``attention_mask`` hides do not count
        magnitudes (I,)   sum of |x_j| over them
        gram      (I, I)  mean of x x^T over them, float64 on the CPU
        mean      (I,)    mean of x over them, float64 on the CPU
        observed          the layer's observer, satisfied, or as it is after many passes: see ``intarsia.observe``

    The model runs in eval mode, so that this is the same at every call; modes, ``requires_grad`` and ``.grad`` are as before
    when this returns or raises. The tensors are only valid during the call.

    Args:
        weights: leaves, by the name of the layer that each belongs to.
        observers: by layer, where ``observed`` is needed.
        confer: called with them after every batch that they see.

    Raises:
        IntarsiaError: for no batches, a batch without loss, or a weight that the data does not reach.
    """
    batches = list(data)
    if not batches:
        raise IntarsiaError("the calibration data is empty; scorers that look at data need at least one batch")
    backward = bool(needs & OF_BACKWARD)
    remaining = dict(weights)

    def forward(batch: Any) -> None:
        _forward(model, batch, loss)

    with only_requiring_grad(model, ()):
        model.eval()
        observed = observe(model, observers, batches, forward, confer, progress) if observers else {}
        leaders = same_inputs(model, list(weights), lambda: forward(batches[0])) if "gram" in needs else {}
    if needs <= {"observed"}:
        for name in weights:
            use(name, {"observed": observed[name]})
        return
    with (
        only_requiring_grad(model, weights.values() if backward else ()),
        torch.enable_grad(),
        Mapped() as sums,
        _summing(model, leaders or {n: n for n in weights}, needs, sums) as inputs,
    ):
        model.eval()

        def hand_on(name: str, found: dict[str, Tensor]) -> None:
            device = remaining.pop(name).device
            if inputs:
                found |= {need: t for need, t in inputs.sums(name).items() if need in needs}
            here: dict[str, Any] = {need: t if need in ON_CPU else t.to(device) for need, t in found.items()}
            use(name, here | ({"observed": observed[name]} if observed else {}))

        for number, batch in enumerate(batches):
            last = number == len(batches) - 1

            def take(parameter: Tensor, name: str, last: bool = last) -> None:
                G, parameter.grad = parameter.grad, None
                assert G is not None
                found = _add(sums, name, G, needs, several=len(batches) > 1)
                if last:
                    hand_on(name, found)

            hooks = [
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(p, name))
                for name, parameter in weights.items()
                if backward
            ]
            try:
                if inputs:
                    inputs.begin(batch)
                if backward:
                    (loss or model_loss)(model, batch).backward()
                else:
                    _forward(model, batch, loss)
            finally:
                for hook in hooks:
                    hook.remove()
            if progress:
                progress(number + 1, len(batches), "calibrating")
        for name in list(remaining):  # the last batch need not reach what an earlier one did, such as an expert
            found = {need: sums[f"{name}/{need}"] for need in needs & OF_BACKWARD if f"{name}/{need}" in sums}
            if (found or not backward) and (inputs is None or inputs.reached(name)):
                hand_on(name, found)
    if remaining:
        what = (
            "the loss of the calibration data does not depend on" if backward else "the calibration data does not reach"
        )
        raise IntarsiaError(f"{what} {', '.join(remaining)}; exclude them or give other data")


def _add(sums: Mapped, name: str, G: Tensor, needs: frozenset[str], several: bool) -> dict[str, Tensor]:
    """What is known of a weight with this batch's gradient: in mapped files where there are more batches than one."""
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    found = {}
    for need in sorted(needs & OF_BACKWARD):
        term = G.square() if need == "fisher" else G
        found[need] = sums.add(f"{name}/{need}", term) if several else term
    return found


def _forward(model: nn.Module, batch: Any, loss: Loss | None) -> None:
    with torch.no_grad():
        if loss:
            loss(model, batch)
        else:
            model(**_mapping(batch))


class Mapped:
    """Tensors by name in temporary files, mapped into memory: as large as the disk allows, gone with the block."""

    def __enter__(self) -> Mapped:
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.tensors: dict[str, Tensor] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self.tensors.clear()
        if self.folder:
            self.folder.cleanup()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def add(self, name: str, tensor: Tensor) -> Tensor:
        """Add to what stands under the name, zero at first. -> the sum, on the CPU."""
        return self._place(name, tensor).add_(tensor.to("cpu"))

    def set(self, name: str, tensor: Tensor) -> None:
        """Keep a copy under the name."""
        self._place(name, tensor).copy_(tensor)

    def _place(self, name: str, like: Tensor) -> Tensor:
        if not like.numel():  # nothing can be mapped of no length
            self.tensors[name] = torch.empty_like(like, device="cpu")
        if name not in self.tensors:
            self.folder = self.folder or tempfile.TemporaryDirectory(prefix="intarsia-")
            file = os.path.join(self.folder.name, f"{len(self.tensors)}.bin")
            total = torch.from_file(file, shared=True, size=like.numel(), dtype=like.dtype)
            self.tensors[name] = total.view(like.shape)
        return self.tensors[name]


class _Inputs(Watch):
    """What comes into layers, summed in several ways, gathered by hooks that only look. ``leaders``: see ``same_inputs``."""

    def __init__(self, model: nn.Module, leaders: Mapping[str, str], needs: frozenset[str], sums: Mapped) -> None:
        super().__init__(model, sorted(set(leaders.values()), key=list(leaders).index), self._sum)
        self.leaders, self.needs, self.grams = leaders, needs, sums
        self.squares: dict[str, Tensor] = {}
        self.magnitudes: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def reached(self, name: str) -> bool:
        return self.leaders[name] in self.squares

    def sums(self, name: str) -> dict[str, Tensor]:
        """By need: (I,), the gram (I, I)."""
        name = self.leaders[name]
        count = max(1, self.counts[name])
        found = {"inputs": self.squares[name].sqrt(), "magnitudes": self.magnitudes[name]}
        if "mean" in self.needs:
            found["mean"] = self.means[name] / count
        if "gram" in self.needs:
            found["gram"] = self.grams[f"{name}/gram"] / count
        return found

    def _sum(self, name: str, x: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        for sums, order in ((self.squares, 2), (self.magnitudes, 1)):
            more = torch.linalg.vector_norm(x, order, dim=0, dtype=wide) ** order
            sums[name] = sums[name] + more if name in sums else more
        self.counts[name] = self.counts.get(name, 0) + len(x)
        if self.needs & ON_CPU:
            rows = x.to("cpu", torch.float64)
            if "mean" in self.needs:
                self.means[name] = self.means.get(name, 0) + rows.sum(0)
            if "gram" in self.needs:
                self.grams.add(f"{name}/gram", rows.T @ rows)


@contextmanager
def _summing(
    model: nn.Module, leaders: Mapping[str, str], needs: frozenset[str], sums: Mapped
) -> Iterator[_Inputs | None]:
    """Within the block what comes into the layers is summed, where that is needed."""
    inputs = _Inputs(model, leaders, needs, sums) if needs & OF_FORWARD else None
    with inputs or nullcontext():
        yield inputs


@contextmanager
def only_requiring_grad(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Within the block these weights alone take a gradient; flags, gradients and modes are as before afterwards."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, training in modes:
            module.training = training
