"""The lottery ticket: train the weights whole, keep where they moved most, put them back, and train only that.

LT-SFT (Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", arXiv:2110.07560, section 3), as SFTM
(arXiv:2204.02292) uses it for rankers:

    theta1 = train(theta0);   support = the K largest |theta1 - theta0|, over all weights together;   theta <- theta0

and then the support alone is trained, as any sparse adapter is. With n iterations the first K / n are taken after a dense training,
these are trained sparsely, the next dense training begins there, and so on; the supports are nested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intarsia import chain
from intarsia.bases import packing_of
from intarsia.calibrate import Mapped, only_requiring_grad
from intarsia.disjoint import Avoid
from intarsia.edits import Sparse
from intarsia.errors import IntarsiaError
from intarsia.method import Method
from intarsia.model import attach, attached_names, detach, states, sync
from intarsia.model import plan as plan_sites
from intarsia.site import ALL_LINEAR, Site, site_at
from intarsia.support import Granularity

Train = Callable[[nn.Module], object]
Learned = Mapping[str, tuple[Granularity, Tensor, Tensor]]  # by site: what kind of units, which, and their change


def lottery(
    model: nn.Module,
    method: Method,
    train: Train,
    targets: str | Iterable[str] = ALL_LINEAR,
    *,
    name: str = "default",
    exclude: str | Iterable[str] = (),
    avoid: Avoid = (),
    iterations: int = 1,
    seed: int = 0,
) -> None:
    """Attach an adapter where a first, dense training moves the weights most. In place; the base has its own bits again.

    Args:
        method: one that chooses by movement: ``Shira(density=..., scorer="movement", budget="model")``.
        train: called with the model; trains all parameters with ``requires_grad``, and no others, with an optimizer of its own.
            They are the targeted weights; between two iterations, the adapter. It may return the trained weights in float32 by
            the name of their layer: a bfloat16 weight does not show small movements.
        avoid: as for :func:`intarsia.attach`; the dense training moves all entries.
        iterations: how many times a part of the support is chosen, each on what the parts before have learned.

    Raises:
        IntarsiaError: as :func:`intarsia.attach`, and where the training moved nothing. The model is as it was then.
    """
    if method.needs() != {"movement"}:
        raise IntarsiaError(
            f'{method.name} as it is set does not choose by movement; expected one like Shira(scorer="movement", budget="model")'
        )
    if attached_names(model):
        raise IntarsiaError(
            f"the model has adapters ({', '.join(attached_names(model))}); a lottery begins with the base alone: detach them"
        )
    if iterations < 1:
        raise IntarsiaError(f"iterations={iterations} must be 1 or more")
    weights = {
        site: model.get_parameter(f"{site}.weight") for site in plan_sites(model, method, targets, exclude, avoid)
    }
    packed = {site: packing_of(w).name(w) for site, w in weights.items() if not packing_of(w).in_place}
    if packed:
        site, stored = next(iter(packed.items()))
        raise IntarsiaError(
            f"{site}: its weight is stored in {stored}; a lottery trains the weights first, and codes cannot be"
        )
    learned: Learned = {}
    try:
        for number in range(1, iterations + 1):
            with _moved(model, weights, learned, train) as moved:
                given = {site: {"movement": tensor} for site, tensor in moved.items()}
                part = _part(method, number / iterations)
                attach(model, part, targets, name=name, exclude=exclude, avoid=avoid, seed=seed, gathered=given)
            _give(model, name, learned)
            if number < iterations:
                train(model)
                learned = _taken(model, name)
                detach(model, name)
    except BaseException:
        if name in attached_names(model):
            detach(model, name)
        raise


def _part(method: Method, share: float) -> Method:
    """The method with a share of its support."""
    density = getattr(method, "density", None)
    if share == 1:
        return method
    if density is None:
        raise IntarsiaError(f"{method.name} has no density to be divided by iterations")
    return dataclasses.replace(method, density=density * share)  # type: ignore[type-var]


@contextmanager
def _moved(
    model: nn.Module, weights: Mapping[str, nn.Parameter], learned: Learned, train: Train
) -> Iterator[Mapping[str, Tensor]]:
    """|theta - theta0| of each weight after a dense training that begins with what was learned; within the block and after it
    the weights are theta0, to the bit. Units that were learned already are ahead of all others."""
    with Mapped() as base, Mapped() as moved:
        for site, weight in weights.items():
            base.set(site, weight.detach())
        try:
            with torch.no_grad():
                for site, (unit, index, change) in learned.items():
                    W = site_at(model, site).weight
                    unit.put(W, index, (unit.gather(W, index).to(change.dtype) + change).to(W.dtype))
            masters = _dense(model, weights, train)
            with torch.no_grad():
                for site, weight in weights.items():
                    trained = masters.get(site, weight) if isinstance(masters, Mapping) else weight
                    wide = torch.promote_types(trained.dtype, torch.float32)
                    moved.set(site, (trained.detach().to("cpu", wide) - base[site].to(wide)).abs())
        finally:
            with torch.no_grad():
                for site, weight in weights.items():
                    weight.copy_(base[site])
        most = max(float(tensor.max()) for tensor in moved.tensors.values())
        if not most > 0:
            raise IntarsiaError(
                f"the first training moved the weights by {most:g}; does train(model) make finite steps of its own?"
            )
        for site, (unit, index, change) in learned.items():
            W = site_at(model, site).operator.matrix(moved[site])
            unit.put(W, index.cpu(), torch.full_like(change, 2 * most, dtype=W.dtype, device="cpu"))
        yield moved.tensors


def _dense(model: nn.Module, weights: Mapping[str, nn.Parameter], train: Train) -> object:
    """Train these weights and nothing else. -> what the training returns."""
    with only_requiring_grad(model, weights.values()):
        return train(model)


def _taken(model: nn.Module, name: str) -> Learned:
    with torch.no_grad():
        return {
            site: (state.granularity(), state.index.clone(), state.method.change(state.raw()).clone())  # type: ignore[operator, attr-defined]
            for site, state in states(model, name).items()
        }


def _give(model: nn.Module, name: str, learned: Learned) -> None:
    """Set what was learned before into an adapter whose support holds it."""
    for site, state in states(model, name).items():
        if site not in learned:
            continue
        unit, index, change = learned[site]
        now: Any = state.index
        delta = torch.zeros_like(state.values)  # type: ignore[arg-type]
        delta = delta.index_copy(unit.axis, unit.spread(torch.searchsorted(now, index)), change)
        edit = Sparse(state.shape, unit, now, delta.detach())
        fresh = state.method.restore(edit, Site(site, chain.base_weight(model.get_submodule(site)), None))
        with torch.no_grad():
            state.values.copy_(fresh["values"])  # type: ignore[operator]
    sync(model)
