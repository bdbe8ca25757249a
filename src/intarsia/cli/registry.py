"""``intarsia registry``: adapters by name and version, in a folder or on any file system, and to and from the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli import terminal

if TYPE_CHECKING:
    from intarsia.store import Registry, Version
    from intarsia.store.registry import Added

Where = Annotated[
    str | None,
    typer.Option(
        "--registry", help="A folder or URL; else $INTARSIA_REGISTRY, else a folder among your data.", metavar="URL"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]
Reference = Annotated[
    str, typer.Argument(metavar="NAME[@VERSION]", help="The newest version, or one by its number or tag.")
]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="Mark it; may be given several times.")]


def add(
    folder: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Its folder.")],
    name: Annotated[str | None, typer.Option("--name", help="By default the folder's.")] = None,
    tag: Tags = None,
    parent: Annotated[
        list[str] | None,
        typer.Option("--parent", help="What it was made from: NAME@VERSION or a digest; may be given several times."),
    ] = None,
    registry: Where = None,
    json: Json = False,
) -> None:
    """Keep a copy of an adapter, as the next version of its name."""
    _tell_added(_registry(registry).add(folder, name, tags=tag or (), parents=parent or ()), json)


def list_versions(
    name: Annotated[str | None, typer.Argument(help="One name.", show_default=False)] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Of this base: its name, or how its digest begins.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="Made by this method.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="With this tag.")] = None,
    registry: Where = None,
    json: Json = False,
) -> None:
    """Every version, or those of a name, a base, a method or a tag."""
    where = _registry(registry)
    found, unreadable = where.list(name, base=base, method=method, tag=tag), where.unreadable()
    if json:
        return terminal.print_json([version.to_dict() for version in found])
    _print_versions(found)
    if not found:
        terminal.messages().print("no adapter fits" if any((base, method, tag)) else "no adapter is kept here yet")
    if unreadable:
        terminal.messages().print(f"{len(unreadable)} records cannot be read: intarsia registry verify says which")
    return None


def show(reference: Reference, registry: Where = None, json: Json = False) -> None:
    """One version in full: digest, base, method, note, lineage, tags."""
    where = _registry(registry)
    found = where.show(reference)
    parents = {digest: list(where.named(digest)) for digest in found.parents}
    children = [v.reference for v in where.list() if found.digest in v.parents]
    if json:
        return terminal.print_json(found.to_dict() | {"parents_named": parents, "children": children})
    from rich.markup import escape

    from intarsia.train.progress import size

    out, method = terminal.output(), dict(found.method)
    out.print(f"[bold]{found.reference}[/]  {' '.join(f'[green]{tag}[/]' for tag in found.tags)}")
    lines = {
        "digest": found.digest,
        "base": f"{found.base.source or 'a model'}, {found.base.dtype}, {found.base.digest}",
        "method": f"{method.pop('name', '?')}  {'  '.join(f'{k}={v}' for k, v in method.items())}",
        "size": size(found.file_bytes),
        "added": found.created,
        "pulled from": found.origin,
        "made from": ", ".join(" ".join([*names, digest[:12]]) for digest, names in parents.items()),
        "parent of": ", ".join(children),
        "others": ", ".join(v.reference for v in where.list(found.name) if v != found),
    }
    for key, value in (lines | {f"note: {key}": str(value) for key, value in found.note.items()}).items():
        if value:
            out.print(f"{key:12} {escape(value)}", soft_wrap=True)
    return None


def tag(
    reference: Reference,
    tag: Annotated[str, typer.Argument(metavar="TAG")],
    move: Annotated[bool, typer.Option("--move", help="Let it go over from another version.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Take the tag away from NAME.")] = False,
    registry: Where = None,
    json: Json = False,
) -> None:
    """Mark a version; a tag marks one version of a name."""
    from intarsia.errors import IntarsiaError
    from intarsia.store.registry import split

    where = _registry(registry)
    name, version = split(reference)
    if delete:
        if move or version is not None:
            raise IntarsiaError(f"a tag is taken away from a name: intarsia registry tag {name} {tag} --delete")
        where.untag(name, tag)
        said = where.list(name)
        return terminal.print_json([v.to_dict() for v in said]) if json else print(f"{name} has no tag {tag} any more")
    found = where.tag(reference, tag, move=move)
    return terminal.print_json(found.to_dict()) if json else print(f"{tag} marks {found.reference}")


def remove(
    reference: Annotated[str, typer.Argument(metavar="NAME@VERSION")], registry: Where = None, json: Json = False
) -> None:
    """Take a version away; gc frees its room. Its number is not given again."""
    gone = _registry(registry).remove(reference)
    return terminal.print_json(gone.to_dict()) if json else print(f"removed {gone.reference}")


def get(reference: Reference, registry: Where = None, json: Json = False) -> None:
    """Print the folder of a version, checked whole and fetched first where it lies elsewhere."""
    where = _registry(registry)
    with terminal.progress() as progress:
        progress.say(f"getting {reference}")
        found = where.show(reference)
        folder = where.get(found.reference)
    return terminal.print_json(found.to_dict() | {"folder": str(folder)}) if json else print(folder)


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Take it away; without this it is only listed.")] = False,
    older: Annotated[
        float, typer.Option("--older-than", min=0.0, help="Hours for which it may belong to somebody still adding.")
    ] = 1.0,
    registry: Where = None,
    json: Json = False,
) -> None:
    """List, or delete, objects that no version needs and what killed writers left."""
    from intarsia.train.progress import size

    found = _registry(registry).gc(delete=delete, older_than=older * 3600)
    if json:
        plain = {"found": list(found.found), "bytes": found.bytes, "young": found.young, "deleted": found.deleted}
        return terminal.print_json(plain)
    for path in found.found:
        print(path)
    said = "deleted" if delete else "to delete"
    print(f"{len(found.found)} {said}, {size(found.bytes)}; {found.young} too young to judge")
    if found.found and not delete:
        terminal.messages().print("[dim]--delete takes them away[/]")
    return None


def verify(registry: Where = None, json: Json = False) -> None:
    """Read every record, tag and adapter whole. Exit code 1 if something is wrong."""
    where = _registry(registry)
    with terminal.progress() as progress:
        found = where.verify(progress.work)
    if json:
        counts = {"versions": found.versions, "objects": found.objects, "unused": found.unused}
        terminal.print_json({"url": where.url, **counts, "faults": found.faults})
    else:
        out = terminal.output()
        for fault in found.faults:
            out.print(fault, markup=False, soft_wrap=True)
        said = f"[bold red]{len(found.faults)} wrong[/]" if found.faults else "[green]whole[/]"
        unused = f", {found.unused} of them needed by no version" if found.unused else ""
        out.print(f"{said}: {found.versions} versions of {found.objects} adapters{unused}")
    if found.faults:
        raise typer.Exit(1)


def push(
    reference: Reference,
    repository: Annotated[str, typer.Argument(metavar="ORGANISATION/NAME", help="On the hub; made if there is none.")],
    revision: Annotated[str | None, typer.Option("--revision", help="A branch; made if there is none.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    registry: Where = None,
    json: Json = False,
) -> None:
    """Commit a version to a repository of the hub."""
    where = _registry(registry)
    with terminal.progress() as progress:
        progress.say(f"pushing {reference} to {repository}")
        commit = where.push(reference, repository, revision=revision, private=not public)
    plain = {"repository": repository, "commit": commit}
    return terminal.print_json(plain) if json else print(f"pushed {reference} to {repository}, commit {commit[:12]}")


def pull(
    repository: Annotated[str, typer.Argument(metavar="ORGANISATION/NAME", help="On the hub.")],
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, a tag or a commit.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="By default the repository's.")] = None,
    tag: Tags = None,
    registry: Where = None,
    json: Json = False,
) -> None:
    """Add the adapter of a repository of the hub, checked whole."""
    where = _registry(registry)
    with terminal.progress() as progress:
        progress.say(f"pulling {repository}")
        added = where.pull(repository, name, revision=revision, tags=tag or ())
    _tell_added(added, json)


def _registry(url: str | None) -> Registry:
    from intarsia.store import Registry

    return Registry(url)


def _tell_added(added: Added, json: bool) -> None:
    if json:
        return terminal.print_json(added.version.to_dict() | {"new": added.new})
    found = added.version
    tags = f"  {' '.join(found.tags)}" if found.tags else ""
    if added.new:
        print(f"added {found.reference}{tags}")
    else:
        note = "; its note stays as it was" if added.other_note else ""
        print(f"nothing new: {found.reference} holds this very adapter already{note}{tags}")
    return None


def _print_versions(found: Sequence[Version]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from intarsia.train.progress import size

    if not found:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("adapter", "tags", "method", "base", "size", "added", "digest"):
        table.add_column(
            column, no_wrap=column in ("adapter", "digest"), justify="right" if column == "size" else "left"
        )
    for v in found:
        table.add_row(
            f"[cyan]{v.reference}[/]",
            f"[green]{' '.join(v.tags)}[/]",
            escape(str(v.method.get("name", "?"))),
            escape(v.base.source or v.base.digest[:12]),
            size(v.file_bytes),
            v.created[:10],
            v.digest[:12],
        )
    terminal.output().print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "add": add, "list": list_versions, "show": show, "tag": tag, "get": get, "remove": remove, "gc": gc, "verify": verify,
    "push": push, "pull": pull,
}  # fmt: skip
