"""A few threads that wait for work: handing it to them takes microseconds, where a new thread takes longer than a switch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

import torch

MOST = 8  # threads: memory is then the limit on any machine

_CREW: list[_Hand] = []
_BUSY = threading.Lock()


class _Hand:
    """One thread and what it is to do."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.work: Callable[[], None] | None = None
        self.error: BaseException | None = None
        threading.Thread(target=self._wait, name="intarsia-deck", daemon=True).start()

    def _wait(self) -> None:
        while True:
            self.go.acquire()
            if self.work is None:  # woken twice, by what an exception cut short
                continue
            try:
                self.work()
            except BaseException as error:
                self.error = error
            self.work = None
            self.done.release()


def _forked() -> None:
    global _BUSY
    _CREW.clear()  # a child of fork() has none of the threads
    _BUSY = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def size() -> int:
    """How many parts work should come in: torch's number of threads, up to 8."""
    return max(1, min(torch.get_num_threads(), MOST))


def together(parts: Sequence[Callable[[], None]]) -> None:
    """Do all parts at the same time, the first of them here. Comes back when all have ended, also after an exception

    (Ctrl-C too): then the first one is raised. While others are at it, all parts are done here, one after the other."""
    if len(parts) < 2 or not _BUSY.acquire(blocking=False):
        for part in parts:
            part()
        return
    started: list[_Hand] = []
    errors: list[BaseException] = []
    try:
        try:
            while len(_CREW) < len(parts) - 1:
                _CREW.append(_Hand())
            for hand, part in zip(_CREW, parts[1:], strict=False):
                hand.work, hand.error = part, None
                started.append(hand)
                hand.go.release()
            parts[0]()
        except BaseException as error:
            errors.append(error)
            if started:
                started[-1].go.release()  # it may not have been woken yet; once more does no harm
        for hand in started:
            _wait_for(hand, errors)
    finally:
        _BUSY.release()
    if errors:
        raise errors[0]


def _wait_for(hand: _Hand, errors: list[BaseException]) -> None:
    while True:
        try:
            hand.done.acquire()
        except BaseException as error:  # Ctrl-C, while the other thread still writes
            errors.append(error)
            continue
        break
    if hand.error is not None:
        errors.append(hand.error)
        hand.error = None
