"""What a run shows while it works: one live line on a terminal, plain lines elsewhere, and ``log.jsonl`` always."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text


def memory_bytes() -> int:
    """What the run holds: the most that was allocated on the CUDA device, otherwise resident memory of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def clock(seconds: float) -> str:
    """``3:07`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes for people: ``812 kB``, ``1.24 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


@dataclass(frozen=True)
class Status:
    """Where a run stands after a step."""

    step: int
    steps: int
    loss: float | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    memory: int | None = None

    def line(self) -> str:
        """``step 12/200  loss 2.31  lr 4e-03  350 tokens/s  1:40 left  1.2 GB``."""
        parts = [f"step {self.step}/{self.steps}"]
        parts += [f"loss {self.loss:.4f}"] if self.loss is not None else []
        parts += [f"lr {self.lr:.2e}"] if self.lr is not None else []
        parts += [f"{self.tokens_per_second:.0f} tokens/s"] if self.tokens_per_second is not None else []
        parts += [f"{clock(self.seconds_left)} left"] if self.seconds_left is not None else []
        parts += [size(self.memory)] if self.memory is not None else []
        return "  ".join(parts)


class Progress:
    """Hears what a run does, and shows nothing. Subclasses show it. Use it as a context manager."""

    def say(self, text: str) -> None:
        """One line worth keeping."""

    def warn(self, text: str) -> None:
        """One line about something that probably should not be so."""

    def work(self, done: int, all: int, what: str) -> None:
        """Long work besides the steps: ``done`` of ``all`` parts."""

    def step(self, status: Status) -> None:
        """After every optimizer step."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class LiveProgress(Progress):
    """One line that is written over, with the lines worth keeping above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(Text(""), console=console, refresh_per_second=4, transient=True)

    def say(self, text: str) -> None:
        self.console.print(Text(text))

    def warn(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"))

    def work(self, done: int, all: int, what: str) -> None:
        self.live.update(Text(f"{what} {done}/{all}", overflow="ellipsis", no_wrap=True))

    def step(self, status: Status) -> None:
        self.live.update(Text(status.line(), overflow="ellipsis", no_wrap=True))

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()


class PlainProgress(Progress):
    """A line now and then: the first and the last step, and one at least every ``seconds``."""

    def __init__(self, console: Console, seconds: float = 10.0, now: Callable[[], float] = time.monotonic) -> None:
        self.console, self.seconds, self.now = console, seconds, now
        self.last = now()

    def say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def work(self, done: int, all: int, what: str) -> None:
        self._now_and_then(f"{what} {done}/{all}", False)

    def step(self, status: Status) -> None:
        self._now_and_then(status.line(), status.step in (1, status.steps))

    def _now_and_then(self, line: str, always: bool) -> None:
        if always or self.now() - self.last >= self.seconds:
            self.last = self.now()
            self.say(line)


class Titled(Progress):
    """Passes on the steps of one training among several under a title, and keeps its other remarks to itself."""

    def __init__(self, outer: Progress, title: str) -> None:
        self.outer, self.title = outer, title

    def warn(self, text: str) -> None:
        self.outer.warn(text)

    def work(self, done: int, all: int, what: str) -> None:
        self.outer.work(done, all, f"{self.title}: {what}")

    def step(self, status: Status) -> None:
        self.outer.step(_TitledStatus(**vars(status), title=self.title))


@dataclass(frozen=True)
class _TitledStatus(Status):
    title: str = ""

    def line(self) -> str:
        return f"{self.title}: {super().line()}"


def progress_on(console: Console) -> Progress:
    """The progress that suits a console: live on a terminal, plain otherwise."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


class Log:
    """``log.jsonl``: one JSON object a line, each with its ``event``, written out at once."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes  # of several processes, one writes
        self.events = read_log(path)

    def keep_until(self, step: int) -> None:
        """Forget what happened after a step, as a run does that goes on from there."""
        self.events = [event for event in self.events if event.get("step", 0) <= step]
        aside = self.path.with_suffix(".part")
        aside.write_text("".join(json.dumps(event) + "\n" for event in self.events), encoding="utf-8")
        os.replace(aside, self.path)

    def write(self, event: str, **values: Any) -> None:
        """Append one event."""
        self.events.append({"event": event, **values})
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.events[-1]) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a log; a line that a killed run left half written is not one."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


class Pace:
    """Makes steps and tokens into a status with speed and time left. What came before a resume does not count."""

    def __init__(self, steps: int, first: int = 0, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.first = now, first
        self.begun = now()
        self.tokens = 0
        self.status = Status(first, steps)

    def after(self, step: int, **known: Any) -> Status:
        """The status after a step; what is not ``known`` this time (loss, lr) stays as it was."""
        seconds = max(self.now() - self.begun, 1e-9)
        done = max(step - self.first, 1)
        self.status = replace(
            self.status,
            step=step,
            tokens_per_second=self.tokens / seconds,
            seconds_left=(self.status.steps - step) * seconds / done,
            memory=memory_bytes(),
            **known,
        )
        return self.status
