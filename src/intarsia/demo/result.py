"""What the demo found: plain values, JSON, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from intarsia.evaluate import BASE, Matrix


@dataclass(frozen=True)
class About:
    """A skill, for readers."""

    name: str
    title: str
    sentence: str
    source: str
    measure: str
    higher_is_better: bool
    train_items: int
    held_out_items: int


@dataclass(frozen=True)
class Trained:
    """One adapter that the demo trained."""

    name: str
    skill: str
    kind: str  # as people call it: SHiRA-SNIP, PaCA, LoRA
    sparse: bool
    method: Mapping[str, Any]
    folder: str
    digest: str
    trained: int  # numbers
    share: float  # of the base's numbers
    file_bytes: int
    steps: int
    lr: float
    tokens_per_second: float
    seconds: float
    losses: tuple[tuple[int, float], ...]  # (step, training loss)
    held_out: tuple[tuple[int, float], ...]  # (step, held-out loss on a part of the items)


@dataclass(frozen=True)
class Exactness:
    """Whether the base came back: its SHA-256 before training and after all switches."""

    before: str
    after: str
    switches: int  # use, off and fuse calls in random order

    @property
    def exact(self) -> bool:
        return self.before == self.after


@dataclass(frozen=True)
class Switch:
    """How long one way to change the skill takes: all weights of the model, median and the middle half."""

    name: str
    what: str
    seconds: float
    low: float  # first quartile
    high: float  # third quartile
    changed_share: float  # of the base's entries that are not what they were once everything is taken out again


@dataclass(frozen=True)
class Fusion:
    """Two adapters set in at once, each with the same strength."""

    kind: str  # sparse or LoRA
    adapters: tuple[str, str]
    strength: float
    losses: tuple[float, float]  # held out, on the two skills
    retained: tuple[float | None, float | None]  # share of each one's own gain in loss that is left; None: no gain


@dataclass(frozen=True)
class Example:
    """One held-out item and what was answered."""

    skill: str
    prompt: str
    truth: str
    base: str
    sparse: str
    lora: str


@dataclass(frozen=True)
class DemoResult:
    """The whole story. ``print(result)`` with rich shows it; :meth:`to_dict` is plain JSON."""

    folder: Path
    model: str
    quick: bool
    seed: int
    skills: tuple[About, ...]
    adapters: tuple[Trained, ...]
    matrix: Matrix
    exactness: Exactness
    switches: tuple[Switch, ...]
    fusions: tuple[Fusion, ...]
    overlap: float  # of the two fused sparse adapters: entries that both may change, over the smaller support
    examples: tuple[Example, ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: Mapping[str, float]  # part of the demo -> seconds; "all" is the whole

    # ------------------------------------------------------------------------------------------ what follows

    @property
    def title(self) -> str:
        """The model's name for readers: of a folder, the last part."""
        return Path(self.model).name if Path(self.model).is_absolute() else self.model

    def of(self, skill: str, *, sparse: bool) -> Trained:
        """The sparse adapter of a skill, or its LoRA."""
        return next(a for a in self.adapters if a.skill == skill and a.sparse == sparse)

    def on_diagonal(self, *, sparse: bool) -> list[str]:
        """Skills whose own adapter is the best one on them, among the base and the adapters of that kind."""
        among = [BASE, *(a.name for a in self.adapters if a.sparse == sparse)]
        return [
            s.name
            for s in self.skills
            if self.matrix.best(s.name, "loss", among) == self.of(s.name, sparse=sparse).name
        ]

    def sparse_wins(self) -> list[str]:
        """Skills on which the sparse adapter has a lower held-out loss than LoRA of the same count."""
        return [s.name for s in self.skills if self._loss(s.name, sparse=True) < self._loss(s.name, sparse=False)]

    def _loss(self, skill: str, *, sparse: bool) -> float:
        return self.matrix[self.of(skill, sparse=sparse).name, skill].loss

    def switch(self, name: str) -> Switch:
        """A timing by its name."""
        return next(s for s in self.switches if s.name == name)

    def headline(self) -> str:
        """The result in one sentence of figures, whoever won."""
        count, wins = len(self.skills), len(self.sparse_wins())
        size = max(a.file_bytes for a in self.adapters if a.sparse) / 1e6
        deck, lora = self.switch("deck").seconds, self.switch("lora-switch").seconds
        speed = f"{lora / deck:.1f} times quicker" if deck < lora else f"{deck / lora:.1f} times slower"
        base = "is back to the bit" if self.exactness.exact else "is NOT what it was"
        return (
            f"{count} skills on {self.title}, each in {size:.1f} MB; switching takes {milliseconds(deck)}, {speed} than "
            f"fusing LoRA out and in; after {self.exactness.switches} switches the base {base}. At the same number of "
            f"trained values the sparse adapter has the lower held-out loss on {wins} of {count} skills."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "headline": self.headline(),
            "model": self.model,
            "quick": self.quick,
            "seed": self.seed,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "seconds": dict(self.seconds),
            "skills": [asdict(skill) for skill in self.skills],
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "matrix": self.matrix.to_dict(),
            "best on its own skill": {
                "sparse": self.on_diagonal(sparse=True),
                "lora": self.on_diagonal(sparse=False),
            },
            "sparse has the lower loss": self.sparse_wins(),
            "exactness": asdict(self.exactness) | {"exact": self.exactness.exact},
            "switches": [asdict(switch) for switch in self.switches],
            "fusions": [asdict(fusion) for fusion in self.fusions],
            "support overlap": self.overlap,
            "examples": [asdict(example) for example in self.examples],
        }

    # ---------------------------------------------------------------------------------------------- terminal

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def _parts(self) -> Iterator[RenderableType]:
        yield Text(self.headline(), style="bold")
        yield Text()
        yield self.matrix.table()
        yield Text(self._matrix_says())
        yield Text()
        yield self._training_table()
        yield Text()
        yield self._switch_table()
        yield Text(self._base_says(), style="green" if self.exactness.exact else "bold red")
        yield Text()
        yield self._fusion_table()
        yield Text()
        yield self._example_table()
        yield Text()
        yield Text(f"report     {self.folder / 'report.html'}")
        yield Text(f"adapters   {self.folder / 'adapters'}")
        yield Text(f"figures    {self.folder / 'results.json'}")
        yield Text(f"{self.seconds['all']:.0f} s in all")

    def _matrix_says(self) -> str:
        def said(sparse: bool) -> str:
            own = self.on_diagonal(sparse=sparse)
            return f"{len(own)} of {len(self.skills)}" + (f" ({', '.join(own)})" if own else "")

        wins = self.sparse_wins()
        return (
            f"an adapter is the best of its kind on its own skill: sparse {said(True)}, LoRA {said(False)}\n"
            f"sparse below LoRA at the same count: {len(wins)} of {len(self.skills)}"
            + (f" ({', '.join(wins)})" if wins else "")
        )

    def _base_says(self) -> str:
        exact = self.exactness
        if exact.exact:
            return f"after {exact.switches} switches and fusions the base has the SHA-256 it began with: {exact.before[:16]}…"
        return f"THE BASE CHANGED: SHA-256 {exact.before[:16]}… before, {exact.after[:16]}… after {exact.switches} switches"

    def _training_table(self) -> Table:
        table = Table(title="training: the same number of trained values, the same data, each its own learning rate")
        table.title_justify = "left"
        for column in ("adapter", "method", "trained", "share", "file", "steps", "lr", "tokens/s", "time"):
            table.add_column(column, justify="left" if column in ("adapter", "method") else "right", no_wrap=True)
        for a in self.adapters:
            table.add_row(
                a.name, a.kind, f"{a.trained:,}", f"{a.share:.2%}", f"{a.file_bytes / 1e6:.1f} MB", str(a.steps),
                f"{a.lr:g}", f"{a.tokens_per_second:.0f}", f"{a.seconds:.0f} s",
            )  # fmt: skip
        return table

    def _switch_table(self) -> Table:
        table = Table(
            title="changing the skill of the whole model (medians of one alternating run)", title_justify="left"
        )
        table.add_column("way")
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("middle half", justify="right", no_wrap=True)
        table.add_column("base entries wrong afterwards", justify="right")
        for s in self.switches:
            wrong = f"{s.changed_share:.2%}" if s.changed_share else "none"
            table.add_row(s.what, milliseconds(s.seconds), f"{s.low * 1e3:.1f} – {s.high * 1e3:.1f} ms", wrong)
        return table

    def _fusion_table(self) -> Table:
        first, second = (a.skill for a in (self._named(n) for n in self.fusions[0].adapters))
        table = Table(title=f"two skills at once: how much of each one's gain is left ({first} + {second})")
        table.title_justify = "left"
        table.add_column("fused")
        table.add_column("strength of each", justify="right")
        for skill in (first, second):
            table.add_column(f"{skill}\nloss · kept", justify="right")
        for f in self.fusions:
            kept = [f"{loss:.3f} · {percent(share)}" for loss, share in zip(f.losses, f.retained, strict=True)]
            table.add_row(f.kind, f"{f.strength:g}", *kept)
        table.caption = f"the two sparse supports share {self.overlap:.1%} of their entries; both sums are exact"
        table.caption_justify = "left"
        return table

    def _named(self, name: str) -> Trained:
        return next(a for a in self.adapters if a.name == name)

    def _example_table(self) -> RenderableType:
        tables: list[RenderableType] = []
        for skill in self.skills:
            table = Table(title=f"{skill.title}: items never seen", title_justify="left", expand=False)
            for column in ("given", "truth", "base", "sparse", "LoRA"):
                table.add_column(column, max_width=44, overflow="ellipsis", no_wrap=True)
            for e in (e for e in self.examples if e.skill == skill.name):
                table.add_row(*map(Text, (e.prompt, e.truth, e.base, e.sparse, e.lora)))
            tables.append(table)
        return Group(*tables)


def milliseconds(seconds: float) -> str:
    """``8.3 ms`` or ``120 ms``."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def percent(share: float | None) -> str:
    """``93 %`` as ``93%``, or a dash where there is none."""
    return "–" if share is None else f"{share:.0%}"
