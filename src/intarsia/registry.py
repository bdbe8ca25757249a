"""Methods by name: ours, and those of other packages (entry-point group ``intarsia.methods``); and what is no method.

A *variant* is a method under a further name with some fields set: rsLoRA is LoRA with another scaling. It is data, not
a class; what is built, saved and shown later is the method itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from intarsia.errors import IntarsiaError, nearest
from intarsia.method import Method

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])

GROUP = "intarsia.methods"
ROOMS = ("intarsia.analyze", "intarsia.compress", "intarsia.merge")  # that have systems which are no methods


@dataclass(frozen=True)
class System:
    """What works here and is no method, such as a merge rule or an analysis: what ``intarsia methods`` tells of it.

    Attributes:
        id: in the list of all systems.
        role: merge, compress, analysis, ...
        about: name of the module whose docstring tells of it in full.
        mergeable: whether what comes of it can be set into the base.
        fields: its settings, by the names that users give them; their help is in the metadata.
        facts: what else is worth knowing of it, as plain JSON values.
    """

    id: str
    kind: str
    role: str
    title: str
    formula: str
    paper: str
    about: str
    mergeable: bool = False
    fields: tuple[tuple[str, dataclasses.Field[Any]], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A named setting of a method: ``build({"name": name, ...})`` builds ``method`` with these fields."""

    name: str
    method: str
    title: str
    formula: str
    paper: str
    fields: Mapping[str, Any] = field(default_factory=dict)


_VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "lt-sft",
            "shira",
            "LT-SFT",
            "W' = W + S, S where W moved most",
            "arXiv:2110.07560",
            {"scorer": "movement", "budget": "model"},
        ),
        Variant("rslora", "lora", "rsLoRA", "W' = W + alpha / sqrt(r) B A", "arXiv:2312.03732", {"scaling": "rslora"}),
        Variant(
            "supra",
            "rosa",
            "Supra",
            "W' = W + S + s B A, S on the largest |W|",
            "arXiv:2607.09287",
            {"scorer": "magnitude"},
        ),
        Variant(
            "sltrain",
            "rosa",
            "SLTrain",
            "W' = W + S + s B A, S on random entries",
            "arXiv:2406.02214",
            {"scorer": "random"},
        ),
    )
}


def register(cls: M) -> M:
    """Class decorator: make a method known under its ``name``. A name that is taken is an error."""
    taken = _METHODS.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise IntarsiaError(f"the method name {cls.name!r} of {cls.__module__} is taken by {taken.__module__}")
    _METHODS[cls.name] = cls
    return cls


@functools.cache
def _load() -> None:
    importlib.import_module("intarsia.methods")  # by name, as the others: methods import this module, not it them
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            register(point.load())
        except Exception as error:
            raise IntarsiaError(
                f"the package {point.dist.name if point.dist else '?'} offers the method {point.name!r}, "
                f"but loading {point.value} failed: {error}; repair or uninstall that package"
            ) from error


def methods() -> dict[str, type[Method]]:
    """Every known method, by name, in alphabetical order."""
    _load()
    return dict(sorted(_METHODS.items()))


def variants() -> dict[str, Variant]:
    """Every named variant whose method is known, by name, in alphabetical order."""
    known = methods()
    return {name: v for name, v in sorted(_VARIANTS.items()) if v.method in known and name not in known}


def systems() -> dict[str, System]:
    """What works here besides methods, by id: each room's own ``systems()``."""
    rooms = (importlib.import_module(room) for room in ROOMS)  # by name, as the methods: they stand above this module
    return {system.id: system for room in rooms for system in room.systems()}


def find(name: str) -> type[Method]:
    """The method of that name; for a variant, the method that it is a setting of.

    Raises:
        IntarsiaError: for an unknown name, with the nearest known ones.
    """
    known, named = methods(), variants()
    if name not in known and name not in named:
        raise IntarsiaError(f"unknown method {name!r}; {nearest(name, [*known, *named])}")
    return known[named[name].method if name in named else name]


def build(config: str | Mapping[str, Any]) -> Method:
    """A method from its plain config, ``{"name": "shira", "density": 0.01}`` or just ``"shira"``.

    Raises:
        IntarsiaError: for an unknown name or field (with the nearest), a wrong type, or a value out of range.
    """
    if isinstance(config, str):
        config = {"name": config}
    if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
        raise IntarsiaError(f"a method is given as {{name: ..., field: value}}; found {config!r}")
    cls = find(config["name"])
    variant = variants().get(config["name"])
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = dict(variant.fields) if variant else {}
    for key, value in config.items():
        if key == "name":
            continue
        if key not in fields:
            raise IntarsiaError(f"{cls.name} has no field {key!r}; {nearest(key, fields)}")
        if variant and key in variant.fields:
            raise IntarsiaError(
                f"{variant.name} is {cls.name} with {key}={variant.fields[key]!r}, so {key} cannot be given; "
                f"leave it out, or name the method {cls.name!r}"
            )
        values[key] = fit(cls.name, fields[key], value)
    return cls(**values)


def with_tokens(config: Mapping[str, Any], tokens_of: Callable[[str], Sequence[int]]) -> dict[str, Any]:
    """A method's config with texts turned into token numbers, in the fields that say so (``option(..., tokens=True)``).

    Methods know no tokenizer; whoever has one calls this before :func:`build`.

    Raises:
        IntarsiaError: for a text that is no token at all.
    """
    found = dict(config)
    for each in dataclasses.fields(find(config["name"])):  # type: ignore[arg-type]
        text = config.get(each.name)
        if isinstance(text, Mapping) and "name" in text:
            found[each.name] = with_tokens(text, tokens_of)
        elif isinstance(text, str) and each.metadata.get("tokens"):
            found[each.name] = list(tokens_of(text))
            if not found[each.name]:
                raise IntarsiaError(
                    f"{config['name']}: {each.name}={text!r} makes no token; give a text of one or more"
                )
    return found


def fit(owner: str, field: dataclasses.Field[Any], value: Any, called: str = "") -> Any:
    """The value in the field's type; text from a command line or from YAML (``2e-3``) becomes a number.

    Raises:
        IntarsiaError: for a value of another type, that begins with the ``owner`` of the field (``called`` otherwise by users).
    """
    called = called or field.name
    kinds = _type_names(field.type)
    if "Method" in kinds:
        return build(value)
    if (isinstance(value, str) and "str" not in kinds) or (isinstance(value, str) and kinds & {"float", "int"}):
        value = _number(value, kinds)
    found = "None" if value is None else type(value).__name__
    if found == "int" and "float" in kinds and "int" not in kinds:
        try:
            return float(value)
        except OverflowError as error:
            raise IntarsiaError(f"{owner}: {called} is too large a number: {error}") from error
    if found not in kinds:
        raise IntarsiaError(f"{owner}: {called}={value!r} is a {found}; expected {' or '.join(sorted(kinds))}")
    return value


def _type_names(annotation: Any) -> set[str]:
    """{"float", "None"} of ``float | None``, given as a type or, under postponed evaluation, as text."""
    if isinstance(annotation, str):
        return {part.strip() for part in annotation.split("|")}
    kinds = typing.get_args(annotation) or (annotation,)
    return {"None" if kind is type(None) else kind.__name__ for kind in kinds}


def _number(text: str, kinds: set[str]) -> Any:
    if "bool" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind, make in (("int", int), ("float", float)):
        if kind in kinds:
            try:
                return make(text)
            except ValueError:
                continue
    return text
