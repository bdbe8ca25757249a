"""Planted bugs: does a test notice? Run by hand or weekly, not with the tests:  python tests/mutations.py [WORD ...]

The bugs stand in tests/bugs, one file a kind. Each mutation replaces one piece of text in a copy of the package and runs the quick tests on it, first the file that is
most likely to notice. A mutation that no test notices is a missing test (exit 1); one whose text is not in the source
any more is to be brought up to date here (exit 2). Words choose the mutations whose file or description has them; ``--near`` runs
only the file that is most likely to notice.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
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


MUTATIONS = [
    mutation
    for file in sorted(Path(__file__).with_name("bugs").glob("*.py"))
    for mutation in importlib.import_module(f"bugs.{file.stem}").BUGS
]


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


def main(words: list[str]) -> int:
    """Run the mutations that have one of the words, or all. -> the exit status."""
    near = "--near" in words
    words = [word for word in words if word != "--near"]
    chosen = [m for m in MUTATIONS if not words or any(word in f"{m.file} {m.what}" for word in words)]
    missed, stale = [], []
    for mutation in chosen:
        with tempfile.TemporaryDirectory(prefix="intarsia-mutation-") as folder:
            source, begun = Path(folder), time.monotonic()
            for part in ("src", "tests"):
                shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", source)
            file = source / "src" / "intarsia" / mutation.file
            text = file.read_text()
            if text.count(mutation.old) != 1:
                stale.append(mutation.what)
                print(f"STALE   {mutation.file}: {mutation.what}", flush=True)
                continue
            file.write_text(text.replace(mutation.old, mutation.new))
            caught = notices(source, mutation, near)
        if not caught:
            missed.append(mutation.what)
        verdict = f"caught  {mutation.what}: {caught}" if caught else f"MISSED  {mutation.file}: {mutation.what}"
        print(f"{verdict} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"{len(chosen) - len(missed) - len(stale)} of {len(chosen)} caught, {len(missed)} missed, {len(stale)} stale")
    return 1 if missed else 2 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
