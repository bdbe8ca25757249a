"""Snapshots: the adapter as it is at some steps of a run, each an adapter of its own, for averaging afterwards.

Averages weighted by loss or step (MWA: "Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging") read the note:

    step        the optimizer step after which it was taken
    loss        mean training loss, nats a token, of the steps since the snapshot before (the first: since snapshots_from of the
                run); that of a single batch is noise
    eval_loss   loss on the held-out rows at that step, where there are such

They lie in ``<output>.unfinished/snapshots`` until the run is finished, then in ``<output>/snapshots``, as ``step-000123``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from intarsia.errors import IntarsiaError

FOLDER = "snapshots"


def snapshot_steps(steps: int, count: int, begin: float) -> list[int]:
    """The steps after which snapshots are taken: ``count``, evenly over what follows the share ``begin`` of the run, the last
    one at its end.

    Raises:
        IntarsiaError: where that part has fewer steps.
    """
    room = steps - int(begin * steps)
    if count > room:
        raise IntarsiaError(
            f"train.snapshots={count}: from {begin:.2g} of the run on (train.snapshots_from) there are {room} of its {steps} steps; "
            f"ask for {room} at most, or begin earlier"
        )
    return [steps - room + -(-room * number // count) for number in range(1, count + 1)]


def smoothed_loss(events: Iterable[Mapping[str, Any]], after: int, step: int) -> float:
    """The mean training loss of the steps after one up to another, from the events of a log."""
    before, total, count = 0, 0.0, 0
    for event in events:
        if event["event"] != "step":
            continue
        covered = event["step"] - before  # an entry is the mean of the steps since the one before
        before = event["step"]
        if after < event["step"] <= step:
            total, count = total + covered * event["loss"], count + covered
    return total / count


def snapshot_name(step: int) -> str:
    """``step-000123``."""
    return f"step-{step:06}"


def put_in_place(aside: Path, output: Path, due: Sequence[int]) -> None:
    """Move finished snapshots into the adapter's folder, and those of an adapter that stood there before away.

    Cut short anywhere and begun again it ends in the same: a snapshot is either still aside or in its place.
    """
    target, wanted = output / FOLDER, [snapshot_name(step) for step in due]
    if target.is_dir():
        for old in target.iterdir():
            if old.name.startswith("step-") and old.name not in wanted:
                shutil.rmtree(old)
        if not due and not any(target.iterdir()):
            target.rmdir()
    for name in wanted:
        if (aside / name).exists():
            target.mkdir(exist_ok=True)
            if (target / name).exists():
                shutil.rmtree(target / name)
            shutil.move(aside / name, target / name)
