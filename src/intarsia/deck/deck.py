"""The deck: a base with several adapters at hand, one or a fusion of them set in at a time.

Before a weight is written, the base's bits at the same place are kept; taking out puts those very bits back. Nothing is
ever subtracted. A switch is all or nothing: whatever fails, the model holds what it held before.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from intarsia import model as attached
from intarsia import store
from intarsia.bases import packing_of
from intarsia.edits import Edit, Placement, place
from intarsia.errors import IntarsiaError, nearest
from intarsia.operators import Operator, operator_of
from intarsia.site import adaptable_layers, weight_name


class Deck:
    """Adapters at hand on one model.

    Example:
        >>> deck = Deck(model)                      # doctest: +SKIP
        >>> deck.add("out/pirate", "out/json")      # doctest: +SKIP
        >>> deck.use("pirate"); deck.fuse(pirate=0.6, json=0.4); deck.off()     # doctest: +SKIP
    """

    def __init__(self, model: nn.Module):
        if attached.active_names(model):
            raise IntarsiaError(
                f"{', '.join(attached.active_names(model))} is active on this model; call intarsia.activate(model) or "
                "detach it, so that the deck starts from the base"
            )
        attached.check_unoccupied(model)
        self.model = model
        self.base_digest = attached.digest(model)
        self.last_switch_seconds = 0.0
        self._adapters: dict[str, store.Adapter] = {}
        self._weights: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._operators = {
            weight_name(model, name): operator_of(layer) for name, layer in adaptable_layers(model).items()
        }
        self._active: dict[str, float] = {}
        self._kept: dict[str, Placement] = {}  # the base's bits under what is set in
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        """The adapters at hand."""
        return list(self._adapters)

    @property
    def active(self) -> dict[str, float]:
        """What is set in: adapter -> weight; empty for the base."""
        return dict(self._active)

    def __getitem__(self, name: str) -> store.Adapter:
        """The adapter of that name."""
        return self._adapters[self._known(name)]

    def add(
        self,
        *folders: str | Path | store.Adapter,
        any_base: bool = False,
        **named: str | Path | store.Adapter,
    ) -> None:
        """Take adapters in hand, by folder (named after it) or under a name of one's own. All or none.

        Raises:
            IntarsiaError: for a name that is taken, a folder that is not whole, an adapter of another base
                (``any_base=True`` takes that risk) or of other shapes, or one that changes a packed weight (NF4, int8).
        """
        pairs = [(f.name if isinstance(f, store.Adapter) else Path(f).resolve().name, f) for f in folders] + list(
            named.items()
        )
        fresh: dict[str, store.Adapter] = {}
        for name, source in pairs:
            if name in self._adapters or name in fresh:
                raise IntarsiaError(
                    f"the deck has an adapter {name!r} already; give this one another name: deck.add(other={str(source)!r})"
                )
            adapter = source if isinstance(source, store.Adapter) else store.read(source)
            attached.check_fits(
                self.model,
                adapter,
                str(source) if not isinstance(source, store.Adapter) else name,
                None if any_base else self.base_digest,
            )
            self._check_plain(name, adapter)
            edits = {w: edit.to(self._weights[w].device) for w, edit in adapter.edits.items()}
            fresh[name] = store.Adapter(adapter.name, edits, adapter.base, adapter.method, adapter.about, adapter.note)
        with self._lock:
            self._adapters |= fresh

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises IntarsiaError while it is set in."""
        with self._lock:
            if self._known(name) in self._active:
                raise IntarsiaError(f"{name!r} is set in; call deck.off() first")
            del self._adapters[name]

    def use(self, name: str, strength: float = 1.0) -> None:
        """Set in one adapter alone: W' = W + strength * (edit(W) - W)."""
        self._switch({self._known(name): strength})

    def fuse(self, weights: Mapping[str, float] | None = None, /, **named: float) -> None:
        """Set in the weighted sum of adapters: W' = W + sum_i w_i (edit_i(W) - W), exact on the union of sparse supports."""
        total = dict(weights or {}) | named
        if not total:
            raise IntarsiaError("fuse() was given no adapters; say for example deck.fuse(pirate=0.6, json=0.4)")
        self._switch({self._known(name): weight for name, weight in total.items()})

    def off(self) -> None:
        """Take out what is set in: the base, to the bit."""
        self._switch({})

    def verify(self) -> str:
        """SHA-256 of the base under what is set in; it equals ``base_digest``. -> the digest.

        Raises:
            IntarsiaError: when it does not, because something other than this deck wrote into the weights.
        """
        with self._lock:
            active = self.active
            self._switch({})
            found = attached.digest(self.model)
            self._switch(active)
        if found != self.base_digest:
            raise IntarsiaError(
                f"the base has digest {found[:12]}, and had {self.base_digest[:12]} when the deck was made: "
                "something other than the deck wrote into its weights. Load the base again"
            )
        return found

    def _check_plain(self, name: str, adapter: store.Adapter) -> None:
        packed = {w: packing_of(self._weights[w]) for w in adapter.edits}
        packed = {w: packing for w, packing in packed.items() if not packing.in_place}
        if packed:
            first, packing = next(iter(packed.items()))
            stored = packing.name(self._weights[first])
            more = f" and {len(packed) - 1} more weights are" if len(packed) > 1 else " is"
            raise IntarsiaError(
                f"{name!r} cannot be set in: {first}{more} stored in {stored}, where no entry can be written without "
                "changing its neighbours. Use the adapter beside the weights: intarsia.load(model, folder), activate, rows; "
                "or make them plain first: intarsia.bases.dequantise(model), then deck.add(..., any_base=True)"
            )

    def _known(self, name: str) -> str:
        if name not in self._adapters:
            raise IntarsiaError(f"the deck has no adapter {name!r}; {nearest(name, self._adapters)}")
        return name

    def _switch(self, weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise IntarsiaError(f"the weight of {name!r} is {weight!r}; expected a finite number")
        if attached.active_names(self.model):
            raise IntarsiaError(
                "an adapter was activated on the deck's model; call intarsia.activate(model) to give the weights back"
            )
        attached.check_unoccupied(self.model, self)
        with self._lock:
            start = time.perf_counter()
            before = self._active
            try:
                self._take_out()
                self._set_in(weights)
            except BaseException:
                self._take_out()
                self._set_in(before)
                raise
            finally:
                self.last_switch_seconds = time.perf_counter() - start

    def _matrix(self, name: str) -> Tensor:
        """The weight as its edits see it, (O, I). A view, made anew because moving a model gives its weights new memory."""
        operator = self._operators[name]
        assert isinstance(operator, Operator)  # add() has taken no other
        return operator.matrix(self._weights[name].detach())

    def _take_out(self) -> None:
        for name, bits in self._kept.items():
            bits.write(self._matrix(name))
        # Only when all are back: an exception in between leaves every kept bit for the next attempt.
        self._kept, self._active = {}, {}
        attached.occupy(self.model, None, self)

    def _set_in(self, weights: Mapping[str, float]) -> None:
        terms: dict[str, list[tuple[float, Edit]]] = {}
        for name, weight in weights.items():
            for target, edit in self._adapters[name].edits.items():
                terms.setdefault(target, []).append((weight, edit))
        placements = {target: place(target, self._matrix(target), parts) for target, parts in terms.items()}
        if placements:
            attached.occupy(self.model, " + ".join(weights), self)
        for target, placement in placements.items():
            matrix = self._matrix(target)
            self._kept[target] = placement.read(matrix)
            placement.write(matrix)
        self._active = dict(weights)
