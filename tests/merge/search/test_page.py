"""The example of the documentation runs, and what it prints is what it says."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_example_of_the_page_runs(capsys):
    page = Path(__file__).parents[3] / "docs" / "search.md"
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    names: dict = {}
    exec(compile(block, str(page), "exec"), names)
    found = names["found"]
    assert found.value(found.best) > found.value(found.start)
    assert "weight of names" in capsys.readouterr().out
