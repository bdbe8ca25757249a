"""Finding the attention and MLP blocks of a model, and the roles of their weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from intarsia.errors import IntarsiaError
from intarsia.families.known import FAMILIES, Coupling
from intarsia.role import Role

FAMILY = "family"
EXAMPLE = "fc1 > fc2; q, k, v > out / 64"


@dataclass(frozen=True)
class Block:
    """One coupled structure of a model: permuting its units in every part leaves the function of the model unchanged.

    ``parts`` are (dotted name of the weight's module, role); the column side comes last.
    """

    name: str
    kind: str
    parts: tuple[tuple[str, Role], ...]

    @property
    def units(self) -> int:
        """Heads or channels that the columns read."""
        return self.parts[-1][1].units


def blocks(model: nn.Module, layout: str = FAMILY) -> list[Block]:
    """The blocks of a model, in its order.

    Args:
        layout: ``"family"``: by the names of the families that are known; or by hand, ``"rows > columns"``, several with
            ``;`` between them, a head's width behind ``/``: ``"gate, up > down; q, k, v > out / 64"``.

    Raises:
        IntarsiaError: when there is none, a layout by hand cannot be read, or the heads do not fit the weights.
    """
    couplings = [c for family in FAMILIES for c in family.couplings] if layout == FAMILY else by_hand(layout)
    found: dict[str, Block] = {}
    faults: list[str] = []
    for name, module in model.named_modules():
        for coupling in couplings:
            try:
                block = _block(model, name, module, coupling)
            except IntarsiaError as error:
                faults.append(str(error))
                continue
            if block:
                found.setdefault(block.name, block)
    if faults:
        raise IntarsiaError("\n".join(faults[:8]))
    if not found:
        looked = "; ".join(str(coupling) for coupling in couplings)
        raise IntarsiaError(
            f"{type(model).__name__} has no attention or MLP block with names that are known. Looked for, under every module: "
            f"{looked}. Say it by hand: layout={EXAMPLE!r} (weights whose rows make the heads or channels > the weight "
            "whose columns read them / width of a head)"
        )
    return list(found.values())


def roles(found: Sequence[Block]) -> dict[str, tuple[Role, ...]]:
    """The roles of every weight of these blocks, by the dotted name of its module."""
    by_name: dict[str, tuple[Role, ...]] = {}
    for block in found:
        for name, role in block.parts:
            by_name[name] = (*by_name.get(name, ()), role)
    return by_name


def by_hand(layout: str) -> list[Coupling]:
    """The couplings of a layout that is written by hand; see :func:`blocks`. Raises IntarsiaError where it cannot be read."""
    couplings = []
    for entry in layout.split(";"):
        match = re.fullmatch(r"\s*(?:([^>/]+)>)?\s*([\w.]+)\s*(?:/\s*(\d+))?\s*", entry)
        names = [name.strip() for name in (match[1] or "").split(",")] if match and match[1] else []
        width = int(match[3]) if match and match[3] else None
        parts = {0: (), 1: ("up",), 2: ("gate", "up")} if width is None else {0: (), 1: ("v",), 3: ("q", "k", "v")}
        if not match or len(names) not in parts or not all(re.fullmatch(r"[\w.]+", name) for name in names):
            raise IntarsiaError(
                f"layout: {entry.strip()!r} cannot be read; expected 'family', or by hand such as {EXAMPLE!r}: up, or gate and up, "
                "before the > of an MLP; v, or q, k and v, before that of an attention, and the width of a head behind /"
            )
        rows = tuple(zip(parts[len(names)], names, strict=True))
        couplings.append(Coupling("mlp" if width is None else "attention", rows, match[2], width or None))
    return couplings


def _block(model: nn.Module, at: str, module: nn.Module, coupling: Coupling) -> Block | None:
    paths = [*(path for _, path in coupling.rows), coupling.columns]
    layers = [_layer(module, path) for path in paths]
    shapes = [shape(layer) for layer in layers if layer is not None]
    if len(shapes) < len(paths) or not shapes:
        return None
    name = f"{at}.{coupling.columns}".lstrip(".")
    width = 1 if coupling.kind == "mlp" else _head_width(model, name, coupling)
    channels = shapes[-1][1]
    if width < 1 or channels % width:
        raise IntarsiaError(
            f"{name}: {channels} inputs cannot be heads of {width}; say the width by hand: layout='... / 64'"
        )
    parts = list(_row_parts(model, at, name, coupling, dict(zip(paths, shapes, strict=True)), width, channels // width))
    part = "o" if coupling.kind == "attention" else "down"
    parts.append((name, Role(name, coupling.kind, part, "columns", width, channels // width)))
    return Block(name, coupling.kind, tuple(parts))


def _row_parts(
    model: nn.Module,
    at: str,
    block: str,
    coupling: Coupling,
    shapes: dict[str, tuple[int, int]],
    width: int,
    units: int,
) -> Iterator[tuple[str, Role]]:
    first: dict[str, int] = {}
    for part, path in coupling.rows:
        together = [p for p, other in coupling.rows if other == path]
        rows, wrong = divmod(shapes[path][0], width)
        if len(together) == 1:
            own = rows
        elif part in ("k", "v"):  # fused: what the query heads leave, in halves
            own, left = divmod(rows - units, 2)
            wrong = wrong or left
        else:
            own = units
        if wrong or own < 1 or units % own or (part in ("q", "gate", "up") and own != units):
            raise IntarsiaError(
                f"{f'{at}.{path}'.lstrip('.')}: its {shapes[path][0]} rows are not the {'heads' if width > 1 else 'channels'} that "
                f"{block} reads ({units} of width {width}); say the layout by hand, such as {EXAMPLE!r}, without this weight"
            )
        role = Role(block, coupling.kind, part, "rows", width, own, units // own, first.get(path, 0))
        first[path] = role.first + own
        yield f"{at}.{path}".lstrip("."), role


def _layer(module: nn.Module, path: str) -> nn.Module | None:
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        return None
    return layer if isinstance(getattr(layer, "weight", None), nn.Parameter) else None


def shape(layer: Any) -> tuple[int, int]:
    """(O, I) of a layer, whichever way round its weight is kept; a quantised one says it beside its packed weight."""
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    rows, columns = layer.weight.shape
    return (columns, rows) if turned(layer) else (rows, columns)


def turned(layer: Any) -> bool:
    """Whether the weight is kept as (I, O), as transformers' Conv1D does."""
    return hasattr(layer, "nf")


def _head_width(model: nn.Module, name: str, coupling: Coupling) -> int:
    if coupling.width is not None:
        return coupling.width
    above = model.get_submodule(name.rpartition(".")[0])
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    # The block's own word comes first: layers of one model may differ.
    for owner in (above, config):
        if isinstance(width := getattr(owner, "head_dim", None), int):
            return width
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not (isinstance(hidden, int) and isinstance(heads, int)):
        raise IntarsiaError(
            f"{name}: neither its block nor the model's config says how wide a head is (head_dim, or hidden_size and "
            f"num_attention_heads); say it by hand: layout={EXAMPLE!r}"
        )
    return hidden // heads
