"""What is merged, with which numbers at which weight: everything is checked and settled here, before any arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from intarsia.errors import IntarsiaError, nearest
from intarsia.merge.rule import Rule, changed, fields_of, find
from intarsia.merge.settings import Setting, layers_of, setting
from intarsia.store import MERGE, Adapter

WEIGHT = "weight"  # the one parameter that is no field of a rule
SHOWN = 6  # faults in one message


@dataclass(frozen=True)
class Wanted:
    """What was asked for: a rule, its parameters, and those of single adapters; as written, not at a weight yet."""

    method: str = "sum"
    shared: Mapping[str, Setting] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Setting]] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Share:
    """One adapter at one weight: its weight in the sum, and the rule as it is set for it here."""

    weight: float
    rule: Rule


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge that can be made.

    Attributes:
        rules: the rule at every weight that is merged, with the parameters that are the same for all adapters.
        shares: of every weight, what each adapter has there; those that leave it alone included.
    """

    adapters: Mapping[str, Adapter]
    wanted: Wanted
    rules: Mapping[str, Rule]
    shares: Mapping[str, Mapping[str, Share]]

    def terms(self, weight: str) -> list[str]:
        """The adapters that take part at a weight: they edit it, and their weight there is not 0."""
        return [n for n, s in self.shares[weight].items() if s.weight != 0 and weight in self.adapters[n].outlines]

    def total(self, weight: str) -> float:
        """The sum of the weights of all adapters there."""
        return sum(sorted(share.weight for share in self.shares[weight].values()))  # in one order, whatever theirs is

    def lineage(self) -> dict[str, Any]:
        """Which adapters, with which digests and parameters, as plain JSON values."""
        return {name: self._lineage(name) for name in self.adapters}

    def _lineage(self, name: str) -> dict[str, Any]:
        adapter, given = self.adapters[name], {**self.wanted.shared, **self.wanted.own.get(name, {})}
        found = {shares[name].weight for shares in self.shares.values()}
        rules = {shares[name].rule for shares in self.shares.values()}
        values: dict[str, Any] = {WEIGHT: found.pop() if len(found) == 1 else given[WEIGHT].plain}
        for key, own in fields_of(type(next(iter(rules)))).items():
            if own.metadata.get("each"):
                ones = {getattr(rule, own.name) for rule in rules}
                values[key] = ones.pop() if len(ones) == 1 else given[key].plain
        return {"digest": adapter.digest, "method": str(adapter.method.get("name", "?"))} | values

    def config(self) -> dict[str, Any]:
        """The rule and its parameters, as the merged adapter's method."""
        rules = set(self.rules.values())
        found: dict[str, Any] = {"name": MERGE}
        for key, value in next(iter(rules)).config().items():
            same = key == "rule" or len({getattr(rule, fields_of(type(rule))[key].name) for rule in rules}) == 1
            found[key] = value if same else self.wanted.shared[key].plain
        return found | ({"seed": self.wanted.seed} if type(next(iter(rules))).draws else {})


def settle(adapters: Mapping[str, Adapter], wanted: Wanted) -> Plan:
    """Settle every parameter at every weight.

    Raises:
        IntarsiaError: for adapters of different bases or shapes, one that is given twice, unknown parameters, values of the wrong
            type or out of range, filters that fit no weight, gradients where there are no layers, weights that are all 0.
    """
    _check_adapters(adapters)
    cls, defaults = find(wanted.method)
    names = list(dict.fromkeys(weight for adapter in adapters.values() for weight in adapter.outlines))
    _check_keys(cls, wanted)
    _check_filters(wanted, names)
    layers = layers_of(names)
    plain = changed(cls(), defaults)
    rules: dict[str, Rule] = {}
    shares: dict[str, dict[str, Share]] = {}
    for weight in names:
        rules[weight] = here = _set(plain, wanted.shared, False, weight, layers)
        shared = _set(here, wanted.shared, True, weight, layers)
        own = {name: _set(shared, wanted.own.get(name, {}), True, weight, layers) for name in adapters}
        found = here.weights(list(own.values()), list(adapters.values()))
        if found is not None and any(WEIGHT in source for source in (wanted.shared, *wanted.own.values())):
            raise IntarsiaError(f"{here.name} finds the weights of the adapters itself; leave {WEIGHT} out")
        weights = found or [_weight(wanted, name, weight, layers) for name in adapters]
        shares[weight] = {n: Share(w, rule) for w, (n, rule) in zip(weights, own.items(), strict=True)}
    made = Plan(adapters, wanted, rules, shares)
    if not any(made.terms(weight) for weight in names):
        raise IntarsiaError(
            "every weight is 0, so nothing would be left of these adapters; give one of them another weight"
        )
    return made


def settings(where: str, given: Mapping[str, Any]) -> dict[str, Setting]:
    """Parameters as they were written, each with its full key for messages."""
    return {str(key): setting(f"{where}.{key}" if where else str(key), value) for key, value in given.items()}


def _set(rule: Rule, given: Mapping[str, Setting], each: bool, weight: str, layers: range) -> Rule:
    """The rule with what was given for the fields that may (each) or may not be an adapter's own, at one weight."""
    for key, own in fields_of(type(rule)).items():
        if key not in given or bool(own.metadata.get("each")) != each:
            continue
        value = given[key].at(weight, layers)
        if value is None and any(case.value is not None for case in given[key].cases):
            continue  # no filter fits
        try:
            rule = changed(rule, {key: value})
        except IntarsiaError as error:
            raise IntarsiaError(f"{given[key].where}: {error}") from error
    return rule


def _weight(wanted: Wanted, name: str, weight: str, layers: range) -> float:
    for source in (wanted.own.get(name, {}), wanted.shared):
        if WEIGHT not in source or (value := source[WEIGHT].at(weight, layers)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise IntarsiaError(
                f"{source[WEIGHT].where}: the weight of {name!r} is {value!r}; expected a finite number"
            )
        return float(value)
    return 1.0


# ------------------------------------------------------------------ checks
def _check_adapters(adapters: Mapping[str, Adapter]) -> None:
    if not adapters:
        raise IntarsiaError("there are no adapters to merge; name at least one")
    bases = {name: adapter.base for name, adapter in adapters.items()}
    if len({base.digest for base in bases.values()}) > 1:
        told = (
            f"{name}: {base.source or 'a model'} in {base.dtype}, {base.digest[:12]}" for name, base in bases.items()
        )
        raise IntarsiaError(
            "these adapters belong to different bases, and have no weights in common:\n  " + "\n  ".join(told)
        )
    first: dict[str, str] = {}
    for name, adapter in adapters.items():
        twin = first.setdefault(adapter.digest, name)
        if twin != name:
            raise IntarsiaError(
                f"{twin} and {name} are the same adapter (sha256 {adapter.digest[:12]}); give it once, with the sum of the weights"
            )
        if not adapter.outlines:
            raise IntarsiaError(f"{name} edits nothing")
    raise_all(_misfits(adapters), "these adapters do not fit together")


def _misfits(adapters: Mapping[str, Adapter]) -> list[str]:
    seen: dict[str, tuple[str, tuple[int, ...], Any]] = {}
    faults = []
    for name, adapter in adapters.items():
        layouts = adapter.about.get("layouts", {})
        for weight, edit in adapter.outlines.items():
            found = (tuple(edit.shape), layouts.get(weight))
            other, *expected = seen.setdefault(weight, (name, *found))
            if tuple(expected) != found:
                faults.append(f"{weight}: {other} edits {expected[0]}, {name} {found[0]}")
    return faults


def _check_keys(cls: type[Rule], wanted: Wanted) -> None:
    fields = fields_of(cls)
    faults = []
    for source, each in ((wanted.shared, False), *((own, True) for own in wanted.own.values())):
        for key, value in source.items():
            if key != WEIGHT and key not in fields:
                faults.append(f"{value.where}: {cls.name} has no parameter {key!r}; {nearest(key, [WEIGHT, *fields])}")
            elif each and key != WEIGHT and not fields[key].metadata.get("each"):
                faults.append(
                    f"{value.where}: {key} is one for the whole merge; put it under parameters, beside adapters"
                )
    raise_all(faults, f"merge method {wanted.method}")


def _check_filters(wanted: Wanted, names: Sequence[str]) -> None:
    faults = [
        f"{value.where}: {case.filter!r} is part of none of the {len(names)} names of weights, such as {names[0]}"
        for source in (wanted.shared, *wanted.own.values())
        for value in source.values()
        for case in value.cases
        if not any(map(case.fits, names))
    ]
    raise_all(faults, "filters that fit no weight")


def raise_all(faults: Iterable[str], what: str) -> None:
    """One IntarsiaError with all faults, or the first of many."""
    faults = list(faults)
    if not faults:
        return
    more = [f"... and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    raise IntarsiaError(faults[0] if len(faults) == 1 else f"{what}:\n  " + "\n  ".join(faults[:SHOWN] + more))
