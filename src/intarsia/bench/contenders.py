"""Who is timed: our methods, full fine-tuning, and the floor; those of HF PEFT are in :mod:`intarsia.bench.others`.

All contenders stand on the same parameters of one base, each in modules of its own, so that sixteen of them take little
more memory than one. They train with learning rate 0: every optimizer does its whole work and no weight moves.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from intarsia import registry
from intarsia.bench.budget import Scale, fitted
from intarsia.bench.models import twin
from intarsia.bench.wanted import label
from intarsia.errors import IntarsiaError, nearest
from intarsia.method import Method
from intarsia.model import activate, attach, attached_names, detach, states
from intarsia.site import ALL_LINEAR, find_sites
from intarsia.support import GRANULARITIES

SHARE = 0.01  # of the entries, where counts need not be equal
RANK = 16  # of the LoRA that sets the equal count

FLOOR, FULL, LORA = "floor", "full", "peft-lora"
AGAINST = (FLOOR, LORA, FULL)  # what everybody is compared with


class Unavailable(Exception):
    """Why a contender cannot run here: a package or a method that is missing, a model that it does not fit."""


@dataclass
class Base:
    """The model that everybody trains, and one batch of token ids (B, T) of it."""

    model: Any
    ids: Tensor
    targets: str | Sequence[str] = ALL_LINEAR

    @cached_property
    def sites(self) -> dict[str, tuple[int, int]]:
        """(O, I) of every adapted weight, by the name of its layer."""
        return {name: site.shape for name, site in find_sites(self.model, self.targets).items()}

    @cached_property
    def count(self) -> int:
        """The equal count: what LoRA of rank :data:`RANK` trains here."""
        return sum(RANK * (rows + columns) for rows, columns in self.sites.values())

    @property
    def batch(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "labels": self.ids}

    @cached_property
    def ours(self) -> nn.Module:
        """The twin that carries all adapters of ours; at most one of them is active."""
        return twin(self.model)


@dataclass
class Subject:
    """A contender made ready on a base: what is called, and what it trains."""

    model: Any
    trained: list[nn.Parameter]
    own: list[Tensor]  # all that it holds beside the base
    loss: Callable[[], Tensor]
    trains_base: bool = False
    enter: Callable[[], None] = lambda: None
    leave: Callable[[], None] = lambda: None
    drop: Callable[[], None] = lambda: None  # take it off the base again
    attach_s: float | None = None  # seconds that putting it on took
    setting: Mapping[str, Any] = field(default_factory=dict)  # what it is, as plain values


@dataclass(frozen=True)
class Contender:
    """One that takes part: its name (``tile@1%``), what it is, and how it is made ready."""

    name: str
    title: str
    make: Callable[[Base], Subject]

    @property
    def stem(self) -> str:
        """The name without its share: ``tile`` of ``tile@1%``."""
        return self.name.partition("@")[0]


def ours() -> list[Contender]:
    """The floor, full fine-tuning, every granularity that is known, and our methods."""
    found = [
        Contender(FLOOR, "frozen base, gradient to the bottom", _floor),
        Contender(FULL, "full fine-tuning", _full),
    ]
    for name in GRANULARITIES:
        equal = name in ("element", "row", "column")  # tiles and lines stand at 1 %, elements at both
        if not equal or name == "element":
            config = {"name": "shira", "granularity": name, "density": SHARE}
            found.append(_method(f"{name}@1%", f"SHiRA, {name}s, 1 % trained", config))
        if equal:
            title = f"SHiRA, {name}s, as many as LoRA of rank {RANK}"
            found.append(_method(f"{name}@equal", title, {"name": "shira", "granularity": name}, equal=True))
    for name in ("paca", "s2ft"):
        if (cls := registry.methods().get(name)) is not None:
            title = f"{cls.title}, as many as LoRA of rank {RANK}"
            found.append(_method(f"{name}@equal", title, {"name": name}, equal=True))
    found.append(_method("lora@r16", f"LoRA of rank {RANK}", {"name": "lora", "rank": RANK}))
    inner = {"name": "lora", "rank": RANK}
    found.append(_method("dora@r16", f"DoRA around LoRA of rank {RANK}", {"name": "dora", "inner": inner}))
    return found


def added(config: Mapping[str, Any]) -> Contender:
    """A contender for any method of ours."""
    return _method(label(config), registry.find(str(config["name"])).title, config)


def chosen(contenders: Sequence[Contender], only: Iterable[str]) -> list[Contender]:
    """Those that the patterns name, by name, stem or glob; all where no pattern is given.

    Raises:
        IntarsiaError: for every pattern that names nobody, with the nearest names.
    """
    patterns = [part.strip() for text in only for part in text.split(",") if part.strip()]
    if not patterns:
        return list(contenders)
    hits = {pattern: [c for c in contenders if _named(c, pattern)] for pattern in patterns}
    known = {c.stem for c in contenders}
    if faults := [f"no contender {p!r}; {nearest(p, known)}" for p, found in hits.items() if not found]:
        raise IntarsiaError("\n".join(faults))
    return [c for c in contenders if any(c in found for found in hits.values())]


def _named(contender: Contender, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (contender.name, contender.stem))


# ------------------------------------------------------------------ how they are made
def _floor(base: Base) -> Subject:
    model: Any = twin(base.model)

    def loss() -> Tensor:
        embedded = model.get_input_embeddings()(base.ids).detach().requires_grad_()
        return model(inputs_embeds=embedded, labels=base.ids).loss  # type: ignore[no-any-return]

    return Subject(model, [], [], loss)


def _full(base: Base) -> Subject:
    model: Any = twin(base.model)
    return Subject(model, list(model.parameters()), [], lambda: model(**base.batch).loss, trains_base=True)


def _method(name: str, title: str, config: Mapping[str, Any], equal: bool = False) -> Contender:
    def make(base: Base) -> Subject:
        try:
            settled = fitted(config, Scale(base.model, base.targets), base.count) if equal else dict(config)
            return attached(base, registry.build(settled), name)
        except IntarsiaError as error:
            raise Unavailable(str(error).splitlines()[0]) from error

    return Contender(name, title, make)


def attached(base: Base, method: Method, name: str) -> Subject:
    """A method of ours on the base, as one of several adapters there, inactive."""
    model: Any = base.ours
    key = name.replace(".", "_").replace("/", "_")  # an adapter's name has neither
    start = time.perf_counter()
    attach(model, method, base.targets, name=key, data=[base.batch])
    seconds = time.perf_counter() - start
    made = list(states(model, key).values())
    own = [tensor for state in made for tensor in (*state.parameters(), *state.buffers())]
    trained = [parameter for state in made for parameter in state.parameters()]
    activate(model)

    def drop() -> None:
        if key in attached_names(model):
            detach(model, key)

    return Subject(
        model,
        trained,
        own,
        lambda: model(**base.batch).loss,
        enter=lambda: activate(model, key),
        leave=lambda: activate(model),
        drop=drop,
        attach_s=seconds,
        setting=method.config(),
    )
