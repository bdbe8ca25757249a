"""LoRD: a linear layer becomes two thin ones that keep the directions in which its outputs vary.    y ~ Q Q^T (W x + b - mu) + mu

Kaushal, Vaidhya and Rish 2023, "LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression", arXiv:2309.14021,
section 3; the decomposition is the atomic feature mimicking of Yu and Wu 2023, "Compressing Transformers: Features Are Low-Rank, but
Weights Are Not!", AAAI. Shapes: O out_features, I in_features, r rank.

    Q (O, r): the first eigenvectors of the outputs' covariance on calibration data, mu their mean
    W1 = Q^T W,  W2 = Q,  b2 = (I - Q Q^T) mu + Q Q^T b

The mean output stays what it was, and the mean square of what is lost is the sum of the eigenvalues left out: the least of all
linear maps of rank r applied to the output. The covariance is W C W^T, C that of the inputs, so inputs are looked at, not outputs. It pays
where r (O + I) < O I; a layer where it would not is left whole. ``by="weight"`` cuts the weight's own singular values instead, for
comparison. All layers are looked at in the whole model, once; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.bases import packing_of
from intarsia.bases.thin import Thin, put
from intarsia.calibrate import Loss, Progress, gather
from intarsia.errors import IntarsiaError
from intarsia.site import ALL_LINEAR, find_sites
from intarsia.support import principal

BY = ("outputs", "weight")


@dataclass(frozen=True)
class Directions:
    """What is known of one layer: all that a factoring to any rank takes.

    Attributes:
        Q: (O, n) the directions of its outputs, the most telling first, n = min(O, I).
        energy: (n,) what of the outputs varies along each; with ``by="weight"`` the squares of the singular values.
        mean: (I,) of its inputs, or zeros with ``by="weight"``: what is lost then has a mean.
    """

    Q: Tensor
    energy: Tensor
    mean: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.Q.shape[0], len(self.mean)

    def factors(self, W: Tensor, b: Tensor | None, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """W1 (r, I), W2 (O, r), b2 (O,) in float64."""
        Q, W = self.Q[:, :rank].double(), W.detach().to("cpu", torch.float64)
        W1 = Q.T @ W
        b2 = W @ self.mean - Q @ (W1 @ self.mean)  # b2 = b + (I - Q Q^T) W E[x], the same number
        return W1, Q, b2 if b is None else b2 + b.detach().to(b2)

    def lost(self, rank: int) -> float:
        """The share of what varies that a rank does not reach."""
        total = float(self.energy.sum())
        return float(self.energy[rank:].sum()) / total if total else 0.0


@dataclass(frozen=True)
class Layer:
    """What became of one layer: its rank, or None where it stayed whole."""

    name: str
    shape: tuple[int, int]
    rank: int | None
    lost: float

    @property
    def before(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def after(self) -> int:
        """Numbers of its weights; of thin ones with the bias, which not every layer had."""
        O, I = self.shape
        return self.before if self.rank is None else self.rank * (O + I) + O


@dataclass(frozen=True)
class Factored:
    """What became of a model."""

    layers: list[Layer]

    @property
    def thin(self) -> int:
        """How many layers are two now."""
        return sum(layer.rank is not None for layer in self.layers)

    @property
    def before(self) -> int:
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        return sum(layer.after for layer in self.layers)

    def __str__(self) -> str:
        return (
            f"{self.thin} of {len(self.layers)} layers are thin; their weights took {self.before:,} numbers and take {self.after:,} "
            f"({self.after / self.before:.1%})"
        )


def survey(
    model: nn.Module,
    data: Iterable[Any] = (),
    targets: str | Iterable[str] = ALL_LINEAR,
    exclude: str | Iterable[str] = (),
    *,
    by: str = "outputs",
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> dict[str, Directions]:
    """What is known of each targeted Linear after a pass over the data. The model is as before.

    Raises:
        IntarsiaError: for targets that match nothing or are no plain Linear, a model with adapters, no data.
    """
    if by not in BY:
        raise IntarsiaError(f"by={by!r}: expected {' or '.join(BY)}")
    if hasattr(model, "_intarsia"):
        raise IntarsiaError("the model has adapters; detach them before its layers are made thin")
    layers = {name: model.get_submodule(name) for name in find_sites(model, targets, exclude)}
    odd = [name for name, layer in layers.items() if not _plain(layer)]
    if odd:
        raise IntarsiaError(
            f"{odd[0]} is a {type(layers[odd[0]]).__name__}; only plain nn.Linear layers become two: exclude {odd[0]!r}"
        )
    weights = {name: layer.weight for name, layer in layers.items()}
    found: dict[str, Directions] = {}

    def use(name: str, gathered: Mapping[str, Any]) -> None:
        W = weights[name].detach()  # type: ignore[operator]
        if by == "weight":
            (Q, S), mean = principal(W, None, min(W.shape)), torch.zeros(W.shape[1], dtype=torch.float64)
        else:
            mean = gathered["mean"]
            Q, S = principal(W, gathered["gram"] - mean[:, None] * mean, min(W.shape))
        found[name] = Directions(Q.float(), S.square(), mean)
        if progress:
            progress(len(found), len(layers), "directions of the outputs")

    if by == "weight":
        for name in weights:
            use(name, {})
    else:
        gather(model, weights, frozenset({"gram", "mean"}), data, use, loss, progress)  # type: ignore[arg-type]
    return {name: found[name] for name in layers}


def factorize(
    model: nn.Module,
    directions: Mapping[str, Directions],
    rank: float | Mapping[str, float] | Callable[[str], float],
    *,
    multiple: int = 1,
    always: bool = False,
) -> Factored:
    """Make layers thin, in place. -> what became of each.

    Args:
        directions: of :func:`survey`, on this very model.
        rank: a share of the full rank where below 1, else a number; for all layers, or by the last part of the name (``up_proj``) or
            the whole one; a layer that is not named stays whole.
        multiple: ranks are rounded up to a multiple of it, as a GPU's tiles like it: 128 in the paper.
        always: make layers thin even where that takes more numbers.

    Raises:
        IntarsiaError: for a rank that is none, or a name that fits no layer. Nothing is changed then.
    """
    chosen = {name: _rank(name, one, rank, multiple) for name, one in directions.items()}
    if isinstance(rank, Mapping):
        odd = [word for word in rank if not any(word in (name, _last(name)) for name in directions)]
        if odd:
            raise IntarsiaError(f"rank: {odd[0]!r} fits none of the {len(directions)} layers")
    made, layers = {}, []
    for name, one in directions.items():
        (O, I), r = one.shape, chosen[name]
        if r is not None and (always or r * (O + I) + O < O * I):
            old: Any = model.get_submodule(name)
            made[name] = Thin.of(*one.factors(old.weight, old.bias, r), like=old)
        layers.append(Layer(name, one.shape, r if name in made else None, one.lost(r) if name in made and r else 0.0))
    put(model, made)
    return Factored(layers)


def _rank(name: str, one: Directions, rank: Any, multiple: int) -> int | None:
    if callable(rank):
        rank = rank(name)
    elif isinstance(rank, Mapping):
        rank = rank.get(name, rank.get(_last(name)))
    if rank is None:
        return None
    full = min(one.shape)
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not rank > 0 or (rank >= 1 and rank != int(rank)):
        raise IntarsiaError(f"{name}: rank {rank!r}; expected a share between 0 and 1, or a whole number from 1 up")
    wanted = rank * full if rank < 1 else rank
    return min(full, max(1, -(-round(wanted) // multiple)) * multiple)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _plain(layer: nn.Module) -> bool:
    return type(layer).forward is nn.Linear.forward and packing_of(layer.weight).in_place
