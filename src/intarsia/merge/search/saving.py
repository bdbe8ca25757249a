"""What a search leaves behind: the trials beside the output while it runs, everything in the output's folder at the end.

<output>.trials.jsonl     while the search is under way
<output>/                 the merged adapter, with search.json, trials.jsonl and search.png
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from intarsia import store
from intarsia.errors import IntarsiaError
from intarsia.merge.search.outcome import Outcome
from intarsia.merge.search.picture import picture
from intarsia.merge.search.trials import TrialFile
from intarsia.merge.search.weights import Task
from intarsia.store import Adapter

TRIALS, RESULT, PICTURE = "trials.jsonl", "search.json", "search.png"


def trials_of(output: str | Path, settings: Mapping[str, Any], *, restart: bool = False) -> TrialFile:
    """The trials that a search towards ``output`` goes on from, not written to yet.

    Those of a search that is under way; else those of a finished one with these settings, whose output is to be replaced.

    Args:
        restart: forget those that are under way.

    Raises:
        IntarsiaError: for a search that is under way with other settings, and a damaged file.
    """
    aside = _aside(output)
    if restart:
        aside.unlink(missing_ok=True)
    file = TrialFile.read(aside)
    if file.settings:
        file.check(settings)
        return file
    finished = Path(output) / TRIALS
    if restart or not finished.exists():
        return file
    try:
        TrialFile.read(finished).check(settings)
    except IntarsiaError:
        return file  # of another search, which the new one replaces
    aside.write_bytes(finished.read_bytes())
    return TrialFile.read(aside)


def save(
    outcome: Outcome,
    task: Task,
    file: TrialFile,
    output: str | Path,
    *,
    overwrite: bool = False,
    values: str | None = None,
) -> Adapter:
    """Write the merge that was found, with its lineage, the result as JSON, the trials, and the picture. -> the adapter.

    Raises:
        IntarsiaError: when it cannot be written; the trials are kept beside it then, and the same command goes on from them.
    """
    output = Path(output)
    merged = task.merged(outcome.search.best.point, output.name)
    merged = replace(merged, about={**merged.about, "search": lineage(outcome, task)})
    store.write(merged, output, overwrite, values=values)
    try:
        _write(output / RESULT, (json.dumps(outcome.to_dict(), indent=2) + "\n").encode())
        _write(output / TRIALS, file.path.read_bytes())
    except OSError as error:
        raise IntarsiaError(f"{output}: {error.strerror or error}; the adapter itself is written") from error
    picture(outcome.search, output / PICTURE, f"{output.name}: {len(outcome.search.trials)} trials")
    file.path.unlink(missing_ok=True)
    return merged


def lineage(outcome: Outcome, task: Task) -> dict[str, Any]:
    """What the adapter's file says of the search, as plain JSON values."""
    search = outcome.search
    return {
        "trials": len(search.trials),
        "found in trial": search.best.number,
        "seed": task.seed,
        "objective": search.objective.to_dict(),
        "space": search.space.to_dict(),
        "data": task.digests,
        "retained": {
            name: compared.gains.retained(compared.found)
            for name, compared in (("searched rows", outcome.searched), ("held-out rows", outcome.held_out))
        },
    }


def _aside(output: str | Path) -> Path:
    output = Path(output)
    return output.with_name(f"{output.name}.{TRIALS}")


def _write(path: Path, data: bytes) -> None:
    """Aside first, so that a failure leaves no half a file."""
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
