"""What comes into weights: root mean squares of the inputs, on given data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from intarsia.calibrate import Loss, Progress, gather
from intarsia.site import site_at


def input_norms(
    model: nn.Module,
    weights: Iterable[str],
    data: Iterable[Any],
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The norm of every input of each weight over all tokens of the data, ``{weight: (I,)}``: a forward pass a batch.

    Only their proportions matter to :func:`intarsia.analyze.interference`; the model is left as it was.

    Raises:
        IntarsiaError: for no batches, a weight that the data does not reach, and layers that are not linear.
    """
    named = {weight.removesuffix(".weight"): weight for weight in weights}
    found: dict[str, Tensor] = {}

    def use(layer: str, gathered: Any) -> None:
        found[named[layer]] = gathered["inputs"].detach().cpu().clone()

    layers = {layer: site_at(model, layer).weight for layer in named}
    gather(model, layers, frozenset({"inputs"}), data, use, loss, progress)
    return found
