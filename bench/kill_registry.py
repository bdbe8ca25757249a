"""Kill a process that adds, tags, removes and collects in a registry, again and again, and see what the next one finds.

    python bench/kill_registry.py --kills 50
    python bench/kill_registry.py --every-call

After every kill: each record, tag and adapter is whole, everything that was acknowledged is there, and no more than the
one operation that was cut off is there besides. Half of the processes are killed by the clock, half by themselves at a
call of the file system drawn by lot; with ``--every-call`` each operation is killed once at each of its calls. The counts
are printed; exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import intarsia as ia
from intarsia.store import Registry

NAMES, TAGS = ("one", "two"), ("best", "stable")
KINDS = ("add", "tag", "remove", "gc")
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.fsync",
          "shutil.copyfile", "shutil.rmtree", "sqlite3.connect", "fcntl.flock"}  # fmt: skip
CALLS, SECONDS = 250, 0.5  # the latest that a process is killed

State = dict[str, list[Any]]
Say = Callable[..., None]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument(
        "--every-call", nargs="*", choices=KINDS, help="of these operations; of all, if none is named"
    )
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as home:
        folders = [adapter(Path(home) / f"adapter-{seed}", seed) for seed in range(6)]
        if given.every_call is None:
            faults = by_lot(Path(home), folders, given.kills, given.seed, counts)
        else:
            faults = at_every_call(Path(home), folders, given.every_call or KINDS, counts)
    for what, count in counts.items():
        print(f"{count:6} {what}")
    print(f"{len(faults):6} promises broken")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def by_lot(home: Path, folders: list[Path], kills: int, seed: int, counts: collections.Counter[str]) -> list[str]:
    """One registry, and processes that do what the lot says until they are killed."""
    url, faults = home / "registry", []
    Registry(url).add(folders[0], NAMES[0])
    for kill in range(kills):
        draw, before = random.Random(seed * 1000 + kill), state(Registry(url))
        calls = draw.randrange(1, CALLS) if kill % 2 == 0 else None
        seconds = draw.uniform(0.02, SECONDS) if calls is None else 60.0
        said, _ = killed(lambda say, draw=draw: work(url, folders, draw, say), calls, seconds)
        counts["killed by the clock" if calls is None else "killed by themselves"] += 1
        faults += [f"kill {kill}: {fault}" for fault in judged(url, said, before, counts)]
    return faults + collected(url, counts)


def at_every_call(home: Path, folders: list[Path], kinds: Sequence[str], counts: collections.Counter[str]) -> list[str]:
    """A fresh registry for every kill: the first at an operation's first call, the last when it gets to its end."""
    faults = []
    for kind in kinds:
        ended, calls = False, 0
        while not ended:
            calls, url = calls + 1, home / f"{kind}-{calls}"
            registry = Registry(url)
            for folder in folders[:3]:
                registry.add(folder, NAMES[0])
            registry.tag(NAMES[0], TAGS[0], 2)
            registry.remove(NAMES[0], 3)
            before = state(registry)
            said, ended = killed(lambda say, kind=kind, url=url: once(url, folders, kind, say), calls, 60.0)
            counts[f"killed in {kind}"] += not ended
            faults += [f"{kind}, call {calls}: {fault}" for fault in judged(url, said, before, counts)]
            faults += [f"{kind}, call {calls}, then: {fault}" for fault in collected(url, counts)]
            shutil.rmtree(url)
    return faults


def collected(url: Path, counts: collections.Counter[str]) -> list[str]:
    """What is wrong after a last collection."""
    registry = Registry(url)
    registry.gc(delete=True, older_than=0)
    left, found = registry.gc(older_than=0).found, registry.verify()
    counts["adapters verified at the end"] += found.objects
    return found.faults + ([f"gc left {left}"] if left else [])


def adapter(folder: Path, seed: int) -> Path:
    """A small adapter, each with numbers of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(64))
    ia.attach(model, ia.Lora(rank=4), seed=seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(generator=generator)
    return ia.save(model, folder)


def state(registry: Registry) -> State:
    """What the registry holds: digest and tags of each version."""
    return {v.reference: [v.digest, sorted(v.tags)] for v in registry.list()}


def killed(job: Callable[[Say], None], calls: int | None, seconds: float) -> tuple[list[dict[str, Any]], bool]:
    """Do a job in a process, and kill it at a call or by the clock. -> what it said, and whether it got to its end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.close(reading)
            if calls is not None:
                die_at(calls)
            job(lambda **what: os.write(writing, (json.dumps(what) + "\n").encode()) and None)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    end = time.monotonic() + seconds
    said = b""
    while (rest := end - time.monotonic()) > 0 and select.select([reading], [], [], rest)[0]:
        if not (piece := os.read(reading, 65536)):
            break
        said += piece
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while piece := os.read(reading, 65536):
        said += piece
    os.close(reading)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a process failed: {said.decode()[-500:]}")
    return [json.loads(line) for line in said.decode().split("\n")[:-1]], os.WIFEXITED(status)


def die_at(calls: int) -> None:
    """Let this process kill itself at its so many-th call of the file system."""
    left, real = [calls], os.fsync

    def fsync(file: int) -> None:
        sys.audit("os.fsync")
        real(file)

    def count(event: str, _: Any) -> None:
        if event in EVENTS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    sys.addaudithook(count)


def once(url: Path, folders: list[Path], kind: str, say: Say) -> None:
    """One operation."""
    registry, name = Registry(url), NAMES[0]
    say(begun=kind, name=name)
    if kind == "add":
        registry.add(folders[4], name, tags=[TAGS[1]])
    elif kind == "tag":
        registry.tag(name, TAGS[0], 1, move=True)
    elif kind == "remove":
        registry.remove(name, 2)
    else:
        registry.gc(delete=True, older_than=0)
    say(done=kind, name=name, state=state(registry))


def work(url: Path, folders: list[Path], draw: random.Random, say: Say) -> None:
    """Change the registry until killed; say what is begun, and how it stands afterwards."""
    registry = Registry(url)
    while True:
        name, kind = draw.choice(NAMES), draw.choice(("add", "add", "tag", "remove", "gc", "reindex"))
        say(begun=kind, name=name)
        try:
            if kind == "add":
                registry.add(draw.choice(folders), name)
            elif kind == "tag":
                registry.tag(name, draw.choice(TAGS), draw.choice(registry.list(name)).version, move=True)
            elif kind == "remove":
                registry.remove(name, draw.choice(registry.list(name)).version)
            elif kind == "gc":
                registry.gc(delete=True, older_than=0)
            else:
                registry.reindex()
        except ia.IntarsiaError as error:
            if "no adapter is named" not in str(error):
                say(failed=str(error))
        say(done=kind, name=name, state=state(registry))


def judged(url: Path, said: list[dict[str, Any]], before: State, counts: collections.Counter[str]) -> list[str]:
    """What is wrong after a kill, given how it stood before and what the killed process said."""
    registry = Registry(url)
    faults = [line["failed"] for line in said if "failed" in line]
    faults += registry.verify().faults
    found = state(registry)
    done = [line for line in said if "done" in line]
    expected: State = done[-1]["state"] if done else before
    cut_off = said[-1] if said and "begun" in said[-1] else None
    counts["operations acknowledged"] += len(done)
    if cut_off:
        counts[f"cut off: {cut_off['begun']}"] += 1
    changed = {r for r in found.keys() | expected.keys() if found.get(r) != expected.get(r)}
    if changed:
        counts["cut off, and yet done"] += 1
        if not cut_off or cut_off["begun"] in ("gc", "reindex"):
            faults.append(f"{changed} changed, which nobody asked for")
        elif any(not reference.startswith(f"{cut_off['name']}@") for reference in changed):
            faults.append(f"{changed} changed, where {cut_off} was cut off")
        elif len(found.keys() ^ expected.keys()) > 1:
            faults.append(f"{found.keys() ^ expected.keys()}: more than one version changed")
    counts["folders and files left behind, collected later"] += len(registry.gc(older_than=0).found)
    registry.reindex()
    if state(registry) != found:
        faults.append("the index did not say what the records say")
    return faults


if __name__ == "__main__":
    sys.exit(main())
