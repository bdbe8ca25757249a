"""Adapters that are disjoint on purpose: a new support leaves alone what earlier adapters may change.

Fusing such adapters with weights of 1 gives a model that holds the very values of each: no entry is anybody else's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from intarsia import registry, store
from intarsia.edits import Edit, positions
from intarsia.errors import IntarsiaError
from intarsia.method import Method
from intarsia.site import Site
from intarsia.store import Adapter

Avoid = str | Path | Adapter | Iterable[str | Path | Adapter]


def adapters_to_avoid(avoid: Avoid, method: Method) -> list[Adapter]:
    """The adapters, read from their folders where they are folders; each once.

    Raises:
        IntarsiaError: for a method that cannot, or a folder that is no whole adapter; all folders at once.
    """
    given = [avoid] if isinstance(avoid, str | Path | Adapter) else list(avoid)
    if given and not method.avoids:
        able = ", ".join(sorted(name for name, cls in registry.methods().items() if cls.avoids))
        raise IntarsiaError(
            f"{method.name} cannot leave out the entries that other adapters change; leave avoid out, or take a method that "
            f"chooses its support ({able})"
        )
    found: dict[str, Adapter] = {}
    faults = []
    for one in given:
        try:
            adapter = one if isinstance(one, Adapter) else store.read(one)
        except IntarsiaError as error:
            faults.append(f"avoid: {error}")
        else:
            found.setdefault(adapter.digest, adapter)
    if faults:
        raise IntarsiaError("\n".join(faults))
    return list(found.values())


def beside(adapters: Sequence[Adapter], sites: Mapping[str, Site], weights: Mapping[str, str]) -> dict[str, Site]:
    """The sites, each with the entries that the adapters may change there.

    Args:
        weights: the name of each site's weight.

    Raises:
        IntarsiaError: where an adapter may change every entry of a weight, so that nothing can be beside it.
    """
    faults = []
    found = {}
    for name, site in sites.items():
        entries = []
        for adapter in adapters:
            edit = adapter.edits.get(weights[name])
            if edit is None:
                continue
            here = positions(edit)
            if here is None:
                faults.append(f"{name}: {adapter.name} is {edit.kind} there, which may change every entry")
            else:
                entries.append(here.cpu())
        found[name] = replace(site, avoid=torch.cat(entries).unique()) if entries else site
    if faults:
        more = [f"... and {len(faults) - 4} more"] if len(faults) > 4 else []
        raise IntarsiaError("nothing can be disjoint to that:\n  " + "\n  ".join(faults[:4] + more))
    return found


def require_disjoint(name: str, edit: Edit, avoid: Tensor | None) -> None:
    """Raise IntarsiaError where an edit may change an entry that is to be avoided: a method's own choice, or a state from elsewhere."""
    if avoid is None:
        return
    entries = positions(edit)
    if entries is None or bool(torch.isin(entries.cpu(), avoid, assume_unique=True).any()):
        raise IntarsiaError(
            f"{name}: the support holds entries that are to be avoided; a method that chooses by itself has to leave site.avoid out"
        )
