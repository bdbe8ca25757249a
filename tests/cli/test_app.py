"""The commands and their options are part of the contract; a mistake is one line and exit code 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import typer

from intarsia._version import __version__
from intarsia.cli import app as application
from intarsia.errors import IntarsiaError

SURFACE = {
    "demo": ([], ["--quick", "--output", "--model", "--seed", "--json"]),
    "train": (
        ["config", "overrides"],
        ["--show-batch", "--dry-run", "--schema", "--overwrite", "--restart", "--skip-bad-rows", "--json"],
    ),
    "eval": (
        ["adapters"],
        [
            "--data",
            "--model",
            "--format",
            "--rows",
            "--max-length",
            "--batch-size",
            "--answers",
            "--skip-bad-rows",
            "--json",
        ],
    ),
    "chat": (
        ["model", "adapters"],
        ["--max-new-tokens", "--temperature", "--top-p", "--seed", "--system", "--plain", "--json"],
    ),
    "show": (
        ["adapter"],
        ["--model", "--spectrum", "--plot", "--html", "--intruders", "--top", "--epsilon", "--side", "--sizes", "--json"],
    ),
    "merge": (
        ["config", "overrides"],
        [
            *("--dry-run", "--schema", "--overwrite", "--report", "--data", "--other", "--rows", "--plot"),
            *("--search", "--trials", "--objective", "--restart", "--json"),
        ],
    ),
    "repair": (
        ["adapter", "output"],
        ["--model", "--lambda", "--top", "--epsilon", "--side", "--rank", "--overwrite", "--json"],
    ),
    "compress": (
        ["adapter", "output"],
        ["--to", "--density", "--alpha", "--bits", "--rank", "--budget", "--search", "--balanced", "--masks", "--data", "--model", "--format",
         "--rows", "--max-length", "--batch-size", "--overwrite", "--json"],
    ),
    "shrink": (
        ["model", "output"],
        ["--data", "--rank", "--search", "--target", "--exclude", "--multiple", "--by", "--format", "--rows", "--max-length",
         "--batch-size", "--overwrite", "--json"],
    ),
    "convert": (
        ["source", "output"],
        ["--to", "--base", "--rank", "--dense", "--dtype", "--overwrite", "--json"],
    ),
    "methods": (["name"], ["--json"]),
    "check": (["subject"], ["--json"]),
    "registry add": (["folder"], ["--name", "--tag", "--parent", "--registry", "--json"]),
    "registry list": (["name"], ["--base", "--method", "--tag", "--registry", "--json"]),
    "registry show": (["reference"], ["--registry", "--json"]),
    "registry tag": (["reference", "tag"], ["--move", "--delete", "--registry", "--json"]),
    "registry get": (["reference"], ["--registry", "--json"]),
    "registry remove": (["reference"], ["--registry", "--json"]),
    "registry gc": ([], ["--delete", "--older-than", "--registry", "--json"]),
    "registry verify": ([], ["--registry", "--json"]),
    "registry push": (["reference", "repository"], ["--revision", "--public", "--registry", "--json"]),
    "registry pull": (["repository"], ["--revision", "--name", "--tag", "--registry", "--json"]),
    "bench train": (
        [],
        ["--size", "--model", "--dtype", "--device", "--batch", "--length", "--rounds", "--steps", "--threads", "--only",
         "--method", "--longest", "--list", "--seed", "--json", "--plot"],
    ),
    "bench methods": (
        ["words"],
        ["--model", "--data", "--eval", "--skill", "--other", "--method", "--lr", "--seeds", "--count", "--steps",
         "--answers", "--output", "--restart", "--behaviour", "--list", "--json", "--plot"],
    ),
    "bench switch": (
        [],
        ["--shape", "--density", "--dtype", "--granularity", "--model", "--rank", "--rounds", "--threads", "--writer", "--warm", "--list",
         "--seed", "--json", "--plot"],
    ),
}  # fmt: skip


def test_the_surface_is_frozen():
    group: Any = typer.main.get_command(application.app)
    found = {}
    commands = {n: c for n, c in group.commands.items() if not hasattr(c, "commands")}
    for name, inner in group.commands.items():
        commands |= {f"{name} {n}": c for n, c in getattr(inner, "commands", {}).items()}
    for name, command in commands.items():
        arguments = [p.name for p in command.params if p.param_type_name == "argument"]
        options = [p.opts[-1] for p in command.params if p.param_type_name == "option" and p.opts[-1] != "--help"]
        found[name] = (arguments, options)
    assert found == SURFACE
    assert list(found) == list(SURFACE), "the help lists them in this order"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(intarsia, words):
    ended = intarsia(*words)
    assert ended.code == 0
    assert all(name.split()[0] in ended.out for name in SURFACE)


def test_version(intarsia):
    assert intarsia("--version").out == f"intarsia {__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainn"], "no command 'trainn'; did you mean 'train'"),
        (
            ["xyz"],
            "no command 'xyz'; known: bench, chat, check, compress, convert, demo, eval, merge, methods, registry, repair, show, shrink, train",
        ),
        (["train", "--dry-rn"], "no option --dry-rn; did you mean --dry-run? (intarsia train --help)"),
        (["methods", "--frobnicate"], "no option --frobnicate; known: --help, --json (intarsia methods --help)"),
        (["registry", "lst"], "no command 'lst'; did you mean 'list'?"),
        (["bench", "trian"], "no command 'trian'; did you mean 'train'?"),
        (
            ["bench", "train", "--roundz", "2"],
            "no option --roundz; did you mean --rounds or --only or --json? (intarsia bench train --help)",
        ),
        (["show"], "missing argument 'ADAPTER' (intarsia show --help)"),
        (["chat", "m", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["train"], "a config file is needed: intarsia train CONFIG.yaml"),
        (["show", "nowhere"], "nowhere does not exist; an adapter is a folder"),
        (["methods", "shria"], "unknown method 'shria'; did you mean 'shira'"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(intarsia, words, said):
    ended = intarsia(*words)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


def test_exit_codes_and_messages(capsys):
    missing = FileNotFoundError(2, "No such file or directory", "rows.jsonl")
    ends = [IntarsiaError("so"), missing, KeyboardInterrupt(), ZeroDivisionError("by zero")]
    assert [application.report(error) for error in ends] == [2, 2, 130, 1]
    said = capsys.readouterr().err
    assert "error: so\n" in said
    assert "error: No such file or directory: rows.jsonl" in said
    assert "interrupted\n" in said
    assert "unexpected ZeroDivisionError: by zero" in said
    assert "INTARSIA_DEBUG=1 shows where" in said


def test_a_traceback_is_shown_to_whom_asks_for_it(intarsia, monkeypatch):
    monkeypatch.setenv("INTARSIA_DEBUG", "1")
    ended = intarsia("show", "nowhere")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("error: nowhere does not exist")


def test_help_does_not_wait_for_torch():
    code = "import sys, intarsia.cli.app; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_reader_that_leaves_early_is_no_error(program):
    started = subprocess.Popen([*program, "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stderr is not None
    started.stdout.close()
    said = started.stderr.read()
    started.stderr.close()
    started.wait(timeout=120)
    assert "Traceback" not in said
    assert "error" not in said


def test_the_program_says_one_line_and_ends_with_2(program, tmp_path):
    ended = subprocess.run([*program, "chat", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "no config.json in this folder" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ctrl_c_ends_the_program_with_130_and_one_line(program, world):
    started = subprocess.Popen(
        [*program, "chat", str(world.base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stderr is not None
    said = b""
    while b"Ctrl-D leaves" not in said:  # the last thing before it waits for a line
        said += (piece := os.read(started.stderr.fileno(), 4096))
        assert piece, said.decode()
    started.send_signal(signal.SIGINT)
    out, rest = started.communicate(timeout=120)
    assert (started.returncode, out) == (130, b"")
    assert rest.decode().strip() == "interrupted"


def test_public_names_are_found_when_they_are_used():
    import intarsia

    assert all(getattr(intarsia, name) is not None for name in intarsia.__all__)
    assert set(intarsia.__all__) <= set(dir(intarsia))
    with pytest.raises(AttributeError, match="no attribute 'Sihra'"):
        intarsia.Sihra
