"""A few threads that wait for work: handing it to them takes microseconds, where a new thread takes longer than a switch.

Work comes in more parts than there are threads, and who is free takes the next one: a thread that wakes late, on a busy
machine, finds less to do and keeps nobody waiting.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence

import torch

MOST = 8  # threads: memory is then the limit on any machine
PARTS = 4  # for each thread

Part = Callable[[], None]


class _Job:
    """Parts, each of which is done by whoever takes it first."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.next = itertools.count()  # its steps cannot be interrupted
        self.errors: list[BaseException] = []
        self.lock, self.empty = threading.Lock(), threading.Event()
        self.inside, self.closed = 0, False

    def work(self) -> None:
        while not self.errors:
            number = next(self.next)
            if number >= len(self.parts):
                return
            self.parts[number]()

    def help(self) -> None:
        """What a waiting thread does."""
        with self.lock:
            if self.closed:
                return
            self.inside += 1
        try:
            self.work()
        except BaseException as error:
            self.errors.append(error)
        with self.lock:
            self.inside -= 1
            if self.closed and not self.inside:
                self.empty.set()

    def close(self) -> None:
        """Let nobody in any more, and come back when all are out; Ctrl-C is kept for later, others still write."""
        while True:
            try:
                with self.lock:
                    self.closed = True
                    if not self.inside:
                        return
                self.empty.wait()
                return
            except BaseException as error:
                self.errors.append(error)


class _Hand:
    """One thread, and the job that it was last called to."""

    def __init__(self) -> None:
        self.go, self.job = threading.Semaphore(0), _Job(())
        threading.Thread(target=self._wait, name="intarsia-deck", daemon=True).start()

    def _wait(self) -> None:
        while True:
            self.go.acquire()
            self.job.help()
            self.job = _Job(())  # what was written is not kept alive


_CREW: list[_Hand] = []


def _forked() -> None:
    _CREW.clear()  # a child of fork() has none of the threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def size() -> int:
    """How many threads write: torch's number, up to 8."""
    return max(1, min(torch.get_num_threads(), MOST))


def together(parts: Sequence[Part], threads: int) -> None:
    """Do all parts, here and on up to ``threads`` - 1 others. Comes back when nothing of it runs any more.

    After an exception (Ctrl-C too) no further part is begun, and it is raised when the others have ended.
    """
    if threads < 2 or len(parts) < 2:
        for part in parts:
            part()
        return
    job = _Job(parts)
    try:
        while len(_CREW) < threads - 1:
            _CREW.append(_Hand())
        for hand in _CREW[: threads - 1]:
            hand.job = job
            hand.go.release()
        job.work()
    except BaseException as error:
        job.errors.append(error)
    job.close()
    if job.errors:
        raise job.errors[0]
