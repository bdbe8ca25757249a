"""Kill a process that overwrites an adapter: what is found afterwards is a whole adapter, the old one or the new one.

    python tests/kill_writers.py --kills 50

First at every line of the writing in turn, then so many times at a random instant.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import intarsia as ia
from intarsia import store
from small import adapted

# For each line that it reads it forks a child that overwrites the folder: "at N" kills it at the N-th line of code that it
# runs in writing.py, "after S" kills it after S seconds of overwriting again and again. It answers whether it was killed.
WRITER = """
import os, signal, sys, time
from intarsia import store
from intarsia.store import writing

one, two = store.read({one!r}), store.read({two!r})
left = 0

def trace(frame, event, _):
    global left
    if frame.f_code.co_filename != writing.__file__:
        return None
    if event == "line":
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

for line in sys.stdin:
    how, number = line.split()
    child = os.fork()
    if not child:
        if how == "at":
            left = int(number)
            sys.settrace(trace)
            store.write(two if store.read({folder!r}).digest == one.digest else one, {folder!r}, overwrite=True)
            os._exit(0)
        while True:
            store.write(one, {folder!r}, overwrite=True)
            store.write(two, {folder!r}, overwrite=True)
    if how == "after":
        time.sleep(float(number))
        os.kill(child, signal.SIGKILL)
    print("killed" if os.WIFSIGNALED(os.waitpid(child, 0)[1]) else "written", flush=True)
"""


class Killer:
    """A folder that is overwritten by processes that are killed."""

    def __init__(self, folder: Path, digests: set[str], ask: IO[str], answer: IO[str]):
        self.folder, self.digests, self.ask, self.answer = folder, digests, ask, answer

    def kill(self, when: str) -> bool:
        """Overwrite, killed ``at N`` or ``after S``. -> whether it came to that. Raises AssertionError where no whole adapter is left."""
        self.ask.write(f"{when}\n")
        self.ask.flush()
        said = self.answer.readline().strip()
        assert said in ("killed", "written"), "the writer has failed"
        assert store.read(self.folder).digest in self.digests, f"killed {when}, another adapter is left"
        assert (self.folder / "log.jsonl").read_text() == "log", f"killed {when}, the log is gone"
        return said == "killed"


@contextmanager
def killer() -> Iterator[Killer]:
    """An adapter with a log beside it, and who overwrites it."""
    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        methods = {"one": ia.Shira(density=0.1), "two": ia.Paca(3)}
        folders = {name: ia.save(adapted(method), top / name) for name, method in methods.items()}
        folder = ia.save(adapted(methods["one"]), top / "adapter")
        (folder / "log.jsonl").write_text("log")
        code = WRITER.format(one=str(folders["one"]), two=str(folders["two"]), folder=str(folder))
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdin is not None
            assert parent.stdout is not None
            yield Killer(folder, {store.read(f).digest for f in folders.values()}, parent.stdin, parent.stdout)
            parent.stdin.close()


def kill_at_every_line(step: int = 1) -> int:
    """How many lines there were to be killed at; ``step``: only every so many."""
    with killer() as it:
        number = 1
        while it.kill(f"at {number}"):
            number += step
    return number // step


def kill_at_random(kills: int, seed: int) -> None:
    """So many kills, each up to a tenth of a second after the start."""
    chance = random.Random(seed)
    with killer() as it:
        for _ in range(kills):
            it.kill(f"after {chance.uniform(0.001, 0.1)}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=int(time.time()))
    given = arguments.parse_args()
    print(f"killed at each of {kill_at_every_line()} lines: each left a whole adapter")
    kill_at_random(given.kills, given.seed)
    print(f"killed {given.kills} times (seed {given.seed}): each left a whole adapter")


if __name__ == "__main__":
    main()
