"""Methods by name: ours, and those of other packages (entry-point group ``intarsia.methods``); and what is no method.

A *variant* is a method under a further name with some fields set: rsLoRA is LoRA with another scaling. It is data, not
a class; what is built, saved and shown later is the method itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from intarsia.errors import IntarsiaError, nearest
from intarsia.method import Method
from intarsia.named import Catalogue, N, Named

METHODS: Catalogue[Method] = Catalogue("method", "intarsia.methods")
register = METHODS.register
OUTSIDE = "package.module:function"  # how something of another package is named
# That have systems which are no methods:
ROOMS = (
    "intarsia.allocators",
    "intarsia.analyze",
    "intarsia.compress",
    "intarsia.merge",
    "intarsia.optim",
    "intarsia.shrink",
)


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
    trained: str = ""  # where the fields change it
    role: str = ""  # likewise


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
        Variant("bat", "bone", "BAT", "W' = W + W_pq B_p + B_p", "arXiv:2409.15371", {"variant": "bat"}),
        Variant("miss", "bone", "MiSS", "W' = W + [D D ... D]^T", "arXiv:2409.15371"),
        Variant(
            "inttune", "nlora", "IntTune", "W' = W + s B (N - N0) A", "arXiv:2502.14482", {"trains": "core"}, "r^2"
        ),
        Variant(
            "pissa", "lora", "PiSSA", "W' = W + s (B A - B0 A0)", "arXiv:2404.02948", {"start": "pissa"}, role="init"
        ),
        Variant("rslora", "lora", "rsLoRA", "W' = W + alpha / sqrt(r) B A", "arXiv:2312.03732", {"scaling": "rslora"}),
        Variant("slora", "nlora", "SLoRA", "W' = W + s B N A", "arXiv:2502.14482", {"start": "slora"}),
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


def methods() -> dict[str, type[Method]]:
    """Every known method, by name, in alphabetical order."""
    importlib.import_module("intarsia.methods")  # by name, as the rooms: methods import this module, not it them
    return METHODS.known()


# What a method asks for besides a training loop, in a word: a pass over data with gradients, one without, a dense training before, the
# weights before the base was compressed.
_ASKED = {
    "gradient": "gradient",
    "fisher": "gradient",
    "inputs": "data",
    "magnitudes": "data",
    "gram": "data",
    "mean": "data",
    "observed": "data",
    "movement": "first training",
    "original": "original",
}


def asks_for(cls: type[Method]) -> dict[str, bool]:
    """What a method needs besides a training loop: words, and whether it needs that in all of its settings, or in some."""
    found = [_asked(build({"name": cls.name, **setting})) for setting in cls.small]
    return {word: all(word in one for one in found) for word in dict.fromkeys(word for one in found for word in one)}


def _asked(method: Method) -> list[str]:
    words = list(dict.fromkeys(_ASKED[need] for need in sorted(method.needs())))
    return words + (["callback"] if method.wants_callback() else [])


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
    config = METHODS.told(config)
    cls = find(config["name"])
    variant = variants().get(config["name"])
    fixed: Mapping[str, Any] = variant.fields if variant else {}
    for key in fixed.keys() & config.keys():
        raise IntarsiaError(
            f"{config['name']} is {cls.name} with {key}={fixed[key]!r}, so {key} cannot be given; "
            f"leave it out, or name the method {cls.name!r}"
        )
    return made(cls, {**fixed, **config})


def made(cls: type[N], config: Mapping[str, Any], hints: Mapping[str, str] = {}) -> N:
    """One of a class from its plain fields; ``name`` is passed over.

    Args:
        hints: what to say of some fields that it does not have.

    Raises:
        IntarsiaError: for an unknown field (with the nearest), a wrong type, or a value out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {key: value for key, value in config.items() if key != "name"}
    for key in values:
        if key not in fields:
            raise IntarsiaError(f"{cls.name} has no field {key!r}; {hints.get(key) or nearest(key, fields)}")
    return cls(**{key: fit(cls.name, fields[key], value) for key, value in values.items()})


def system_of(cls: type[Named], kind: str, **facts: Any) -> System:
    """What ``intarsia methods`` tells of a class with a name that is no method."""
    return System(
        id=cls.name,
        kind=kind,
        role=kind,
        title=cls.title,
        formula=cls.formula,
        paper=cls.paper,
        about=cls.__module__,
        fields=tuple((f.name, f) for f in dataclasses.fields(cls)),  # type: ignore[arg-type]
        facts=facts,
    )


def imported(what: str, name: str) -> Any:
    """What ``package.module:function`` names, imported; ``what`` it is to be, for the error.

    Raises:
        IntarsiaError: where it cannot be imported.
    """
    module, _, function = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise IntarsiaError(
            f"{what} {name!r}: {error}; expected {OUTSIDE!r}, importable from where this runs"
        ) from error
    return found


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
