"""Making one adapter of several: ``merge``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from intarsia import store
from intarsia.calibrate import Progress
from intarsia.edits import Edit, scale
from intarsia.errors import IntarsiaError, nearest
from intarsia.merge.plan import WEIGHT, Plan, Wanted, raise_all, settings, settle
from intarsia.merge.recipe import Recipe
from intarsia.merge.rule import Merged, Term, Where, refusal, taken
from intarsia.store import Adapter, Base

Given = Mapping[str, Adapter | str | Path] | Sequence[Adapter | str | Path]


def merge(
    adapters: Given,
    recipe: Recipe | None = None,
    *,
    rule: str = "sum",
    weights: Mapping[str, float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    name: str = "merged",
    base: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """One adapter of several, which a deck switches and fuses and every command takes as any other.

    Args:
        adapters: adapters or their folders, named by themselves or by the mapping.
        recipe: rule, parameters and seed from a file (:func:`load_recipe`), in place of the next arguments.
        weights: of the adapters, by name; they go before the recipe's. 1 where nothing is said.
        parameters: of the rule, as in a recipe: ``{"density": 0.3, "lambda": 1.0}``.
        own: parameters of single adapters, by their name: ``{"pirate": {"density": [0.2, 0.5]}}``.
        base: the base's weights by name, which rules other than ``sum`` need where a change depends on the weight (DoRA).

    Raises:
        IntarsiaError: for adapters that do not fit together, parameters that the rule has not or cannot have, edits of a kind
            that it cannot take, numbers that are not finite. All is checked before anything is returned.
    """
    found = named(adapters)
    wanted = recipe.wanted() if recipe is not None else None
    if wanted is None:
        wanted = Wanted(rule, settings("parameters", parameters or {}), _own(own or {}, found), seed)
    if weights:
        wanted = reweighted(wanted, weights, found)
    return made(settle(found, wanted), name=name, base=base, progress=progress)


def made(
    planned: Plan, *, name: str = "merged", base: Mapping[str, Tensor] | None = None, progress: Progress | None = None
) -> Adapter:
    """The adapter that was planned. Raises IntarsiaError as :func:`merge` does."""
    check_kinds(planned, base is not None)
    edits: dict[str, Edit] = {}
    faults: list[str] = []
    lost = of = 0.0
    for done, weight in enumerate(planned.rules, 1):
        try:
            one = _merged(planned, weight, None if base is None else base.get(weight))
        except IntarsiaError as error:
            faults.append(str(error))
            one = None
        if one is not None and one.edit.touched:
            edits[weight] = one.edit
            lost, of = lost + one.lost, of + one.of
        if progress:
            progress(done, len(planned.rules), "merging")
    raise_all(dict.fromkeys(faults), "not merged")
    if not edits:
        raise IntarsiaError("nothing is left of these adapters under this rule; keep a larger share (density)")
    note = {"lost in the approximation": math.sqrt(lost / of)} if of else {}
    return Adapter(name, edits, _base(planned), planned.config(), _about(planned), note)


def check_kinds(planned: Plan, based: bool) -> None:
    """Raise IntarsiaError for edits of a kind that the rule cannot take; ``based``: whether the base's weights are given."""
    found: dict[tuple[str, str], list[str]] = {}
    for weight, rule in planned.rules.items():
        for name in planned.terms(weight):
            if why := refusal(rule, planned.adapters[name].edits[weight], based):
                found.setdefault((name, why), []).append(weight)
    faults = (
        f"{name}: {weights[0]}{f' and {len(weights) - 1} more' if len(weights) > 1 else ''}: {why}"
        for (name, why), weights in found.items()
    )
    raise_all(faults, "not merged")


def _merged(planned: Plan, weight: str, W: Tensor | None) -> Merged | None:
    rule, shares = planned.rules[weight], planned.shares[weight]
    terms = []
    for name in planned.terms(weight):
        edit = planned.adapters[name].edits[weight]
        _check_finite(f"{name}: {weight}", edit, "the adapter is broken")
        edit = taken(rule, name, weight, edit, W)
        terms.append(Term(name, edit, shares[name].weight, shares[name].rule))
    if not terms:
        return None
    found = rule.merge(terms, Where(weight, planned.wanted.seed, planned.total(weight)))
    by = rule.lambda_
    found = found if by == 1 else Merged(scale(found.edit, by), by * by * found.lost, by * by * found.of)
    _check_finite(weight, found.edit, "weights or lambda are too large")
    return found


def _check_finite(where: str, edit: Edit, why: str) -> None:
    broken = [k for k, t in edit.tensors().items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise IntarsiaError(f"{where}: {', '.join(broken)} hold numbers that are not finite (NaN or infinity); {why}")


def _base(planned: Plan) -> Base:
    bases = [adapter.base for adapter in planned.adapters.values()]
    return next((base for base in bases if base.source), bases[0])


def _about(planned: Plan) -> dict[str, Any]:
    about: dict[str, Any] = {"merged": planned.lineage()}
    layouts: dict[str, Any] = {}
    for adapter in planned.adapters.values():
        layouts |= adapter.about.get("layouts", {})
    # Random supports of one seed are stored as the seed: so are those of their merge.
    seeds = {adapter.about.get("seed") for adapter in planned.adapters.values()}
    seed = {"seed": seeds.pop()} if len(seeds) == 1 and None not in seeds else {}
    return about | seed | ({"layouts": layouts} if layouts else {})


# ------------------------------------------------------------------ what is given
def named(adapters: Given) -> dict[str, Adapter]:
    """The adapters by name; folders are opened. Raises IntarsiaError for a name that is taken twice, and broken folders."""
    if isinstance(adapters, Mapping):
        return {name: one if isinstance(one, Adapter) else store.open(one) for name, one in adapters.items()}
    found: dict[str, Adapter] = {}
    for one in adapters:
        name = one.name if isinstance(one, Adapter) else Path(one).resolve().name
        if name in found:
            raise IntarsiaError(
                f"two adapters are named {name!r}; name them by a mapping: merge({{'one': ..., 'other': ...}})"
            )
        found[name] = one if isinstance(one, Adapter) else store.open(one)
    return found


def _own(given: Mapping[str, Mapping[str, Any]], adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    _check_known(given, adapters)
    return {name: settings(f"own.{name}", values) for name, values in given.items()}


def reweighted(wanted: Wanted, weights: Mapping[str, float], adapters: Mapping[str, Adapter]) -> Wanted:
    """The same with other weights, by the adapters' names; each is a number, or whatever a recipe may say of a weight."""
    _check_known(weights, adapters)
    own = {name: dict(values) for name, values in wanted.own.items()}
    for name, weight in weights.items():
        own.setdefault(name, {}).update(settings(f"weights.{name}", {WEIGHT: weight}))
    return Wanted(wanted.method, wanted.shared, own, wanted.seed)


def _check_known(given: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> None:
    for name in given:
        if name not in adapters:
            raise IntarsiaError(f"no adapter {name!r} is merged; {nearest(name, adapters)}")
