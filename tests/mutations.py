"""Planted bugs: does a test notice? Run by hand or weekly, not with the tests:  python tests/mutations.py [WORD ...]

The bugs stand in tests/bugs, one file a kind. Each mutation replaces one piece of text in a copy of the package and runs the quick tests on it, first the file that is
most likely to notice. A mutation that no test notices is a missing test (exit 1); one whose text is not in the source
any more is to be brought up to date here (exit 2). Words choose the mutations whose file or description has them; ``--near`` runs
only the file that is most likely to notice.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bug import Mutation

ROOT = Path(__file__).resolve().parent.parent
QUICK = (
    "test_attach",
    "test_operators",
    "test_sites",
    "edits",
    "test_deck",
    "goldens",
    "test_store",
    "test_contract",
    "test_public",
    "test_disjoint",
)


BUGS: dict[str, list[Mutation]] = {
    file.stem: importlib.import_module(f"bugs.{file.stem}").BUGS
    for file in sorted(Path(__file__).with_name("bugs").glob("*.py"))
}
MUTATIONS = [mutation for bugs in BUGS.values() for mutation in bugs]


def notices(source: Path, mutation: Mutation, near: bool) -> str:
    """Which tests fail on the mutated copy, or nothing."""
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "HYPOTHESIS_SEED": "0"}
    for tests in dict.fromkeys((mutation.near, *(() if near else QUICK))):
        path = source / "tests" / tests
        target = path if path.is_dir() else path.with_suffix(".py")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:randomly",
            str(target),
        ]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1, 2):  # no test failed: none was run
            raise SystemExit(f"{mutation.what}: pytest cannot run {target}:\n{done.stdout}{done.stderr}")
        if done.returncode:
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return (failed or done.stdout.splitlines()[-1:] or ["?"])[0].partition(" - ")[0]
    return ""


def planted(mutation: Mutation, near: bool) -> tuple[str, str]:
    """Plant one bug in a copy. -> ``caught``, ``MISSED`` or ``STALE``, and a line that says so."""
    with tempfile.TemporaryDirectory(prefix="intarsia-mutation-") as folder:
        source, begun = Path(folder), time.monotonic()
        for part in (
            "src",
            "tests",
        ):  # what was compiled goes along: the copies keep their times, but for the one with the bug
            shutil.copytree(ROOT / part, source / part)
        shutil.copy(ROOT / "pyproject.toml", source)
        file = source / "src" / "intarsia" / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            return "STALE", f"STALE   {mutation.file}: {mutation.what}"
        file.write_text(text.replace(mutation.old, mutation.new))
        caught = notices(source, mutation, near)
        took = f"({time.monotonic() - begun:.0f} s)"
        if caught:
            return "caught", f"caught  {mutation.what}: {caught} {took}"
        return "MISSED", f"MISSED  {mutation.file}: {mutation.what} {took}"


def main(arguments: list[str]) -> int:
    """Run the mutations that have one of the words, or all. -> the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only those whose file or description has one of these words")
    parser.add_argument("--kind", nargs="*", default=[], help="only those of these files in tests/bugs, by their names")
    parser.add_argument("--near", action="store_true", help="only the file of tests that is most likely to notice")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    given = parser.parse_args(arguments)
    if unknown := set(given.kind) - BUGS.keys():
        parser.error(f"no file tests/bugs/{unknown.pop()}.py; there are {', '.join(BUGS)}")
    of_kind = [m for kind, bugs in BUGS.items() for m in bugs if not given.kind or kind in given.kind]
    chosen = [m for m in of_kind if not given.words or any(word in f"{m.file} {m.what}" for word in given.words)]
    verdicts = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for verdict, line in pool.map(lambda m: planted(m, given.near), chosen):
            verdicts.append(verdict)
            print(line, flush=True)
    caught, missed, stale = (verdicts.count(verdict) for verdict in ("caught", "MISSED", "STALE"))
    print(f"{caught} of {len(chosen)} caught, {missed} missed, {stale} stale")
    return 1 if missed else 2 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
