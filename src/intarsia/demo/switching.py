"""How long it takes to change the skill of a whole model: the deck, against what is done elsewhere, in one run.

All ways work on weights of the same shapes, in the dtype of the model; the order changes from round to round, so that a
machine that warms up or gets busy favours nobody. What is not the deck works on copies of the weights: adding and
subtracting does not give them back, and by how much is part of the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.deck import Deck
from intarsia.demo.result import Switch
from intarsia.edits import LowRank, Placement, place
from intarsia.train.progress import Progress

Factors = list[tuple[Tensor, Tensor, Tensor, float]]  # weight, B, A, scale


@torch.no_grad()
def time_switches(
    deck: Deck, sparse: tuple[str, str], lora: tuple[str, str], rounds: int, progress: Progress | None = None
) -> tuple[Switch, ...]:
    """Median times of switching between two sparse adapters and between two LoRAs. The deck is off afterwards.

    Args:
        sparse: names of two sparse adapters in the deck.
        lora: names of two LoRA adapters in the deck, on the same weights.
        rounds: how often each way is taken, in both directions in turn.
    """
    weights = dict(deck.model.named_parameters())
    targets = [name for name in weights if any(name in deck[adapter].edits for adapter in (*sparse, *lora))]
    base = {name: weights[name].detach().clone() for name in targets}
    ways: dict[str, _Way] = {
        "deck": _Deck(deck, sparse),
        "prepared": _Prepared(deck, sparse, base),
        "lora-fuse": _LoraFuse(deck, lora, base),
        "lora-switch": _LoraSwitch(deck, lora, base),
        "dense": _Dense(base),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-1, rounds):  # one round more, to warm up
        for name in names[number % len(names) :] + names[: number % len(names)]:
            way = ways[name]
            way.before(number % 2)
            start = time.perf_counter()
            way.switch(number % 2)
            taken = time.perf_counter() - start
            if number >= 0:
                times[name].append(taken)
        if progress:
            progress.work(number + 2, rounds + 1, "timing switches")
    return tuple(_summary(name, ways[name], times[name], base) for name in names)


def _summary(name: str, way: _Way, times: Sequence[float], base: dict[str, Tensor]) -> Switch:
    way.take_out()
    wrong = sum(int((way.weights[n] != bits).sum()) for n, bits in base.items())
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    share = wrong / sum(bits.numel() for bits in base.values())
    return Switch(name, way.what, statistics.median(times), low, high, share)


class _Way:
    """One way to change the skill: ``switch`` is what is timed."""

    what: str
    weights: dict[str, Tensor]

    def before(self, to: int) -> None:
        """What has to be so before, and is not timed."""

    def switch(self, to: int) -> None:
        """Put the ``to``-th skill in the place of the other."""
        raise NotImplementedError

    def take_out(self) -> None:
        """Back to the base, as well as this way can."""


class _Deck(_Way):
    what = "sparse: deck.use (exact)"

    def __init__(self, deck: Deck, names: tuple[str, str]) -> None:
        self.deck, self.names = deck, names
        self.weights = {n: p.detach() for n, p in deck.model.named_parameters()}

    def before(self, to: int) -> None:
        self.deck.use(self.names[1 - to])

    def switch(self, to: int) -> None:
        self.deck.use(self.names[to])

    def take_out(self) -> None:
        self.deck.off()


class _Prepared(_Way):
    what = "sparse: the writes alone (bits at hand)"

    def __init__(self, deck: Deck, names: tuple[str, str], base: dict[str, Tensor]) -> None:
        self.weights = {n: t.clone() for n, t in base.items()}
        self.sets = [self._placed(deck, name) for name in names]
        self.kept = [[(W, bits.read(W)) for W, bits in placed] for placed in self.sets]
        self.inside: int | None = None

    def _placed(self, deck: Deck, name: str) -> list[tuple[Tensor, Placement]]:
        edits = deck[name].edits
        return [(self.weights[n], place(n, self.weights[n], [(1.0, edit)])) for n, edit in edits.items()]

    def before(self, to: int) -> None:
        if self.inside != 1 - to:
            self.take_out()
            _write(self.sets[1 - to])
            self.inside = 1 - to

    def switch(self, to: int) -> None:
        self.take_out()
        _write(self.sets[to])
        self.inside = to

    def take_out(self) -> None:
        if self.inside is not None:
            _write(self.kept[self.inside])
            self.inside = None


def _write(placed: Sequence[tuple[Tensor, Placement]]) -> None:
    for W, bits in placed:
        bits.write(W)


class _Lora(_Way):
    def __init__(self, deck: Deck, names: tuple[str, str], base: dict[str, Tensor]) -> None:
        self.weights = {n: t.clone() for n, t in base.items()}
        self.factors = [self._factors(deck, name) for name in names]
        self.inside: int | None = None

    def _factors(self, deck: Deck, name: str) -> Factors:
        found: Factors = []
        for n, edit in deck[name].edits.items():
            assert isinstance(edit, LowRank)
            W = self.weights[n]
            found.append((W, edit.B.to(W.dtype), edit.A.to(W.dtype), edit.scale))
        return found

    def add(self, which: int, sign: int) -> None:
        for W, B, A, scale in self.factors[which]:
            W.addmm_(B, A, alpha=sign * scale)

    def take_out(self) -> None:
        if self.inside is not None:
            self.add(self.inside, -1)
            self.inside = None


class _LoraFuse(_Lora):
    what = "LoRA: fuse into the base (addmm_)"

    def __init__(self, deck: Deck, names: tuple[str, str], base: dict[str, Tensor]) -> None:
        super().__init__(deck, names, base)
        self.base = base

    def before(self, to: int) -> None:
        self.take_out()

    def switch(self, to: int) -> None:
        self.add(to, 1)
        self.inside = to

    def take_out(self) -> None:  # from a second copy of the base, which this way is granted
        for n, bits in self.base.items():
            self.weights[n].copy_(bits)
        self.inside = None


class _LoraSwitch(_Lora):
    what = "LoRA: one out, one in (addmm_ twice)"

    def before(self, to: int) -> None:
        if self.inside is None:
            self.add(1 - to, 1)
            self.inside = 1 - to

    def switch(self, to: int) -> None:
        self.add(1 - to, -1)
        self.add(to, 1)
        self.inside = to


class _Dense(_Way):
    what = "dense copy (a second set of weights)"

    def __init__(self, base: dict[str, Tensor]) -> None:
        self.weights = {n: t.clone() for n, t in base.items()}
        self.base = base

    def switch(self, to: int) -> None:
        for n, bits in self.base.items():
            self.weights[n].copy_(bits)
