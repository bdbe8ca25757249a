"""The planted bugs still have a place in the source: only the files are read, ``python tests/mutations.py`` plants them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mutations import MUTATIONS, ROOT


def test_the_text_of_every_bug_stands_exactly_once_in_its_file():
    texts = {file: (ROOT / "src" / "intarsia" / file).read_text() for file in {bug.file for bug in MUTATIONS}}
    assert not [f"{bug.file}: {bug.what}" for bug in MUTATIONS if texts[bug.file].count(bug.old) != 1]


def test_every_bug_changes_something_and_has_a_name_of_its_own():
    assert not [bug.what for bug in MUTATIONS if bug.old == bug.new]
    assert not [what for what, count in Counter(bug.what for bug in MUTATIONS).items() if count > 1]


def test_the_tests_near_every_bug_exist():
    def exists(near: str) -> bool:
        path = Path(ROOT, "tests", near)
        return path.is_dir() or path.with_suffix(".py").is_file()

    assert not [f"{bug.near}: {bug.what}" for bug in MUTATIONS if not exists(bug.near)]
