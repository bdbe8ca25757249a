"""``intarsia merge``: the report before a merge, and what is measured after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from intarsia.cli import given, terminal
from intarsia.errors import IntarsiaError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from intarsia.analyze import Interference
    from intarsia.evaluate import Task
    from intarsia.merge import Plan, Recipe, Retained
    from intarsia.pretrained import Pretrained
    from intarsia.store import Adapter
    from intarsia.train.progress import Progress

REPORTS = ("none", "overlap", "products", "spectral")  # each says what the one before it says, and costs more


@dataclass(frozen=True)
class Asked:
    """What is to be told of a merge: before it, and after it on rows of files."""

    report: str = "products"
    skills: Mapping[str, Path] | None = None
    others: Mapping[str, Path] | None = None
    rows: int | None = None
    plot: Path | None = None

    @property
    def measures(self) -> bool:
        """Whether a model has to be run."""
        return bool(self.skills)


def asked(
    ready: Plan, report: str, data: Sequence[str], other: Sequence[Path], rows: int | None, plot: Path | None
) -> Asked:
    """Check what the command line says of reports, before a model is loaded or anything is measured.

    Raises:
        IntarsiaError: for an unknown report, NAME=FILE that is none, unknown adapters, files that are not there.
    """
    from intarsia.analyze import check_picture
    from intarsia.merge import check_names

    if report not in REPORTS:
        raise IntarsiaError(f"--report {report}: {nearest(report, REPORTS)}")
    if plot is not None:
        check_picture(plot)
        if report == "none" and not data:
            raise IntarsiaError(f"--plot {plot}: with --report none and no --data there is nothing to draw")
    if other and not data:
        raise IntarsiaError(
            "--other measures what was forgotten beside the skills; give their rows too: --data NAME=FILE"
        )
    skills = {name: Path(file) for name, file in given.named_files("--data", data).items()}
    others = _others(other, skills)
    if skills:
        check_names(ready.adapters, skills, [*skills, *others])
    files = [*skills.values(), *others.values()]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise IntarsiaError(f"no data file {', '.join(missing)}")
    return Asked(report, skills, others, rows, plot)


def _others(files: Sequence[Path], skills: Mapping[str, Path]) -> dict[str, Path]:
    stems = [path.stem for path in files]
    named = {
        path.stem if stems.count(path.stem) == 1 and path.stem not in skills else str(path): path for path in files
    }
    if len(named) < len(files):
        raise IntarsiaError("--other: a data file is given twice")
    return named


# ------------------------------------------------------------------ before
def before(ready: Plan, asked: Asked, base: Mapping[str, Tensor] | None, progress: Progress) -> Interference | None:
    """The report; None where none is asked for, where there is one adapter only, or where the base would be needed for it."""
    from intarsia.analyze import interference, interference_picture

    if asked.report == "none" or len(ready.adapters) < 2:
        return None
    depend = [n for n, a in ready.adapters.items() if any(edit.needs_weight for edit in a.outlines.values())]
    if depend and base is None:
        progress.say(
            f"no report: what {', '.join(depend)} changes depends on the base's weights; name it in the config: model: ..."
        )
        return None
    found = interference(
        ready.adapters,
        shares=lambda name, weight: ready.shares[weight][name].weight,
        weights=base,
        products=asked.report != "overlap",
        spectral=asked.report == "spectral",
        progress=progress.work,
    )
    if asked.plot is not None:
        interference_picture(found, asked.plot, " + ".join(ready.adapters))
    return found


def print_before(found: Interference) -> None:
    """The tables, and what they cannot say."""
    out = terminal.output()
    for table in found.tables():
        out.print()
        out.print(table)
    out.print(f"[dim]{found.legend()}[/]", soft_wrap=True)
    for first, second in found.apart():
        out.print(f"[dim]{first} and {second} change no weight in common: in no entry will one undo the other.[/]")


# ------------------------------------------------------------------ after
def model_of(ready: Plan, recipe: Recipe, progress: Progress) -> Pretrained:
    """The adapters' base, in the dtype that they were made in: in another one it would be another base."""
    return given.load_base(ready.adapters, recipe.model, progress)


def tasks_of(asked: Asked, pretrained: Pretrained, progress: Progress) -> tuple[dict[str, Task], list[Task]]:
    """The rows of the skills, by adapter, and those of other text."""
    from intarsia.evaluate import Task
    from intarsia.train.data import load_examples

    def read(name: str, path: Path) -> Task:
        examples, report = load_examples(path, pretrained.tokenizer)
        progress.say(f"{name}: {report}")
        return Task(name, examples[: asked.rows])

    skills = {name: read(name, path) for name, path in (asked.skills or {}).items()}
    return skills, [read(name, path) for name, path in (asked.others or {}).items()]


def after(
    ready: Plan,
    asked: Asked,
    adapter: Adapter,
    pretrained: Pretrained,
    tasks: tuple[dict[str, Task], list[Task]],
    progress: Progress,
) -> Retained:
    """Measure the base, every adapter with rows, and the merged one."""
    from intarsia.merge import measure, retained_picture

    found = measure(
        pretrained.model, pretrained.tokenizer, ready.adapters, adapter, *tasks, progress=progress.work
    )  # fmt: skip
    if asked.plot is not None:
        retained_picture(found, kept_plot(asked.plot), " + ".join(ready.adapters))
    return found


def kept_plot(plot: Path) -> Path:
    """Where the picture of what was kept goes: beside that of the report."""
    return plot.with_stem(f"{plot.stem}-retained")


def print_after(found: Retained) -> None:
    """The table, and what it comes to."""
    out = terminal.output()
    out.print()
    out.print(found.table())
    if found.worst is not None:
        shares = {name: share for name, share in found.shares.items() if share is not None}
        worst = min(shares, key=lambda name: shares[name])
        out.print(
            f"kept least: {worst}, {found.worst:.1%} of its gain; concept loss {found.concept_loss:+.4f} nats a token"
        )
