"""The report before a merge: where adapters of one base meet, and what each is predicted to do to the others.

**Predicted interference.** Adapter A moves the outputs of a weight by D_A x; beside it, B moves them by D_B x. On A's own inputs that is,
relative to A's own effect, ||D_B X_A|| / ||D_A X_A||, with X_A the inputs of A's task. Where their norms are known (``inputs``),
X_A is the diagonal matrix of them. Where not, X_A = D_A^T: a gradient step adds sum_t g_t x_t^T to the weight, so the change itself
says which inputs it was trained on, and how strongly: D_A^T D_A is about proportional to sum_t x_t x_t^T. The ratio is then
||D_B D_A^T|| / ||D_A D_A^T||: 0 where B reads no direction that A has learned to read, 1 for an adapter beside its own copy.
It is the first-order effect, layer by layer: what the next layers make of it, only measuring says (:mod:`intarsia.merge`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rich.table import Table
from torch import Tensor

from intarsia.analyze import pair_tables as tables
from intarsia.analyze.change import Progress, layer_of, module_of
from intarsia.analyze.pair import Pair, compared, leading_of, own_effect, products_of, together
from intarsia.analyze.product import directions
from intarsia.analyze.reduced import Reduced, reduced, square
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter

Shares = Mapping[str, float] | Callable[[str, str], float]
Inputs = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Summand:
    """One adapter of a merge, times its share in it. ``norm_share``: of the squared norms of all of them, 0..1."""

    name: str
    weights: int
    touched: int
    norm: float
    norm_share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class Interference:
    """Adapters on one base before they are merged. ``pairs``: every two of them on every weight that one of them changes."""

    summands: tuple[Summand, ...]
    pairs: tuple[Pair, ...]

    @property
    def totals(self) -> list[Pair]:
        """Every two adapters over all their weights."""
        return self.by(lambda weight: "all")

    @property
    def layers(self) -> list[Pair]:
        """Every two adapters in every layer, ``where`` being its number; weights outside of layers are in none."""
        numbered = [pair for pair in self.pairs if layer_of(pair.where) is not None]
        return _grouped(numbered, layer_of)

    @property
    def modules(self) -> list[Pair]:
        """Every two adapters in every kind of layer, such as all ``q_proj``."""
        return self.by(module_of)

    def by(self, key: Callable[[str], object]) -> list[Pair]:
        """Every two adapters over the weights whose names are alike under ``key``."""
        return _grouped(self.pairs, key)

    def worst(self, count: int = 5) -> list[Pair]:
        """The weights that add most to the predicted interference of a pair, relative to what an adapter does in all;

        without products, those where most of the norm has opposite signs.
        """
        totals = {(pair.first, pair.second): pair.products for pair in self.totals}

        def size(pair: Pair) -> float:
            whole = totals[pair.first, pair.second]
            if pair.products is None or whole is None:
                return pair.conflict_norm
            added = zip(pair.products.foreign, whole.own, strict=True)
            return max(foreign / own if own else 0.0 for foreign, own in added)

        return sorted((pair for pair in self.pairs if pair.weights), key=size, reverse=True)[:count]

    def apart(self) -> list[tuple[str, str]]:
        """The pairs that change no weight in common."""
        return [(pair.first, pair.second) for pair in self.totals if not pair.weights]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "adapters": [part.to_dict() for part in self.summands],
            "pairs": [pair.to_dict() for pair in self.totals],
            "layers": [pair.to_dict() for pair in self.layers],
            "modules": [pair.to_dict() for pair in self.modules],
            "weights": [pair.to_dict() for pair in self.pairs],
        }

    def tables(self, worst: int = 5) -> list[Table]:
        """For the terminal: the adapters, the pairs, the worst weights."""
        parts = tables.summands(self.summands)
        most = self.worst(worst) if len(self.pairs) > 1 else []
        return [parts, tables.pairs(self.totals), *([tables.weights(most)] if most else [])]

    def legend(self) -> str:
        """What the columns of the tables mean."""
        return tables.legend(any(pair.products is not None for pair in self.pairs))


def interference(
    adapters: Mapping[str, Adapter] | Sequence[Adapter],
    *,
    shares: Shares | None = None,
    weights: Mapping[str, Tensor] | None = None,
    inputs: Inputs | None = None,
    products: bool = True,
    spectral: bool = False,
    progress: Progress | None = None,
) -> Interference:
    """Compare every two adapters on every weight. The adapters are left alone.

    Args:
        shares: what each is multiplied with in the sum, by its name, or by function(adapter, weight); 1 where none is given.
        weights: the base's weights by name, (O, I) each; only needed for edits whose change depends on them (DoRA).
        inputs: root mean squares of the inputs of each weight on each adapter's own data, ``{adapter: {weight: (I,)}}``;
            see :func:`intarsia.analyze.input_norms`.
        products: AWOM, AWOR and predicted interference too; without them, sparse adapters cost next to nothing.
        spectral: the spectral AWOM and the alignment of leading directions too: a singular value decomposition a change.

    Raises:
        IntarsiaError: for fewer than two adapters, alike names, different bases or shapes, numbers that are not finite, and a
            change that depends on a weight that was not given. All before anything is measured, but for the numbers.
    """
    named = _named(adapters)
    _check(named, weights, inputs)
    every = list(dict.fromkeys(weight for adapter in named.values() for weight in adapter.edits))
    pairs: list[Pair] = []
    squares, touched = dict.fromkeys(named, 0.0), dict.fromkeys(named, 0)
    for done, weight in enumerate(every, 1):
        changes = {name: _change(adapter, name, weight, shares, weights) for name, adapter in named.items()}
        for name, change in changes.items():
            squares[name] += 0.0 if change is None else square(change)
            touched[name] += 0 if change is None else change.touched
        pairs += _compared(weight, changes, inputs or {}, products, spectral)
        if progress:
            progress(done, len(every), "comparing the adapters")
    total = sum(squares.values())
    parts = tuple(
        Summand(
            name,
            len(adapter.edits),
            touched[name],
            squares[name] ** 0.5,
            squares[name] / total if total else 0.0,
        )
        for name, adapter in named.items()
    )
    return Interference(parts, tuple(pairs))


def _compared(
    weight: str, changes: Mapping[str, Reduced | None], inputs: Inputs, products: bool, spectral: bool
) -> Iterable[Pair]:
    """Every two adapters on one weight, what belongs to one adapter computed once."""
    norms = {name: inputs.get(name, {}).get(weight) for name in changes}
    own = {name: own_effect(change, norms[name]) if products else 0.0 for name, change in changes.items()}
    turned = {name: directions(change) if spectral and change else None for name, change in changes.items()}
    for (first, one), (second, other) in combinations(changes.items(), 2):
        if one is None and other is None:
            continue
        pair = compared(first, second, weight, one, other)
        extra: dict[str, Any] = {}
        if products:
            both = (norms[first], norms[second])
            extra["products"] = products_of(one, other, both, (own[first], own[second]))
        if spectral:
            extra["leading"] = leading_of(turned[first], turned[second])
        yield Pair(**{**vars(pair), **extra})


def _change(
    adapter: Adapter, name: str, weight: str, shares: Shares | None, weights: Mapping[str, Tensor] | None
) -> Reduced | None:
    if weight not in adapter.edits:
        return None
    share = 1.0 if shares is None else shares(name, weight) if callable(shares) else shares.get(name, 1.0)
    if not share:  # it takes no part here
        return None
    edit = adapter.edits[weight].in_weight()
    if edit is None:  # what acts beside the layer meets nothing in the weight
        return None
    try:
        return reduced(edit, weights[weight] if weights is not None and edit.needs_weight else None, share)
    except IntarsiaError as error:
        raise IntarsiaError(f"{name}: {weight}: {error}") from error


def _named(adapters: Mapping[str, Adapter] | Sequence[Adapter]) -> dict[str, Adapter]:
    pairs = list(adapters.items()) if isinstance(adapters, Mapping) else [(a.name, a) for a in adapters]
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
        raise IntarsiaError(f"several adapters are named {twice}; give them names of their own: {{name: adapter}}")
    if len(named) < 2:
        raise IntarsiaError(f"found {len(named)} adapter{'s' * (len(named) != 1)}; interference needs at least two")
    return named


def _check(named: Mapping[str, Adapter], weights: Mapping[str, Tensor] | None, inputs: Inputs | None) -> None:
    """All faults at once."""
    if len({adapter.base.digest for adapter in named.values()}) > 1:
        lines = [f"  {name}: {a.base.source or 'a model'}, {a.base.digest[:12]}" for name, a in named.items()]
        raise IntarsiaError("these adapters belong to different bases and cannot be merged:\n" + "\n".join(lines))
    faults, shapes = [], dict[str, tuple[str, tuple[int, ...]]]()
    for name, adapter in named.items():
        for weight, edit in adapter.outlines.items():
            first, shape = shapes.setdefault(weight, (name, tuple(edit.shape)))
            if tuple(edit.shape) != shape:
                faults.append(f"{weight}: {name} edits a weight {tuple(edit.shape)}, {first} one {shape}")
            if not edit.needs_weight:
                continue
            if weights is None or weight not in weights:
                faults.append(
                    f"{name}: {weight}: what a {edit.kind} edit changes depends on the base's weight; give it"
                )
            elif tuple(weights[weight].shape) != tuple(edit.shape):
                faults.append(
                    f"{name}: {weight}: edits {tuple(edit.shape)}; the weight is {tuple(weights[weight].shape)}"
                )
    for name, norms in (inputs or {}).items():
        if name not in named:
            faults.append(f"inputs are given for {name!r}, which is none of {', '.join(named)}")
        for weight, norm in norms.items() if name in named else ():
            known = named[name].outlines.get(weight)
            if known is not None and tuple(norm.shape) != (known.shape[1],):
                faults.append(f"{name}: {weight}: inputs are {tuple(norm.shape)}; expected {(known.shape[1],)}")
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise IntarsiaError("\n  ".join(["the adapters cannot be compared:", *faults[:5]]) + more)


def _grouped(pairs: Iterable[Pair], key: Callable[[str], object]) -> list[Pair]:
    groups: dict[tuple[object, str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((key(pair.where), pair.first, pair.second), []).append(pair)
    return [together(group, str(where)) for (where, _, _), group in groups.items()]
