"""The deck: a base with several adapters at hand, one or a fusion of them set in at a time.

Before a weight is written, the base's bits at the same place are kept; taking out puts those very bits back. Nothing is
ever subtracted. A switch is all or nothing: whatever fails, the model holds what it held before. From one adapter to
another every entry is written once: the base's bits where only the old one stood, the new one's everywhere else.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from intarsia import model as attached
from intarsia import store
from intarsia.bases import packing_of
from intarsia.deck import inserts
from intarsia.deck import plan as plans
from intarsia.deck import writer as writers
from intarsia.deck.plan import Plan, Shares
from intarsia.deck.shelf import Shelf
from intarsia.deck.status import Status, beside_of, kept_of
from intarsia.deck.weights import Weights
from intarsia.edits import Edit, Insert, Seen, place
from intarsia.errors import IntarsiaError, nearest

LEAST_MEMORY = 64 * 2**20


@dataclass(frozen=True, eq=False)
class _Inside:
    """What is in the weights. ``torn``: plans that may have been written in part, when giving back failed too."""

    plan: Plan
    given: Shares  # as they were given; times the strength they are the plan's
    strength: float = 1.0
    torn: tuple[Plan, ...] = ()


BASE = _Inside(Plan(), ())


class Deck:
    """Adapters at hand on one model. Methods may be called from any thread; they take turns.

    Example:
        >>> deck = Deck(model)                      # doctest: +SKIP
        >>> deck.add("out/pirate", "out/json")      # doctest: +SKIP
        >>> deck.use("pirate"); deck.fuse(pirate=0.6, json=0.4); deck.off()     # doctest: +SKIP

    Args:
        memory: bytes for plans and for adapters read from files, those last used; by default half of the model's, 64 MiB
            at least. What taking out needs is kept in any case.
        writer: ``native`` (machine code, with ``intarsia[fast]``), ``staged`` (plans in the host's memory, for GPUs), ``torch``,
            or ``auto``: the first two where they can be.
    """

    def __init__(self, model: nn.Module, memory: int | None = None, writer: str = "auto"):
        if attached.active_names(model):
            raise IntarsiaError(
                f"{', '.join(attached.active_names(model))} is active on this model; call intarsia.activate(model) or "
                "detach it, so that the deck starts from the base"
            )
        attached.check_unoccupied(model)
        inserts.check_none(model)
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 0):
            raise IntarsiaError(f"memory={memory!r}; expected a number of bytes, 0 or more")
        self.model = model
        self._weights = Weights(model)
        self._wanted_writer = writer
        self._writer = writers.chosen(writer, self._weights.adaptable)
        self.base_digest = attached.digest(model)
        self.last_switch_seconds = 0.0
        half = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
        self._shelf = Shelf(max(LEAST_MEMORY, half) if memory is None else memory)
        self._adapters: dict[str, store.Adapter] = {}
        self._inside, self._seen = BASE, Seen()
        self._lock = threading.RLock()
        self._reader: ThreadPoolExecutor | None = None

    @property
    def names(self) -> list[str]:
        """The adapters at hand."""
        return list(self._adapters)

    @property
    def active(self) -> dict[str, float]:
        """What is set in: adapter -> weight; empty for the base."""
        return dict(self._inside.plan.shares)

    def __getitem__(self, name: str) -> store.Adapter:
        """The adapter of that name. The numbers of one that was added by its folder are read when they are asked for."""
        return self._adapters[self._known(name)]

    # ------------------------------------------------------------------ at hand
    def add(
        self,
        *folders: str | Path | store.Adapter,
        any_base: bool = False,
        **named: str | Path | store.Adapter,
    ) -> None:
        """Take adapters in hand, by folder (named after it) or under a name of one's own. All or none.

        Of a folder only the head is read and checked, whatever the number of adapters at hand. Its numbers are read and
        checked when it is first used, or by :meth:`prefetch`.

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
            adapter = source if isinstance(source, store.Adapter) else store.open(source)
            attached.check_fits(
                self.model,
                adapter,
                str(source) if not isinstance(source, store.Adapter) else name,
                None if any_base else self.base_digest,
            )
            self._check_plain(name, adapter)
            fresh[name] = adapter
        with self._lock:
            taken = [name for name in fresh if name in self._adapters]
            if taken:  # by another thread, meanwhile
                raise IntarsiaError(f"the deck has an adapter {taken[0]!r} already; give this one another name")
            for name in fresh:
                self._adapters[name] = fresh[name]

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises IntarsiaError while it is set in."""
        with self._lock:
            if self._known(name) in self.active:
                raise IntarsiaError(f"{name!r} is set in; call deck.off() first")
            del self._adapters[name]
            self._shelf.clear(adapter=name)

    def prefetch(self, name: str, strength: float = 1.0) -> Future[None]:
        """Read an adapter and plan its setting in, in the background; :meth:`use` then only writes. -> when it is done.

        What is wrong with it is raised by ``use`` all the same, or by the future's ``result()``.
        """
        shares = self._checked({name: strength})
        with self._lock:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="intarsia-prefetch")
        return self._reader.submit(self._prefetch, name, shares)

    def _prefetch(self, name: str, shares: Shares) -> None:
        edits = self._adapters[name].edits
        for weight in edits:  # from the file, which is the slow part: nobody waits for it
            edits[weight]
        with self._lock:
            self._check_free()
            self._mend()
            self._look()
            plan = self._plan(shares)
            if plan is not self._inside.plan:
                self._writer.fetch(self._passage(self._inside.plan, plan))

    # ------------------------------------------------------------------ switching
    def use(self, name: str, strength: float = 1.0) -> None:
        """Set in one adapter alone: W' = W + strength * (edit(W) - W); what it has of inserts acts beside the layers, times this."""
        self._switch({name: 1.0}, strength, name)

    def fuse(self, weights: Mapping[str, float] | None = None, /, **named: float) -> None:
        """Set in the weighted sum of adapters: W' = W + sum_i w_i (edit_i(W) - W), exact on the union of sparse supports.

        Inserts of several at one layer all act, each on the layer's own input and output: y' = y + sum_i w_i g_i(x, y).
        """
        total = dict(weights or {}) | named
        if not total:
            raise IntarsiaError("fuse() was given no adapters; say for example deck.fuse(pirate=0.6, json=0.4)")
        self._switch(total, 1.0)

    def strength(self, strength: float) -> None:
        """What is set in, at another strength: of ``use(name)`` or ``fuse(a=..., b=...)``, each weight times this.

        Raises:
            IntarsiaError: when nothing is set in, or the strength is not a finite number.
        """
        with self._lock:
            if not self._inside.given:
                raise IntarsiaError("nothing is set in, so there is no strength to change; call use() or fuse() first")
            self._switch(dict(self._inside.given), strength, "what is set in")

    def off(self) -> None:
        """Take out what is set in: the base, to the bit."""
        self._switch({}, 1.0)

    def verify(self) -> str:
        """SHA-256 of the base under what is set in; it equals ``base_digest``. -> the digest.

        Raises:
            IntarsiaError: when it does not, because something other than this deck wrote into the weights.
        """
        with self._lock:
            given, strength = dict(self._inside.given), self._inside.strength
            self._switch({}, 1.0)
            found = attached.digest(self.model)
            self._switch(given, strength)
        if found != self.base_digest:
            raise IntarsiaError(
                f"the base has digest {found[:12]}, and had {self.base_digest[:12]} when the deck was made: "
                "something other than the deck wrote into its weights. Load the base again"
            )
        return found

    def status(self) -> Status:
        """What is set in, what it touches, and what is kept of the base for taking it out."""
        with self._lock:
            inside, shelf = self._inside, self._shelf
            planned = [key[1] for key in shelf.keys if isinstance(key, tuple) and key[0] == "plan"]
            return Status(
                active=dict(inside.plan.shares),
                strength=inside.strength,
                weights=kept_of(inside.plan),
                inserts=beside_of(inside.plan),
                kept_bytes=inside.plan.kept_bytes,
                memory=shelf.memory,
                plan_bytes=shelf.bytes,
                planned=tuple(" + ".join(n if x == 1 else f"{x:g} {n}" for n, x in shares) for shares in planned),
                dropped=tuple(shelf.dropped),
                writer=self._writer.name,
            )

    def _check_plain(self, name: str, adapter: store.Adapter) -> None:
        packed = {w: packing_of(self._weights[w]) for w, e in adapter.outlines.items() if e.in_weight() is not None}
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

    def _checked(self, weights: Mapping[str, float]) -> Shares:
        for name, weight in weights.items():
            self._known(name)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise IntarsiaError(f"the weight of {name!r} is {weight!r}; expected a finite number")
        return tuple((name, float(weight)) for name, weight in weights.items())

    def _check_free(self) -> None:
        if attached.active_names(self.model):
            raise IntarsiaError(
                "an adapter was activated on the deck's model; call intarsia.activate(model) to give the weights back"
            )
        attached.check_unoccupied(self.model, self)

    def _switch(self, weights: Mapping[str, float], strength: float, whose: str = "") -> None:
        with self._lock:
            given = self._checked(weights)
            if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
                raise IntarsiaError(f"the weight of {whose!r} is {strength!r}; expected a finite number")
            self._check_free()
            start = time.perf_counter()
            try:
                self._mend()
                self._look()
                shares = given if strength == 1 else self._checked({name: weight * strength for name, weight in given})
                self._exchange(_Inside(self._plan(shares), given, float(strength)))
            finally:
                self.last_switch_seconds = time.perf_counter() - start

    def _exchange(self, fresh: _Inside) -> None:
        """The one place where weights are written. Everything that can be known to fail has failed before."""
        old, new, matrix = self._inside, fresh.plan, self._weights.matrix
        if old.plan is new:
            self._inside = fresh
            return
        prepared = self._passage(old.plan, new)
        whole = {name: place(name, w.base.to(matrix(name).device), w.terms).bits for name, w in new.whole.items()}
        before = {name: matrix(name).clone() for name in old.plan.whole}
        self._inside = _Inside(old.plan, old.given, old.strength, torn=(new, old.plan))
        touched = {*old.plan.weights, *new.weights}
        try:
            self._occupy(new.shares or old.plan.shares)
            for name in prepared.copies:
                matrix(name).copy_(old.plan.whole[name].base)
            for name, bits in whole.items():
                matrix(name).copy_(bits)
            self._writer.write(prepared, self._weights)
            self._stand_beside(old.plan, new)
            if not new.shares:
                self._occupy(())
            self._weights.wrote(touched)
        except BaseException:
            plans.restore((new, old.plan), matrix)
            plans.renew(old.plan, matrix, before)
            self._stand_beside(new, old.plan)
            self._occupy(old.plan.shares)
            self._weights.wrote(touched)
            self._inside = old
            raise
        self._inside = fresh

    def _stand_beside(self, old: Plan, new: Plan) -> None:
        inserts.exchange(old.inserts, new.inserts, self._weights.layer, self.model, self._seen)

    def _occupy(self, shares: Shares) -> None:
        attached.occupy(self.model, " + ".join(name for name, _ in shares) or None, self)

    def _mend(self) -> None:
        """Back to the base, after a switch and its undoing both failed."""
        if self._inside.torn:
            plans.restore(self._inside.torn, self._weights.matrix)
            for plan in self._inside.torn:
                self._stand_beside(plan, BASE.plan)
            self._occupy(())
            self._weights.wrote({name for plan in self._inside.torn for name in plan.weights})
            self._inside = BASE

    def _look(self) -> None:
        """Notice what others did to the weights: plans know the base's bits, so they are made anew after that."""
        if not self._weights.changed():
            return
        for kind in ("plan", "passage"):
            self._shelf.clear(kind=kind)
        self._writer = writers.chosen(
            "auto" if self._wanted_writer == "native" else self._wanted_writer, self._weights.adaptable
        )
        inside = self._inside
        moved = inside.plan.moved(self._weights.matrix, self._writer.index_dtype, self._writer.keep)
        self._inside = _Inside(moved, inside.given, inside.strength) if inside.plan.shares else BASE
        self._weights.saw()

    # ------------------------------------------------------------------ plans
    def _plan(self, shares: Shares) -> Plan:
        if shares == self._inside.plan.shares:
            return self._inside.plan
        if not shares:
            return BASE.plan
        key = ("plan", shares)
        plan: Plan | None = self._shelf.get(key)
        if plan is None:
            terms: dict[str, list[tuple[float, Edit]]] = {}
            beside: dict[str, list[tuple[float, Insert]]] = {}
            for name, weight in shares:
                for target, edit in self._adapters[name].edits.items():
                    if (within := edit.in_weight()) is not None:
                        terms.setdefault(target, []).append((weight, within))
                    for factor, insert in edit.inserts():
                        beside.setdefault(target, []).append((weight * factor, insert))
            base = self._base_of()
            plan = plans.made(shares, terms, base, self._writer.index_dtype, self._writer.keep)
            layer, dtype = self._weights.layer, self._weights.dtype
            plan = replace(plan, inserts=inserts.prepared(beside, layer, base, dtype, self._seen))
            names = frozenset(name for name, _ in shares)
            for name in names:
                self._keep_numbers(name)
            self._shelf.put(key, plan, plan.bytes, names)
        return plan

    def _keep_numbers(self, name: str) -> None:
        """Numbers that were read from a file stay in memory as long as there is room for them."""
        edits = self._adapters[name].edits
        if isinstance(edits, store.LazyEdits):
            size = sum(edit.bytes for edit in (edits[weight] for weight in edits.made))
            self._shelf.put(("numbers", name), edits, size, frozenset([name]), edits.forget)

    def _passage(self, old: Plan, new: Plan) -> writers.Prepared:
        key = ("passage", old.shares, new.shares)
        found: tuple[Plan, Plan, writers.Prepared] | None = self._shelf.get(key)
        if found is None or found[0] is not old or found[1] is not new:
            prepared = self._writer.prepare(plans.passage(old, new), self._weights)
            names = frozenset(name for plan in (old, new) for name, _ in plan.shares)
            self._shelf.put(key, (old, new, prepared), prepared.bytes, names)
            return prepared
        return found[2]

    def _base_of(self) -> Callable[[str], Tensor]:
        """The base's matrix of a weight, whatever is set in: the exact copy, or a copy with the kept bits put back."""
        plan, matrix = self._inside.plan, self._weights.matrix
        parts = {name: (where, n) for where in plan.where for n, name in enumerate(where.weights)}

        def base(name: str) -> Tensor:
            if name in plan.whole:
                return plan.whole[name].base.to(matrix(name).device)
            packing = packing_of(self._weights[name])
            if not packing.in_place:  # nothing is ever set in there
                return packing.read(self._weights[name], packing.dtype(self._weights[name]))
            W = matrix(name)
            copy = W.clone()
            if name in parts:
                where, n = parts[name]
                plans.put_part(copy, where, n)
            return copy

        return base
