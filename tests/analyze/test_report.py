"""The page about an adapter, the heat map behind its picture, and the list of analyses."""

from __future__ import annotations

import importlib
import re
from html.parser import HTMLParser

import pytest
import torch

from intarsia.analyze import (
    adapter_intruders,
    heat,
    intruder_heat,
    intruders,
    report,
    spectra,
    systems,
    weight_changes,
)
from intarsia.edits import Edit, elements
from intarsia.errors import IntarsiaError
from intarsia.page import page, write
from intarsia.store import Adapter, Base
from planted import N, base_of_distinct_values, planted


def two_layers() -> tuple[Adapter, dict[str, torch.Tensor]]:
    few = elements((N, N), torch.tensor([3, 70]), torch.tensor([0.1, -0.1]))
    edits: dict[str, Edit] = {
        "h.0.attn.c_proj.weight": planted(10.0),
        "h.0.mlp.c_proj.weight": few,
        "h.1.attn.c_proj.weight": few,
        "head.weight": few,
    }
    made = Adapter("<b>one", edits, Base("0" * 64, "float32", "some/base"), {"name": "lora"}, note={"loss": 1.25})
    return made, dict.fromkeys(edits, base_of_distinct_values())


def test_a_cell_for_every_weight():
    adapter, weights = two_layers()
    changes = weight_changes(adapter, weights)
    shown = heat(changes)
    assert shown.layers == (None, 0, 1)
    assert shown.modules == ("attn.c_proj", "mlp.c_proj", "head"), "weights of one name in one layer are told apart"
    by_name = {change.name: change.relative for change in changes}
    assert shown.cells == (
        (None, None, by_name["head.weight"]),
        (by_name["h.0.attn.c_proj.weight"], by_name["h.0.mlp.c_proj.weight"], None),
        (by_name["h.1.attn.c_proj.weight"], None, None),
    )
    assert shown.to_dict()["layers"] == [None, 0, 1]
    counts = intruder_heat(adapter_intruders(adapter, weights))
    assert counts.cells == ((None, None, 0.0), (1.0, 0.0, None), (0.0, None, None))


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_says_what_was_found():
    adapter, weights = two_layers()
    changes = weight_changes(adapter, weights)
    looked = adapter_intruders(adapter, weights)
    html = report(adapter, changes, spectra(adapter, list(adapter.edits)[:2], weights), looked, epsilon=0.5)
    tags = Tags(html)
    assert tags.open == [], "every element is closed"
    sources = [attributes.get("src") or attributes.get("href") for tag, attributes in tags.seen]
    assert all(source.startswith("data:image/png;base64,") for source in sources if source)
    assert sum(source is not None for source in sources) == 4
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags.seen}
    text = re.sub(r"\s+", " ", re.sub("<style>.*?</style>|<[^>]*>", " ", html, flags=re.S))
    for said in (
        "&lt;b&gt;one",
        adapter.digest,
        "some/base",
        "1.25",
        "h.0.attn.c_proj.weight",
        "0.138",
        "Effective rank",
    ):
        assert said in text
    assert "1 intruder dimension, in 1 of 4 weights" in text


def test_sections_follow_what_was_measured():
    adapter, weights = two_layers()
    plain = report(adapter, weight_changes(adapter), ())
    assert "Intruder dimensions</h2>" not in plain
    assert "--model and --intruders add" in plain
    quiet = [intruders(weights["head.weight"], adapter.edits["head.weight"], name="head.weight")]
    assert "There is none; the least likeness is" in report(adapter, weight_changes(adapter, weights), (), quiet)


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    html = page(title="t", kicker="k", headline="1 < 2", sections=[("a & b", "<p>c</p>")])
    assert write(html, tmp_path / "new" / "page.html").read_text(encoding="utf-8") == html
    assert "<h1>1 &lt; 2</h1>" in html
    assert "<h2>a &amp; b</h2>" in html
    (tmp_path / "file").write_text("")
    with pytest.raises(IntarsiaError, match="could not write .*page.html"):
        write(html, tmp_path / "file" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(IntarsiaError, match="could not write"):
        write(html, tmp_path / "folder.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html", "new"]


def test_the_analyses_that_are_listed_are_there():
    rows = {row.id: row for row in systems()}
    assert sorted(rows) == [
        "intruder-dimensions", "lora-complexity-bounds", "matrix-nuclear-norm", "rankme", "wm-lmc-analysis"
    ]  # fmt: skip
    for row in rows.values():
        module, _, name = row.facts["function"].rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
        assert (row.role, row.mergeable) == ("analysis", False)
        assert row.paper.startswith("arXiv:")
        assert row.paper in (importlib.import_module(row.about).__doc__ or "")
