"""After a merge: what is left of each adapter's skill, and what became of everything else. Measured on a live deck."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from torch import nn

from intarsia.calibrate import Progress
from intarsia.deck import Deck
from intarsia.errors import IntarsiaError, nearest
from intarsia.store import Adapter

if TYPE_CHECKING:  # merging needs no transformers; measuring does
    from transformers import PreTrainedTokenizerBase

    from intarsia.evaluate import Matrix, Task

FUSED = "fused"  # the row of the matrix with the merged adapter


def retained_share(base: float, single: float, fused: float) -> float | None:
    """(base - fused) / (base - single), losses: the share of an adapter's gain that is left after merging.

    1: all of it, above 1: more, 0: none, below 0: worse than the base. None where the adapter itself gains nothing.
    """
    gain = base - single
    return (base - fused) / gain if gain > 0 else None


def concept_loss(single: Sequence[float], fused: Sequence[float], higher_is_better: bool = False) -> float:
    """Mean over the skills of what each adapter does on its own task alone, less what the merged one does there.

    Bhardwaj et al. 2024, arXiv:2406.13175, tables 4 and 5 (%Drop), for scores; of losses the sign is turned. Above 0: lost.

    Raises:
        IntarsiaError: for no skills, or lists of different lengths.
    """
    if not single or len(single) != len(fused):
        raise IntarsiaError(
            f"concept loss of {len(single)} skills alone and {len(fused)} fused; expected as many, one at least"
        )
    drop = fmean(single) - fmean(fused)
    return drop if higher_is_better else -drop


def forgetting(base: float, adapted: float) -> float:
    """Loss on other text, less the base's: above 0 the model has become worse at what it was not trained for."""
    return adapted - base


@dataclass(frozen=True, eq=False)
class Retained:
    """What a merge kept.

    Attributes:
        matrix: base, every adapter alone and the merged one, on the skills' tasks and on other text.
        skills: adapter -> the task that it was trained for.
        others: tasks that none was trained for.
    """

    matrix: Matrix
    skills: Mapping[str, str]
    others: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The matrix's row without any adapter."""
        return self.matrix.adapters[0]

    @property
    def shares(self) -> dict[str, float | None]:
        """Of each adapter: :func:`retained_share` of its own skill, in losses."""
        return {
            adapter: retained_share(*(self.matrix[row, task].loss for row in (self.base, adapter, FUSED)))
            for adapter, task in self.skills.items()
        }

    @property
    def worst(self) -> float | None:
        """The smallest of the shares; None where no adapter gains anything."""
        return min((share for share in self.shares.values() if share is not None), default=None)

    @property
    def concept_loss(self) -> float:
        """:func:`concept_loss` in losses, nats a token."""
        return concept_loss(*self._own("loss"))

    @property
    def concept_loss_score(self) -> float | None:
        """:func:`concept_loss` in the tasks' own measure; None where they have none, or not all the same."""
        kinds = {self.matrix.measures[task] for task in self.skills.values()}
        single, fused = self._own("score")
        if len(kinds) > 1 or None in single or None in fused:
            return None
        return concept_loss(single, fused, higher_is_better=kinds.pop()[1])

    @property
    def forgetting(self) -> dict[str, dict[str, float]]:
        """Of each adapter and of the merged one, on each other text: :func:`forgetting`."""
        return {
            row: {
                task: forgetting(self.matrix[self.base, task].loss, self.matrix[row, task].loss) for task in self.others
            }
            for row in self.matrix.adapters
            if row != self.base
        }

    def _own(self, what: str) -> tuple[list[Any], list[Any]]:
        alone = [getattr(self.matrix[adapter, task], what) for adapter, task in self.skills.items()]
        return alone, [getattr(self.matrix[FUSED, task], what) for task in self.skills.values()]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.matrix.to_dict() | {
            "skills": dict(self.skills),
            "others": list(self.others),
            "retained": self.shares,
            "worst": self.worst,
            "concept_loss": self.concept_loss,
            "concept_loss_score": self.concept_loss_score,
            "forgetting": self.forgetting,
        }

    def table(self) -> Table:
        """For the terminal: a row a skill, and one for each other text."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("loss on", no_wrap=True, style="cyan")
        scored = any(self.matrix.measures[task][0] for task in self.skills.values())
        for column in (self.base, "alone", FUSED, "retained", *(("base, alone, fused",) if scored else ())):
            table.add_column(column, justify="right")
        for adapter, task in self.skills.items():
            rows = (self.base, adapter, FUSED)
            share = self.shares[adapter]
            cells = [f"{self.matrix[row, task].loss:.4f}" for row in rows]
            cells.append("no gain alone" if share is None else f"{share:.1%}")
            if scored:
                scores = [self.matrix[row, task].score for row in rows]
                cells.append(" ".join("" if score is None else f"{score:.1%}" for score in scores))
            table.add_row(escape(task if task == adapter else f"{task} ({adapter})"), *cells)
        for task in self.others:
            alone = [self.matrix[adapter, task].loss for adapter in self.skills]
            spread = f"{min(alone):.4f}" if len(alone) == 1 else f"{min(alone):.4f} to {max(alone):.4f}"
            lost = self.forgetting[FUSED][task]
            table.add_row(
                escape(task),
                f"{self.matrix[self.base, task].loss:.4f}",
                spread,
                f"{self.matrix[FUSED, task].loss:.4f}",
                f"{lost:+.4f}",
            )
        return table


def check_names(adapters: Iterable[str], skills: Iterable[str], tasks: Sequence[str]) -> None:
    """Raise IntarsiaError for what :func:`measure` cannot take, before a model is there: the adapters, those of them with

    a skill to measure, and the names of all tasks.
    """
    skills = list(skills)
    if not skills:
        raise IntarsiaError("no skill to measure; give the data of one adapter at least: {adapter: task}")
    for name in skills:
        if name not in adapters:
            raise IntarsiaError(f"data is given for {name!r}, and no adapter has that name; {nearest(name, adapters)}")
        if name in ("base", FUSED):
            raise IntarsiaError(f"an adapter named {name!r} would be taken for the {name} model; give it another name")
    if twice := sorted({name for name in tasks if tasks.count(name) > 1}):
        raise IntarsiaError(f"several data sets are named {', '.join(twice)}; give them different names")


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Mapping[str, Adapter],
    fused: Adapter,
    skills: Mapping[str, Task],
    others: Sequence[Task] = (),
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Retained:
    """Measure the base, each adapter alone and the merged one; the model is left as it was.

    Args:
        skills: of each adapter, what it was trained for; adapters without one are left out. A task with a measure is answered
            too, by the base, its own adapter and the merged one.
        others: other text, to see what was forgotten.

    Raises:
        IntarsiaError: for skills of unknown adapters, alike names, or a model that is not the adapters' base.
    """
    from intarsia.evaluate import BASE, matrix

    tasks = [*skills.values(), *others]
    check_names(adapters, skills, [task.name for task in tasks])
    deck = Deck(model)
    deck.add(*(replace(adapters[name], name=name) for name in skills), replace(fused, name=FUSED))
    own = {name: task.name for name, task in skills.items()}
    measured = matrix(
        model,
        tokenizer,
        tasks,
        [*skills, FUSED],
        lambda name: deck.off() if name is None else deck.use(name),
        batch_size=batch_size,
        generate_for=lambda row, task: task in own.values() and (row in (BASE, FUSED) or own[row] == task),
        progress=progress,
    )
    return Retained(measured, own, tuple(task.name for task in others))
