"""Norms that decide how hard a LoRA gradient is to approximate, layer by layer and head by head. A diagnostic, not a speed-up.

Hu, Su, Kuo, Song & Liu 2024, "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models",
arXiv:2406.03136: for one attention head with input X (L, d) the gradient can be approximated in almost linear time in L where

    Gamma = max(||X W_Q||_max, ||X dW_Q||_max, and the same of K)  is  o(sqrt(log L)),

and in no sub-quadratic time where one of these is Omega(sqrt(log L)), under SETH. The constants are open, so a ratio
Gamma / sqrt(ln L) above 1 says "on the wrong side, if the constant is 1" and no more. Any kind of edit is measured alike.

Products are without biases and before a rotation of positions, in float32. B rows, L tokens, I in, O out, w width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.edits import Edit
from intarsia.errors import IntarsiaError
from intarsia.families import blocks, roles
from intarsia.model import active_names, check_fits, check_unoccupied, digest
from intarsia.role import Role
from intarsia.site import Site, site_at
from intarsia.store import Adapter


@dataclass(frozen=True)
class HeadNorms:
    """The largest entries of one weight's products, of one head where the weight makes queries or keys.

    Attributes:
        part: ``q``, ``k``, or nothing for other weights.
        head: number of the head, for keys of the key-value head; None for a whole weight.
        base: max |x W^T|.
        change: max |x dW^T|.
        together: max |x (W + dW)^T|.
        ratio: max(base, change) / sqrt(ln L).
        above: ratio > 1.
    """

    weight: str
    part: str
    head: int | None
    base: float
    change: float
    together: float
    ratio: float
    above: bool


@dataclass(frozen=True)
class ScoreBound:
    """``bound`` = w * max|q| * max|k|, which no |q . k| of this query head is above."""

    block: str
    head: int
    bound: float


@dataclass(frozen=True)
class NormReport:
    """All norms of one batch. ``length``: L, tokens of the longest row; ``threshold``: sqrt(ln L)."""

    length: int
    threshold: float
    rows: tuple[HeadNorms, ...]
    scores: tuple[ScoreBound, ...]

    @property
    def above(self) -> int:
        """How many rows are above the threshold."""
        return sum(row.above for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"rows": [asdict(r) for r in self.rows], "scores": [asdict(s) for s in self.scores]}


@torch.no_grad()
def norm_report(model: nn.Module, batch: Mapping[str, Tensor], adapter: Adapter | None = None) -> NormReport:
    """Run one batch through the base, with the adapter's changes beside its layers, and measure every product.

    Weights are not written: each layer's output gets x dW^T added on its way. Measured are the weights that the adapter edits, and
    all queries and keys of attention blocks whose names are known.

    Args:
        model: the base, with no adapter active.
        batch: ``input_ids`` (B, L), and ``attention_mask`` where rows are padded; padding is not measured.
        adapter: what to look at; None for the base alone.

    Raises:
        IntarsiaError: for a model with an adapter on, an adapter of another base or of layers that are not linear, a batch of no
            tokens, or rows of a single token, whose sqrt(ln L) is zero.
    """
    if active := active_names(model):
        raise IntarsiaError(f"{', '.join(active)} is active on this model; intarsia.activate(model) turns it off")
    check_unoccupied(model)
    length, mask = _tokens(batch)
    edits = _edits(model, adapter)
    parts = _parts(model)
    measured: dict[str, _Largest] = {}
    training = model.training
    with ExitStack() as hooks:
        for name in dict.fromkeys([*parts, *edits]):
            site = site_at(model, name)
            hook = _hook(site, edits.get(name), mask, measured)
            hooks.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        model.eval()
        try:
            model(**{key: value for key, value in batch.items() if key != "labels"})
        finally:
            model.train(training)
    threshold = math.sqrt(math.log(length))
    rows: list[HeadNorms] = []
    for name, largest in measured.items():
        for role in parts.get(name, [None]):
            rows += _rows(name, role, largest, threshold)
    return NormReport(length, threshold, tuple(rows), tuple(_scores(parts, measured)))


@dataclass(frozen=True, eq=False)
class _Largest:
    """Largest entries over all tokens, (O,) each."""

    base: Tensor
    change: Tensor
    together: Tensor


def _tokens(batch: Mapping[str, Tensor]) -> tuple[int, Tensor]:
    """L of the longest row, and which places hold tokens, (B, L)."""
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2 or not ids.numel():
        found = "none" if ids is None else str(tuple(ids.shape))
        raise IntarsiaError(f"input_ids are {found}; expected (rows, tokens)")
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    length = int(mask.sum(dim=1).max())
    if length < 2:
        raise IntarsiaError(f"the longest row has {length} tokens; sqrt(ln L) needs two or more")
    return length, mask


def _edits(model: nn.Module, adapter: Adapter | None) -> dict[str, Edit]:
    """By layer. Only linear ones: elsewhere an output is not one row of products a token."""
    if adapter is None:
        return {}
    check_fits(model, adapter, adapter.name, digest(model))
    sites = {name.removesuffix(".weight"): edit for name, edit in adapter.edits.items()}
    strange = [n for n in sites if (site := site_at(model, n)).operator.kind != "linear" or site.tied]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise IntarsiaError(
            f"norms are measured on linear layers of their own; {adapter.name} edits {', '.join(strange[:3])}{more}"
        )
    return sites


def _parts(model: nn.Module) -> dict[str, list[Role | None]]:
    """The roles of every weight that makes queries or keys; none where no block has names that are known."""
    try:
        found = roles(blocks(model))
    except IntarsiaError:  # no attention that can be told apart: whole weights are measured all the same
        return {}
    made: dict[str, list[Role | None]] = {}
    for name, of in found.items():
        wanted: list[Role | None] = [role for role in of if role.kind == "attention" and role.part in ("q", "k")]
        if wanted:
            made[name] = wanted
    return made


def _hook(site: Site, edit: Edit | None, mask: Tensor, measured: dict[str, _Largest]) -> Any:
    def look(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, W = inputs[0].float(), site.weight.float()
        base = site.operator.product(x, W)
        change = torch.zeros_like(base) if edit is None else _product(site, edit, x, W)
        kept = mask.to(x.device).view(-1) if x.shape[:-1] == mask.shape else ...
        flat = [y.reshape(-1, y.shape[-1])[kept].abs().amax(0) for y in (base, change, base + change)]
        measured[site.name] = _Largest(*flat)
        return output if edit is None else output + change.to(output.dtype)

    return look


def _product(site: Site, edit: Edit, x: Tensor, W: Tensor) -> Tensor:
    """x dW^T. Two thin factors are never multiplied out."""
    edit = edit.to(x.device)
    if (low := edit.low_rank()) is not None:
        return low.scale * site.operator.low_rank(x, low.B.to(x.dtype), low.A.to(x.dtype))
    return site.operator.product(x, edit.delta(W))


def _rows(name: str, role: Role | None, largest: _Largest, threshold: float) -> list[HeadNorms]:
    heads = [(None, slice(None))] if role is None else [(h, _head(role, h)) for h in range(role.units)]
    rows = []
    for head, place in heads:
        base, change, together = (float(v[place].max()) for v in (largest.base, largest.change, largest.together))
        part, ratio = role.part if role else "", max(base, change) / threshold
        rows.append(HeadNorms(f"{name}.weight", part, head, base, change, together, ratio, ratio > 1))
    return rows


def _head(role: Role, head: int) -> slice:
    first = (role.first + head) * role.width
    return slice(first, first + role.width)


def _scores(parts: Mapping[str, list[Role | None]], measured: Mapping[str, _Largest]) -> list[ScoreBound]:
    by_block: dict[str, dict[str, tuple[Role, Tensor]]] = {}
    for name, of in parts.items():
        for role in of:
            if role is not None and name in measured:
                by_block.setdefault(role.block, {})[role.part] = (role, measured[name].together)
    found = []
    for block, pair in by_block.items():
        if len(pair) < 2:
            continue
        (q, queries), (k, keys) = pair["q"], pair["k"]
        for head in range(q.units):
            largest = [float(queries[_head(q, head)].max()), float(keys[_head(k, head // k.group)].max())]
            found.append(ScoreBound(block, head, q.width * largest[0] * largest[1]))
    return found
