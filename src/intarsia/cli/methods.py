"""``intarsia methods [NAME]``: every method, merge rule and other system, or one in full."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli import terminal

if TYPE_CHECKING:
    from rich.table import Table

    from intarsia.method import Method
    from intarsia.registry import System, Variant

NARROW = 200  # columns of a terminal below which the table would be folded
EXAMPLES = ((576, 576), (1536, 576), (4096, 4096))  # (O, I), for the trained counts of one method


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Every method: role, formula, trained numbers, learning rate, paper; and every merge rule."""
    from intarsia import registry

    known, others = registry.methods(), registry.systems()
    if name in others:
        return terminal.print_json(_system_row(others[name])) if json else _print_system(others[name])
    if name is not None:
        _check_known(name, [*known, *registry.variants(), *others])
        cls, variant = registry.find(name), registry.variants().get(name)
        return terminal.print_json(_row(cls, variant)) if json else _print_one(cls, variant)
    rows = [_row(cls) for cls in known.values()]
    rows += [_row(known[v.method], v) for v in registry.variants().values()]
    rows.sort(key=lambda row: str(row["id"]))
    more = [_system_row(system) for system in others.values()]
    return terminal.print_json(rows + more) if json else _print_all(rows, more)


def _check_known(name: str, known: list[str]) -> None:
    from intarsia.errors import IntarsiaError, nearest

    if name not in known:
        raise IntarsiaError(f"unknown method {name!r}; {nearest(name, known)}")


def _row(cls: type[Method], variant: Variant | None = None) -> dict[str, Any]:
    """All that is known of a method or a named variant, as plain JSON values."""
    from intarsia import registry

    named = variant or cls
    return {
        "id": named.name,
        "kind": cls.kind,
        "role": (variant.role if variant else "") or cls.role,
        "title": named.title,
        "formula": named.formula,
        "trained": (variant.trained if variant else "") or cls.trained,
        "mergeable": cls.mergeable,
        "starts_as_identity": cls.starts_as_identity,
        "cost_per_token": cls.cost,
        "needs": [word if always else f"({word})" for word, always in registry.asks_for(cls).items()],
        "needs_data": _needs_data(cls),
        "default_lr": cls.default_lr,
        "paper": named.paper,
        "variant_of": variant.method if variant else None,
        "fields": _fields(cls, variant),
    }


def _system_row(system: System) -> dict[str, Any]:
    """All that is known of what is no method. What only a trained method has is null."""
    return {
        "id": system.id,
        "kind": system.kind,
        "role": system.role,
        "title": system.title,
        "formula": system.formula,
        "trained": None,
        "mergeable": system.mergeable,
        "starts_as_identity": None,
        "cost_per_token": None,
        "needs": [],
        "needs_data": None,
        "default_lr": None,
        "paper": system.paper,
        "variant_of": None,
        "fields": [_field(field, name) for name, field in system.fields],
    } | dict(system.facts)


def _needs_data(cls: type[Method]) -> str:
    """``no``, ``yes``, or ``some settings``: whether attaching needs calibration data."""
    found = {bool(_build(cls, setting).needs()) for setting in cls.small}
    return "some settings" if len(found) > 1 else "yes" if True in found else "no"


def _build(cls: type[Method], setting: Any) -> Method:
    from intarsia import registry

    return registry.build({"name": cls.name, **setting})


def _fields(cls: type[Method], variant: Variant | None) -> list[dict[str, Any]]:
    fixed = variant.fields if variant else {}
    return [_field(field, field.name) for field in dataclasses.fields(cls) if field.name not in fixed]  # type: ignore[arg-type]


def _field(field: dataclasses.Field[Any], name: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": field.type if isinstance(field.type, str) else inspect.formatannotation(field.type),
        "default": _default(field),
        "help": field.metadata.get("help", ""),
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    from intarsia.method import Method

    if field.default is dataclasses.MISSING:
        return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    return field.default.config() if isinstance(field.default, Method) else field.default


def _print_all(rows: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
    out = terminal.output()
    if out.width < NARROW:
        for row in rows:
            out.print(f"[bold cyan]{row['id']:8}[/][bold]{row['title']:8}[/]{_literal(row['formula'])}")
            facts = (
                f"{row['role']}, {'mergeable' if row['mergeable'] else 'not mergeable'}, {row['paper']}",
                f"trains {row['trained']} a weight; lr {row['default_lr']:g}",
                f"a token costs besides: {row['cost_per_token']}; needs: {', '.join(row['needs']) or 'nothing'}",
            )
            for line in facts:
                out.print(f"{'':16}[dim]{_literal(line)}[/]")
        for row in more:
            out.print(f"[bold cyan]{row['id']:12}[/][bold]{row['title']:14}[/]{_literal(row['formula'])}")
            out.print(f"{'':16}[dim]{row['role']}, {_literal(row['paper'])}[/]")
    else:
        out.print(_table(rows))
        out.print()
        out.print(_other_table(more))
    out.print(
        "\n[dim]merges: what is learned is set into the weights and costs nothing; else so many multiplications a token beside each layer."
        "\nneeds, besides a training loop: a pass over data, or one with gradients, before it; callback: a call after each step; in "
        "brackets: in some settings."
        "\nintarsia methods NAME: one in full, with its fields[/]"
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("id", "title", "role", "formula", "trained a weight", "merges, or costs", "needs", "lr", "paper"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(
            f"[bold cyan]{row['id']}[/]",
            row["title"],
            row["role"],
            _literal(row["formula"]),
            _literal(row["trained"]),
            "merges" if row["mergeable"] else _literal(row["cost_per_token"]),
            ", ".join(row["needs"]),
            f"{row['default_lr']:g}",
            row["paper"],
        )
    return table


def _other_table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("id", "title", "role", "formula", "paper"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(
            f"[bold cyan]{row['id']}[/]", row["title"], row["role"], _literal(row["formula"]), _literal(row["paper"])
        )
    return table


def _literal(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_one(cls: type[Method], variant: Variant | None) -> None:
    out, row = terminal.output(), _row(cls, variant)
    if variant:
        preset = ", ".join(f"{k}={v}" for k, v in variant.fields.items())
        out.print(
            f"[bold]{variant.title}[/]: {cls.title} with {preset}.    {_literal(variant.formula)}\n{variant.paper}\n"
        )
    out.print(inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""), markup=False)
    _print_fields(row["fields"])
    out.print(f"role {row['role']}, mergeable: {'yes' if row['mergeable'] else 'no'}")
    out.print(f"needs besides a training loop: {', '.join(row['needs']) or 'nothing'}", markup=False)
    out.print(f"a token costs besides the base, once it is trained: {row['cost_per_token']}", markup=False)
    out.print(f"learning rate {row['default_lr']:g} unless told otherwise (train.lr)")
    counts = _counts(cls, variant)
    if counts:
        out.print(f"trained numbers with the defaults: {counts}")


def _print_fields(fields: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("field", "type", "default", "meaning"):
        table.add_column(column, no_wrap=column == "field")
    for field in fields:
        shown = _yaml(field["default"])
        table.add_row(f"[cyan]{field['name']}[/]", _literal(field["type"]), _literal(shown), _literal(field["help"]))
    out = terminal.output()
    out.print()
    out.print(table)
    out.print()


def _print_system(system: System) -> None:
    row = _system_row(system)
    out = terminal.output()
    out.print(inspect.cleandoc(sys.modules[system.about].__doc__ or ""), markup=False)
    if row["fields"]:
        _print_fields(row["fields"])
    facts = ", ".join(
        f"{key}: {', '.join(value) if isinstance(value, list) else value}" for key, value in system.facts.items()
    )
    out.print(f"{system.kind}; {facts}", markup=False)


def _counts(cls: type[Method], variant: Variant | None) -> str:
    from intarsia import registry

    try:
        method = registry.build(variant.name if variant else cls.name)
    except TypeError:  # a method of somebody else's with a field that has no default
        return ""
    told = []
    for shape in EXAMPLES:
        shared = method.shared_count(shape)
        once = f" and {shared:,} of all of that shape together" if shared else ""
        told.append(f"{method.trained_count(shape):,} of a {shape[0]} x {shape[1]} weight{once}")
    return ", ".join(told)


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
