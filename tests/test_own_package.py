"""A method in somebody else's package: built, installed, and found through its entry point, as a user would do it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from intarsia import contract

EXAMPLE = Path(__file__).parent.parent / "examples" / "own-method"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a process that has the example package: built by its own backend, without a network."""
    folder = tmp_path_factory.mktemp("site")
    source = folder / "source"
    shutil.copytree(EXAMPLE, source)  # the build leaves files behind
    target = folder / "packages"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run(
        [*command, "--no-build-isolation", "--target", str(target), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(installed, *words):
    return subprocess.run(
        [sys.executable, "-m", "intarsia", *words], env=installed, capture_output=True, text=True, cwd=EXAMPLE.parent
    )


def test_the_command_line_knows_it(installed):
    done = run(installed, "methods", "lora-fa", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["title"], row["trained"], row["mergeable"]) == ("LoRA-FA", "r O", True)


def test_the_contract_runs_on_it(installed):
    done = run(installed, "check", "lora_fa:LoraFa", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert {result["method"]["name"] for result in found["results"]} == {"lora-fa"}
    assert len(found["results"]) == 2 * len(contract.LAWS)
