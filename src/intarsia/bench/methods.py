"""How good each method gets at equal count and equal effort: held-out loss, the task's measure, what is forgotten.

Every run is one training by :func:`intarsia.train.trainer.train`; its adapter is loaded again and measured. Finished runs
are lines of ``runs.jsonl`` in the output folder; the same command goes on where it was stopped, in the midst of a run too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia import pretrained, store
from intarsia.analyze import effective_rank, needs_weight, spectrum
from intarsia.bench.budget import Scale
from intarsia.bench.grid import Case, Entry, Grid, cases, check_methods, entries
from intarsia.bench.machine import machine, write_json
from intarsia.bench.quality import Quality
from intarsia.demo import skills
from intarsia.errors import IntarsiaError
from intarsia.evaluate import Task, answerable, evaluate, held_out_loss
from intarsia.model import detach, digest, load
from intarsia.pretrained import Pretrained
from intarsia.train.config import Config, make_config
from intarsia.train.data import BadRow, Example, load_examples, read_rows
from intarsia.train.plan import load_data
from intarsia.train.progress import Progress, Titled, clock, read_log
from intarsia.train.trainer import TrainingDiverged, train

RUNS, ABOUT, DATA = "runs.jsonl", "about.json", "data"
ADAPTER = "measured"
UNEQUAL = 1.1  # the most over the fewest trained numbers, above which there is a warning
RANKED = 12  # weights, taken evenly, whose spectrum is looked at


def run(
    grid: Grid, *, pretrained: Pretrained | None = None, progress: Progress | None = None, restart: bool = False
) -> Quality:
    """Run what is missing of the grid, and come back with all that is there, also after Ctrl-C (``interrupted``).

    Args:
        pretrained: a loaded model without adapters, instead of the grid's; given back as it was.
        restart: forget the finished runs of the output folder.

    Raises:
        IntarsiaError: for a mistake in the grid or its data, before anything runs; for an output folder that holds runs
            of other settings.
    """
    check_methods(grid)
    progress = progress or Progress()
    with progress:
        return _Bench(grid, pretrained or _load(grid, progress), progress, restart).go()


def _load(grid: Grid, progress: Progress) -> Pretrained:
    import torch

    device = "cuda" if torch.cuda.is_available() else None
    return pretrained.load(grid.model, dtype=grid.dtype, device=device, progress=progress.say)


@dataclass(frozen=True)
class _Rows:
    """The data of a grid: the file that every run trains on, and what all are measured on."""

    train: Path
    format: str
    task: Task
    other: Sequence[Example]


class _Bench:
    def __init__(self, grid: Grid, base: Pretrained, progress: Progress, restart: bool) -> None:
        self.grid, self.base, self.progress = grid, base, progress
        self.folder = Path(grid.output)
        self.entries: list[Entry] = entries(grid, Scale(base.model, grid.targets, grid.exclude))
        self.cases = cases(grid, self.entries)
        self.settings = self._settings()
        self._check_folder(restart)
        self.rows = self._data()
        write_json(self.folder / ABOUT, self.settings)
        self.done = read_log(self.folder / RUNS)

    def go(self) -> Quality:
        interrupted, left = False, [case for case in self.cases if self._found(case) is None]
        self.progress.say(
            f"{len(self.entries)} methods, {len(self.cases)} runs of them, {len(self.cases) - len(left)} done already"
        )
        for entry in self.entries:
            self.progress.say(f"  {entry.label}: {entry.trained:,} numbers trained")
        counts = [entry.trained for entry in self.entries]
        if max(counts) > UNEQUAL * min(counts):
            self.progress.warn("the methods train unequal numbers; give count to make them equal")
        begun = time.monotonic()
        try:
            if not any(row.get("base") for row in self.done):
                self.progress.say("measuring the base")
                self._write({"base": True} | self._measured())
            for number, case in enumerate(left, 1):
                done = len(self.cases) - len(left) + number
                row = self._run(case, f"{done}/{len(self.cases)} {case}")
                self._write(row)
                pace = (time.monotonic() - begun) / number
                more = f"; about {clock(pace * (len(left) - number))} left" if number < len(left) else ""
                loss = "diverged" if row["diverged"] else f"held-out loss {row['held_out_loss']:.4f}"
                self.progress.say(f"[{done}/{len(self.cases)}] {case}: {loss}, {row['seconds']:.0f} s{more}")
        except KeyboardInterrupt:
            interrupted = True
        return self._quality(interrupted)

    def _quality(self, interrupted: bool) -> Quality:
        base = next((row for row in self.done if row.get("base")), {})
        runs = [row | {"label": case.entry.label} for case in self.cases if (row := self._found(case))]
        about = machine(next(self.base.model.parameters()).device) | {"settings": self.settings}
        measure = (self.rows.task.measure_name, self.rows.task.higher_is_better)
        return Quality(about, self.entries, base, runs, len(self.cases), measure, interrupted)

    # ------------------------------------------------------------------ one run
    def _run(self, case: Case, title: str) -> dict[str, Any]:
        output = self.folder / "runs" / hashlib.sha256(json.dumps(case.key, sort_keys=True).encode()).hexdigest()[:16]
        start = time.perf_counter()
        row: dict[str, Any] = case.key | {"trained": case.entry.trained, "diverged": False}
        try:
            outcome = train(self._config(case, output), pretrained=self.base, progress=Titled(self.progress, title))
        except TrainingDiverged:
            shutil.rmtree(f"{output}.unfinished", ignore_errors=True)
            return row | {"diverged": True, "held_out_loss": None, "seconds": time.perf_counter() - start}
        row |= {"train_loss": outcome.train_loss, "trained": outcome.trained, "train_seconds": outcome.seconds}
        self.progress.work(0, 1, f"{title}: measuring")
        load(self.base.model, output, ADAPTER, any_base=True)  # the base that it was trained on a moment ago
        try:
            row |= self._measured()
        finally:
            detach(self.base.model, ADAPTER)
        if self.grid.rank:
            row["effective_rank"] = self._rank(output)
        if not self.grid.keep:
            shutil.rmtree(output)
        return row | {"seconds": time.perf_counter() - start}

    def _config(self, case: Case, output: Path) -> Config:
        train = self.grid.train.model_dump() | {"lr": case.lr}
        train["save_every"] = train["save_every"] or train["steps"] or 10**6  # Ctrl-C saves in any case
        return make_config(
            {
                "model": self.grid.model,
                "data": {
                    "train": str(self.rows.train),
                    "format": self.rows.format,
                    "eval_share": 0.0,  # what is held out is measured here, once, with everything else
                    "skip_bad_rows": self.grid.data.skip_bad_rows if self.grid.data else False,
                },
                "method": dict(case.entry.config),
                "targets": self.grid.targets,
                "exclude": self.grid.exclude,
                "original": self.grid.original,
                "output": str(output),
                "overwrite": True,
                "seed": case.seed,
                "dtype": self.grid.dtype,
                "train": train,
            }
        )

    def _measured(self) -> dict[str, Any]:
        """The model as it is now, on what is held out and on other text."""
        model, tokenizer = self.base.model, self.base.tokenizer
        cell = evaluate(model, tokenizer, self.rows.task, answer=self.grid.answers)
        found: dict[str, Any] = {"held_out_loss": cell.loss}
        if cell.score is not None:
            found["score"] = cell.score
        if self.rows.other:
            found["other_loss"] = held_out_loss(model, tokenizer, self.rows.other)
        return found

    def _rank(self, output: Path) -> float | None:
        """Mean effective rank of what the run changed, over some of the weights."""
        edits = store.read(output).edits
        weights = {n: self.base.model.get_parameter(n).detach().cpu() for n in edits}
        names = [n for n in edits if not edits[n].inserts()]  # which have no rank
        names = [n for n in names if not needs_weight(edits[n]) or weights[n].shape == edits[n].shape]
        names = names[:: max(1, len(names) // RANKED)][:RANKED]
        ranks = [effective_rank(spectrum(edits[n], weights[n] if needs_weight(edits[n]) else None)) for n in names]
        return sum(ranks) / len(ranks) if ranks else None

    def _found(self, case: Case) -> dict[str, Any] | None:
        return next((row for row in self.done if case.key.items() <= row.items()), None)

    def _write(self, row: dict[str, Any]) -> None:
        with (self.folder / RUNS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.done.append(json.loads(json.dumps(row)))

    # ------------------------------------------------------------------ data and settings
    def _data(self) -> _Rows:
        grid, tokenizer = self.grid, self.base.tokenizer
        if grid.skill is not None:
            (skill,) = skills.load([grid.skill])
            train, held_out = skill.write(self.folder / DATA)
            task = answerable(Task(skill.name, self._examples(held_out, "prompt")), held_out, "prompt", tokenizer)
            task = Task(
                skill.name, task.examples, task.prompts, task.references, skill.measure, skill.measure_name,
                skill.higher_is_better, skill.max_new_tokens,
            )  # fmt: skip
            return _Rows(train, "prompt", task, self._other())
        assert grid.data is not None
        examples, held_out_rows, reports = load_data(self._data_config(), self.base)
        for report in reports:
            self.progress.say(str(report))
        if not held_out_rows:
            raise IntarsiaError("nothing is held out: give data.eval, or a data.eval_share above 0")
        train = Path(grid.data.train)
        if grid.data.eval is None:  # one split for all seeds
            train = self._subset(train, examples, "train")
        task = Task("held out", held_out_rows)
        if grid.answers:
            task = answerable(task, grid.data.eval or grid.data.train, reports[-1].format, tokenizer)
        return _Rows(train, reports[0].format, task, self._other())

    def _data_config(self) -> Config:
        """A config that stands for the data alone."""
        assert self.grid.data is not None
        tree = {"model": self.grid.model, "data": self.grid.data.model_dump(), "method": "lora", "output": "unused"}
        return make_config(tree | {"train": {"max_length": self.grid.train.max_length}})

    def _subset(self, path: Path, examples: Sequence[Example], name: str) -> Path:
        """Some rows of a data file as a file of its own."""
        fields = {row.number: row.fields for row in read_rows(path)}
        file = self.folder / DATA / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as out:
            for example in examples:
                found = fields[example.number]
                assert not isinstance(found, BadRow)  # those are not among the examples
                out.write(json.dumps(found, ensure_ascii=False) + "\n")
        return file

    def _examples(self, path: str | Path, format: str = "auto") -> list[Example]:
        bad = self.grid.data.skip_bad_rows if self.grid.data else False
        longest = self.grid.train.max_length
        return load_examples(path, self.base.tokenizer, format=format, max_length=longest, skip_bad_rows=bad)[0]

    def _other(self) -> list[Example]:
        return self._examples(self.grid.other)[:200] if self.grid.other else []

    def _settings(self) -> dict[str, Any]:
        """All that the figures depend on besides method, learning rate and seed."""
        grid = self.grid
        told = grid.model_dump(mode="json", exclude={"methods", "lr", "seeds", "count", "output", "keep"})
        told["train"] = {k: v for k, v in told["train"].items() if k not in ("log_every", "eval_every", "save_every")}
        files = [grid.data.train, grid.data.eval] if grid.data else []
        told["contents"] = {
            str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for path in (*files, grid.other)
            if path and Path(path).is_file()
        }
        return told | {"weights": digest(self.base.model)}

    def _check_folder(self, restart: bool) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise IntarsiaError(f"output {str(self.folder)!r} is a file; choose a folder")
        known = {RUNS, ABOUT, DATA, "runs", "results.json", "results.png"}
        other = sorted(p.name for p in self.folder.iterdir() if p.name not in known) if self.folder.exists() else []
        if other:
            raise IntarsiaError(
                f"output {str(self.folder)!r} holds something else ({', '.join(other[:4])}); choose another one"
            )
        about = self.folder / ABOUT
        if restart:
            for name in (RUNS, ABOUT):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "runs", ignore_errors=True)
        elif about.exists():
            before = json.loads(about.read_text(encoding="utf-8"))
            now = json.loads(json.dumps(self.settings))
            if changed := [_change(key, before, now) for key in now if before.get(key) != now[key]]:
                raise IntarsiaError(
                    f"output {str(self.folder)!r} holds runs of other settings:\n  " + "\n  ".join(changed)
                    + "\nGo back to those, choose another output, or begin anew with --restart"
                )  # fmt: skip


def _change(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, new = before.get(key), now[key]
    if isinstance(was, dict) and isinstance(new, dict):
        inner = [_change(k, was, new) for k in new if was.get(k) != new[k]]
        return f"{key}: {'; '.join(inner) or 'fewer entries now'}"
    return f"{key} was {_short(was)}, is now {_short(new)}"


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)
