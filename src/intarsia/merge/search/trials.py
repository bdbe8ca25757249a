"""The trials of a search as a file of JSON lines, which a search goes on from.

    {"settings": {...}}                                                 what the trials depend on
    {"rows": "search", "base": {...}, "single": {skill: loss}}          measured once; of the held-out rows too
    {"trial": 0, "point": {...}, "loss": {skill: loss}, "seconds": 1.2}

A line is written at once and flushed to the disk. What a killed search left of a line at the end is cut off. The file holds
numbers alone, no state of a sampler: where the search stands follows from the trials themselves.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.errors import IntarsiaError
from intarsia.merge.search.objective import Gains


@dataclass(frozen=True)
class Trial:
    """One point that was measured. A loss that was not finite is infinite here, and null in the file."""

    number: int
    point: Mapping[str, float]
    losses: Mapping[str, float]
    seconds: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.losses.values()))

    def to_dict(self) -> dict[str, Any]:
        """A line of the file."""
        losses = {skill: loss if math.isfinite(loss) else None for skill, loss in self.losses.items()}
        return {"trial": self.number, "point": dict(self.point), "loss": losses, "seconds": round(self.seconds, 3)}

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Trial:
        losses = {skill: math.inf if loss is None else float(loss) for skill, loss in line["loss"].items()}
        point = {name: float(value) for name, value in line["point"].items()}
        return cls(int(line["trial"]), point, losses, float(line["seconds"]))


class TrialFile:
    """The file of one search.

    Attributes:
        gains: name of the rows (``search``, ``held out``) -> losses of the base and of each adapter alone, once measured.
        trials: those that were made, in order.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings: dict[str, Any] = {}
        self.gains: dict[str, Gains] = {}
        self.trials: list[Trial] = []
        self._handle: int | None = None
        self._whole = 0  # bytes up to the end of the last whole line

    @classmethod
    def read(cls, path: str | Path) -> TrialFile:
        """What the file holds; an empty one where there is none.

        Raises:
            IntarsiaError: for a line that is not one of such a file, named by its number.
        """
        file = cls(path)
        file._read()
        return file

    def _read(self) -> None:
        self.settings, self.gains, self.trials, self._whole = {}, {}, [], 0
        if not self.path.exists():
            return
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise IntarsiaError(f"{self.path}: {error.strerror or error}") from error
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(keepends=True), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise IntarsiaError(
                    f"{self.path}, line {number}: no line of a search's trials ({type(error).__name__}: {error}); "
                    "restore the file, or begin anew with --restart"
                ) from None
            self._whole += len(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        if "settings" in line:
            self.settings = dict(line["settings"])
        elif "base" in line:
            self.gains[line["rows"]] = Gains(dict(line["base"]), dict(line["single"]))
        else:
            trial = Trial.from_dict(line)
            if trial.number != len(self.trials):
                raise ValueError(f"trial {trial.number} where {len(self.trials)} was expected")
            self.trials.append(trial)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises IntarsiaError where the file belongs to a search with other settings: it would go on with other trials."""
        if not self.settings:
            return
        now = json.loads(json.dumps(settings))
        if changed := _changes(self.settings, now):
            raise IntarsiaError(
                f"{self.path} holds {len(self.trials)} trials of a search with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGive these settings to go on with it, or begin anew with --restart."
            )

    @contextlib.contextmanager
    def held(self, settings: Mapping[str, Any]) -> Iterator[TrialFile]:
        """Hold the file for this process alone, begin it where it is new, and cut off a line that is not whole.

        Raises:
            IntarsiaError: where the settings are others, another process holds it, or it cannot be written to.
        """
        self.check(settings)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as handle:
                self._lock(handle.fileno())
                self._read()  # what another process may have added since
                self.check(settings)
                handle.truncate(self._whole)
                self._handle = handle.fileno()
                if not self.settings:
                    self._write({"settings": dict(settings)})
                yield self
        except OSError as error:
            raise IntarsiaError(f"{self.path}: {error.strerror or error}") from error
        finally:
            self._handle = None

    def _lock(self, handle: int) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up by the system when the process ends
        except BlockingIOError:
            raise IntarsiaError(f"another process is searching with {self.path} at this moment") from None

    def add_gains(self, rows: str, gains: Gains) -> None:
        """Keep what was measured before the first trial, on the rows of that name."""
        self._write({"rows": rows} | gains.to_dict())

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self._write(trial.to_dict())

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._handle is not None, "written outside of held()"
        data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if os.write(self._handle, data) < len(data):  # in one piece, behind what is there, or none of it counts
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._handle)
        self._take(line)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, each by its full key."""
    lines = []
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{key}: {line}" for line in _changes(old, new)]
        elif old != new:
            lines.append(f"{key} was {_shown(old)}, is now {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "not there"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)
