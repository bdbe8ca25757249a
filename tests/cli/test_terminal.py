"""What all commands share: JSON that every reader takes, silence of other libraries, progress beside the result."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from intarsia.cli import terminal


def test_json_is_json(capsys):
    terminal.print_json({"loss": float("nan"), 3: [float("inf"), 1.5, True, None], "at": Path("a/b"), "pair": ("ü", 2)})
    printed = capsys.readouterr().out

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    found = json.loads(printed, parse_constant=refuse)
    assert found == {"loss": None, "3": [None, 1.5, True, None], "at": "a/b", "pair": ["ü", 2]}
    assert "ü" in printed


def test_progress_goes_to_standard_error(capsys):
    with terminal.progress() as progress:
        progress.say("half way [of it]")
    assert capsys.readouterr() == ("", "half way [of it]\n")


def test_other_libraries_are_silent_unless_someone_debugs(monkeypatch):
    for name in terminal.QUIET:
        monkeypatch.setenv(name, "as it was")  # so that the end of the test gives back what there is
        monkeypatch.delenv(name)
    with warnings.catch_warnings():
        monkeypatch.setenv("INTARSIA_DEBUG", "1")
        terminal.hush()
        assert not any(name in os.environ for name in terminal.QUIET)
        monkeypatch.setenv("INTARSIA_DEBUG", "0")
        terminal.hush()
        warnings.warn("not for users", stacklevel=1)
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert all(name in os.environ for name in terminal.QUIET)


def test_a_message_is_printed_as_it_is(capsys):
    terminal.show_error("rows [3] of " + "long/" * 60)
    assert capsys.readouterr().err == f"error: rows [3] of {'long/' * 60}\n"
