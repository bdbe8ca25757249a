"""What a merge rule is: its hyperparameters (the fields of a frozen dataclass) and its math, on the edits of one weight.

A rule knows neither adapters nor files nor models. What a user sets for one adapter, one layer or one module comes to it
as a rule of its own at each weight and adapter, ``term.rule``, whose fields are already plain numbers.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from intarsia import registry
from intarsia.edits import Dense, Edit
from intarsia.errors import IntarsiaError, nearest
from intarsia.interop.views import as_low_rank
from intarsia.method import Start, option
from intarsia.registry import System
from intarsia.store import Adapter

KINDS = ("sparse", "low rank", "dense", "weight-dependent", "beside the weight")


def each(default: Any, help: str) -> Any:
    """A hyperparameter that every adapter may have its own value of: see :func:`intarsia.method.option`."""
    return field(default=default, metadata={"help": help, "each": True})


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's part at one weight: its edit, its weight in the sum, and the rule as it is set for it here."""

    adapter: str
    edit: Edit
    weight: float
    rule: Any


@dataclass(frozen=True)
class Where:
    """At which weight a rule is at work.

    Attributes:
        name: of the weight.
        seed: of the merge.
        total: the sum of the weights of all adapters, those that leave this weight alone included.
    """

    name: str
    seed: int = 0
    total: float = 1.0

    def key(self, adapter: str = "") -> int:
        """63 random bits for this weight and adapter, whatever the order of weights and of adapters."""
        return Start.at(f"{self.name}:{adapter}", self.seed).key


@dataclass(frozen=True, eq=False)
class Merged:
    """What a rule made at one weight.

    Attributes:
        lost: square of the Frobenius norm of what an approximation left out; 0 where nothing was approximated.
        of: square of the norm of what it approximates.
    """

    edit: Edit
    lost: float = 0.0
    of: float = 0.0


@dataclass(frozen=True)
class Rule(ABC):
    """How the edits of one weight become one. Subclasses are frozen dataclasses; their fields are the hyperparameters."""

    lambda_: float = option(1.0, "the merged change is multiplied by this")

    name: ClassVar[str]  # as in configs
    id: ClassVar[str]  # in the list of all systems; the name unless told otherwise
    title: ClassVar[str]
    formula: ClassVar[str]  # one line
    paper: ClassVar[str]
    kind: ClassVar[str] = "merge rule"
    role: ClassVar[str] = "merge"
    draws: ClassVar[bool] = False  # whether the seed matters
    takes: ClassVar[frozenset[str]] = frozenset(KINDS[:3])  # of KINDS

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "name" in cls.__dict__ and "id" not in cls.__dict__:
            cls.id = cls.name

    def __post_init__(self) -> None:
        self.require(math.isfinite(self.lambda_), "lambda", "a finite number")

    @abstractmethod
    def merge(self, terms: Sequence[Term], where: Where) -> Merged:
        """One edit of several, before lambda. Adapters that leave the weight alone are not among the terms."""

    def weights(self, rules: Sequence[Any], adapters: Sequence[Adapter]) -> list[float] | None:
        """The weights of the adapters, where the rule finds them itself; ``rules``: this rule as it is set for each of them."""
        return None

    def config(self) -> dict[str, Any]:
        """Name and the fields that are the same for all adapters, as plain JSON values."""
        return {"rule": self.name} | {
            key: getattr(self, f.name) for key, f in fields_of(type(self)).items() if not f.metadata.get("each")
        }

    def require(self, holds: bool, key: str, expected: str) -> None:
        """For ``__post_init__``: one readable error for a field out of its range."""
        if not holds:
            found = getattr(self, fields_of(type(self))[key].name)
            raise IntarsiaError(f"{self.name}: {key}={found!r} must be {expected}")


R = TypeVar("R", bound=type[Rule])


# ------------------------------------------------------------------ what kinds of edits
def kinds_of(edit: Edit) -> list[str]:
    """What an edit is to a rule, of :data:`KINDS`: rows and columns are both sparse and low rank."""
    if edit.inserts():
        return [KINDS[4]]
    if edit.needs_weight:
        return [KINDS[3]]
    found = [KINDS[0]] if edit.sparse_parts() is not None else []
    found += [KINDS[1]] if not isinstance(as_low_rank(edit), str) else []
    return found or [KINDS[2]]


def wide(*edits: Edit) -> torch.dtype:
    """The widest of the edits' types, float32 at least."""
    dtype = torch.float32
    for tensor in (t for edit in edits for t in edit.tensors().values() if t.is_floating_point()):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def refusal(rule: Rule, edit: Edit, based: bool) -> str | None:
    """Why the rule cannot take an edit, or None. ``based``: whether the base's weight is given."""
    found = kinds_of(edit)
    if rule.takes.intersection(found) or (edit.needs_weight and based and KINDS[2] in rule.takes):
        return None
    if edit.needs_weight and KINDS[2] in rule.takes:
        return (
            f"what a {edit.kind} edit changes depends on the base's weight, which {rule.name} needs to "
            f"see; name the base (model: MODEL), or take a rule that needs none: {_takers(found)}"
        )
    return (
        f"{rule.name} takes edits that are {' or '.join(k for k in KINDS if k in rule.takes)}, and this one "
        f"({edit.kind}) is {' and '.join(found)}; rules that take it: {_takers(found)}"
    )


def taken(rule: Rule, adapter: str, name: str, edit: Edit, W: Tensor | None) -> Edit:
    """The edit as the rule can take it. One that depends on the weight is multiplied out where the weight is given.

    Raises:
        IntarsiaError: where the rule cannot take it.
    """
    if why := refusal(rule, edit, W is not None):
        raise IntarsiaError(f"{adapter}: {name}: {why}")
    if rule.takes.intersection(kinds_of(edit)) or W is None:
        return edit
    return Dense(edit.shape, edit.delta(W.detach().to(torch.promote_types(W.dtype, torch.float32))))


def _takers(kinds: Sequence[str]) -> str:
    return ", ".join(name for name, rule in known_rules().items() if rule.takes.intersection(kinds))


# ------------------------------------------------------------------ by name
@dataclass(frozen=True)
class Variant:
    """A rule under the name that users of mergekit know, with other defaults."""

    name: str
    rule: str
    fields: Mapping[str, Any]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("linear", "sum", {"normalize": True}),
        Variant("task_arithmetic", "sum", {}),
        Variant("dare_linear", "dare", {"elect": "none"}),
        Variant("dare_ties", "dare", {"elect": "total"}),
        Variant("della_linear", "della", {"elect": "none", "normalize": False}),
        Variant("breadcrumbs_ties", "breadcrumbs", {"elect": "total"}),
    )
}

_RULES: dict[str, type[Rule]] = {}


def register(cls: R) -> R:
    """Class decorator: make a rule known under its ``name``."""
    _RULES[cls.name] = cls
    return cls


def known_rules() -> dict[str, type[Rule]]:
    """Every rule by name, in alphabetical order."""
    return dict(sorted(_RULES.items()))


def fields_of(rule: type[Rule]) -> dict[str, dataclasses.Field[Any]]:
    """The hyperparameters by the names that they have in a config: a Python keyword loses its underscore."""
    own = {f.name.rstrip("_"): f for f in dataclasses.fields(rule)}
    return {k: f for k, f in own.items() if k != "lambda"} | {"lambda": own["lambda"]}


def find(name: str) -> tuple[type[Rule], Mapping[str, Any]]:
    """The rule of that name, and the defaults that a variant has otherwise.

    Raises:
        IntarsiaError: for an unknown name, with the nearest known ones.
    """
    variant = VARIANTS.get(name)
    if variant is None and name not in _RULES:
        raise IntarsiaError(f"unknown merge method {name!r}; {nearest(name, [*_RULES, *VARIANTS])}")
    return (_RULES[variant.rule], variant.fields) if variant else (_RULES[name], {})


def build(name: str, values: Mapping[str, Any]) -> Rule:
    """A rule from its name and fields, each a plain value.

    Raises:
        IntarsiaError: for an unknown name or field (with the nearest), a wrong type, or a value out of range.
    """
    cls, defaults = find(name)
    return changed(cls(), {**defaults, **values})


def changed(rule: Rule, values: Mapping[str, Any]) -> Rule:
    """The rule with other fields. Raises IntarsiaError for an unknown field, a wrong type, or a value out of range."""
    fields = fields_of(type(rule))
    for key in values:
        if key not in fields:
            raise IntarsiaError(f"{rule.name} has no parameter {key!r}; {nearest(key, ['weight', *fields])}")
    return replace(rule, **{fields[k].name: registry.fit(rule.name, fields[k], v, k) for k, v in values.items()})


def systems() -> list[System]:
    """What ``intarsia methods`` tells of the rules."""
    return [
        System(
            id=rule.id,
            kind=rule.kind,
            role=rule.role,
            title=rule.title,
            formula=rule.formula,
            paper=rule.paper,
            about=rule.__module__,
            mergeable=True,
            fields=tuple(fields_of(rule).items()),
            facts={"rule": rule.name, "takes": [kind for kind in KINDS if kind in rule.takes]},
        )
        for rule in known_rules().values()
    ]
