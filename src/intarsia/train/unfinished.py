"""A run that is not finished: a folder beside the output, ``<output>.unfinished``, with all that it takes to go on.

    run.json         what the result depends on, to notice when the same command is not the same any more
    log.jsonl        what happened so far
    checkpoint-120/  adapter, optimizer, schedule, random generators, place in the data; the last whole one only

A checkpoint is written aside, flushed to the disk and renamed; only then the one before is removed. So whenever the
process dies there is at most one that is half written, under a name that is never read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from intarsia.errors import IntarsiaError

RUN, LOG, ASIDE, LOCK = "run.json", "log.jsonl", "writing", "lock"


class Unfinished:
    """The folder of a run on its way to ``output``."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.folder = self.output.with_name(self.output.name + ".unfinished")

    # --- before the run

    def check(self, settings: Mapping[str, Any], overwrite: bool, restart: bool, need: int) -> None:
        """Raise IntarsiaError if this run may not begin or go on here. Changes nothing.

        ``need``: bytes that a checkpoint takes; there has to be room for two.
        """
        saved = {} if restart else self._run()
        if self.output.exists() and not overwrite and not saved.get("saving"):
            raise IntarsiaError(
                f"output {str(self.output)!r} exists already; choose another one, or replace it with overwrite: true "
                "(--overwrite)"
            )
        if self.output.exists() and not self._is_replaceable():
            raise IntarsiaError(f"output {str(self.output)!r} is not an adapter folder, so it is not overwritten")
        if self.folder.exists() and not self.folder.is_dir():
            raise IntarsiaError(f"{self.folder} is in the way: a run keeps its unfinished state there")
        if self.checkpoint() and not restart and (changed := _changes(saved.get("settings", {}), settings)):
            raise IntarsiaError(
                f"{self.folder} holds a run that was begun with other settings:\n  "
                + "\n  ".join(changed)
                + "\nGive these settings to go on with it, or begin anew with resume='never' (--restart)."
            )
        place = next(parent for parent in self.folder.absolute().parents if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise IntarsiaError(f"output {str(self.output)!r}: {place} cannot be written to")
        free = shutil.disk_usage(place).free
        if free < 2 * need:
            raise IntarsiaError(f"{place}: {free:,} bytes are free; the run needs {2 * need:,} for its checkpoints")

    def _is_replaceable(self) -> bool:
        return self.output.is_dir() and ((self.output / "adapter.json").exists() or not any(self.output.iterdir()))

    def _run(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    # --- the run

    @contextlib.contextmanager
    def held(self, settings: Mapping[str, Any], restart: bool) -> Iterator[None]:
        """Hold the folder for this process alone; begin it, or clear it on ``restart``."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOCK).open("w") as lock:
                self._lock(lock)
                if restart or not self.checkpoint():
                    for path in self.folder.iterdir():
                        if path.name != LOCK:
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                self._write_run(settings, self._run().get("saving", False))
                yield
        except OSError as error:
            raise IntarsiaError(f"{self.folder}: {error.strerror or error}{self.after_failure()}") from error

    def _lock(self, file: IO[str]) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up by the system when the process ends, however
        except BlockingIOError:
            raise IntarsiaError(f"another process is training towards {str(self.output)!r} at this moment") from None

    def _write_run(self, settings: Mapping[str, Any], saving: bool) -> None:
        aside = self.folder / f"{RUN}.part"
        aside.write_text(json.dumps({"settings": dict(settings), "saving": saving}, indent=2), encoding="utf-8")
        os.replace(aside, self.folder / RUN)

    def begin_saving(self, settings: Mapping[str, Any]) -> None:
        """Note that from now on the output folder is this run's own, also after a kill in the midst of saving."""
        self._write_run(settings, True)

    def remove(self) -> None:
        """The run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- checkpoints

    def checkpoint(self) -> Path | None:
        """The last whole checkpoint."""
        found = [p for p in self.folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return max(found, key=step_of, default=None)

    @contextlib.contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to fill. Leaving the block makes it the checkpoint; an exception in it leaves no trace."""
        aside, final = self.folder / ASIDE, self.folder / f"checkpoint-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            yield aside
            for path in (*(p for p in aside.rglob("*") if p.is_file()), aside):
                _flush(path)
            os.replace(aside, final)
            _flush(self.folder)
        except Exception as error:  # torch reports a full disk as a RuntimeError, safetensors as its own
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
            raise IntarsiaError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {reason}{self.after_failure()}"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for old in self.folder.glob("checkpoint-*"):
            if old != final:
                shutil.rmtree(old, ignore_errors=True)

    def after_failure(self) -> str:
        """The tail of a message: what is left, and how to go on."""
        last = self.checkpoint()
        return f". The checkpoint of step {step_of(last)} is whole; the same command goes on from there" if last else ""


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    def shown(values: Mapping[str, Any], key: str) -> str:
        value = values.get(key, "not set")
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)

    keys = [*now, *(key for key in before if key not in now)]
    return [
        f"{key} was {shown(before, key)}, is now {shown(now, key)}" for key in keys if before.get(key) != now.get(key)
    ]
