"""EVA: A starts as the directions in which the layer's inputs vary most, and those that explain most get the rank.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation" (later "Parameter
Efficient Fine-tuning via Explained Variance Adaptation"), arXiv:2410.07170, section 3.    A = v_1 .. v_r of the inputs X, B = 0.

An incremental SVD looks at the inputs of every layer on the training data, batch by batch, until the directions that the layer is
to get stand still (cos >= ``tau``); it takes round(rho r) of them. Then all directions of all layers are ranked by the share of their
layer's variance that each explains, e_j = s_j^2 / sum s^2, and the first N r of the N layers are taken: a layer's rank is
how many of its own are among them; one with none gets no adapter. alpha follows the rank, so that alpha / r stays.

Only tokens that are trained on are seen (``labels``), where there are labels. Options are fields of the method ``eva``; LoRA itself with
``start="eva"`` has their defaults. ``center`` takes the mean out, as HF PEFT does (an incremental PCA); the paper's SVD does not.
Layers that are given the same tensor share one SVD, which PEFT finds out by a hash. The SVD is exact for batches of up to 256
tokens or inputs, otherwise by subspace iteration until no s^2 moves by more than a millionth; PEFT takes torch.svd_lowrank.
After 50 passes over the data what is known then is taken; PEFT goes on for ever.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intarsia.edits import Edit, LowRank
from intarsia.errors import IntarsiaError
from intarsia.inits.initialiser import initialiser
from intarsia.inits.spectrum import Spectrum
from intarsia.method import Start
from intarsia.site import Site

RHO, TAU, WHITEN, CENTER = 2.0, 0.99, False, False


def _most(method: Any, site: Site) -> int:
    """How many directions a site may get."""
    return min(_components(method), *site.shape)


def _components(method: Any) -> int:
    rank: int = method.rank
    return round(rank * float(getattr(method, "rho", RHO)))


def observer(method: Any, site: Site) -> Spectrum:
    """What looks at the inputs of a site."""
    return Spectrum(
        min(_components(method), site.shape[1]), getattr(method, "tau", TAU), getattr(method, "center", CENTER)
    )


def confer(method: Any, observers: Mapping[str, Spectrum]) -> None:
    """After a batch: each observer needs as many directions as its layers would get now."""
    if any(one.s is None for one in observers.values()):
        return
    ranks = _ranks({name: one.explained[: one.components] for name, one in observers.items()}, method.rank)
    for one in {id(one): one for one in observers.values()}.values():
        one.needed = max(ranks[name] for name, other in observers.items() if other is one)


def _ranks(explained: Mapping[str, Tensor], rank: int) -> dict[str, int]:
    """How many of the first N r directions of N sites are each site's."""
    owners = [name for name, e in explained.items() for _ in e]
    order = torch.cat(list(explained.values())).argsort(descending=True, stable=True)[: rank * len(explained)]
    ranks = dict.fromkeys(explained, 0)
    for place in order.tolist():
        ranks[owners[place]] += 1
    return ranks


def survey(method: Any, site: Site, start: Start) -> Tensor:
    """(p, 2 + I): what each direction explains, its singular value, and itself."""
    seen: Any = start.given("observed")
    if seen.s is None:
        raise IntarsiaError(
            f"{site.name}: none of {seen.skipped} batches has {seen.components} tokens that count, as many as directions are looked for; "
            "give larger batches, or a smaller rank or rho"
        )
    most = _most(method, site)
    return torch.cat([seen.explained[:most, None], seen.s[:most, None].double(), seen.V[:most].double()], 1).cpu()


def settle(
    method: Any, sites: Mapping[str, Site], surveys: Mapping[str, Tensor] | None, seed: int
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The ranks; before anything is known of the sites, equal ones."""
    if surveys is None:
        return {name: (method, {}) for name in sites}
    ranks = _ranks({name: surveys[name][:, 0] for name in sites}, method.rank)
    return {
        name: (_with_rank(method, rank), {"observed": surveys[name][:rank, 1:]}) for name, rank in ranks.items() if rank
    }


def at(method: Any, edit: Edit, site: Site) -> Any:
    """The method with the rank that a site was given."""
    return _with_rank(method, edit.A.shape[0]) if isinstance(edit, LowRank) else method


def _with_rank(method: Any, rank: int) -> Any:
    alpha = None if method.alpha is None else method.alpha * rank / method.rank
    return replace(method, rank=rank, alpha=alpha)


@initialiser("eva", "observed", observer=observer, confer=confer, survey=survey, settle=settle, at=at)
def eva(method: Any, site: Site, start: Start) -> dict[str, Tensor]:
    """A = the directions, B = 0."""
    found = start.given("observed")
    s, V = found[:, :1], found[:, 1:]
    A = V / s.sqrt() if getattr(method, "whiten", WHITEN) else V
    return {"A": A, "B": torch.zeros(site.shape[0], method.rank)}
