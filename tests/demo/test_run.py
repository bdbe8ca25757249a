"""The demo from end to end on a tiny random model: every part of the story, and a base that comes back to the bit."""

from __future__ import annotations

import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from intarsia import pretrained
from intarsia.demo import run as demo
from intarsia.demo.charts import Bar, Line, line_chart, log_bars, round_ticks, share_bars
from intarsia.demo.report import page
from intarsia.demo.result import DemoResult
from intarsia.demo.run import Size
from intarsia.errors import IntarsiaError
from intarsia.evaluate import BASE
from intarsia.model import digest
from intarsia.store import read
from intarsia.train.progress import PlainProgress, Progress, Status, Titled
from intarsia.train.trainer import TrainingStopped, train
from toy import save_toy

TINY = Size(
    steps={"phonemes": 2, "docstring": 2, "names": 2}, n_train=64, n_held_out=4, watched=4, batch_size=4,
    walk=8, rounds=2, strengths=(0.5, 1.0), shown=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("model") / "toy", torch.bfloat16)


@pytest.fixture(scope="module")
def heard() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def result(toy: Path, heard: io.StringIO, tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=heard, width=160)
    return demo.run(folder, model=str(toy), size=TINY, progress=PlainProgress(console, seconds=0.0))


def test_every_part_of_the_story_is_there(result: DemoResult) -> None:
    assert [s.name for s in result.skills] == ["phonemes", "docstring", "names"]
    assert [a.kind for a in result.adapters] == ["PaCA", "LoRA", "SHiRA-WM", "LoRA", "SHiRA-SNIP", "LoRA"]
    assert result.matrix.adapters == (BASE, *(a.name for a in result.adapters))
    assert all(cell.score is not None for cell in result.matrix.cells.values())
    assert [s.name for s in result.switches] == ["deck", "prepared", "lora-fuse", "lora-switch", "dense"]
    assert [(f.kind, f.strength) for f in result.fusions] == [
        ("sparse", 0.5), ("LoRA", 0.5), ("sparse", 1.0), ("LoRA", 1.0),
    ]  # fmt: skip
    assert len(result.examples) == 6
    assert set(result.seconds) == {
        "load the model", "train", "measure", "switch", "time switches", "fuse", "all",
    }  # fmt: skip


def test_the_base_comes_back_to_the_bit(result: DemoResult, toy: Path) -> None:
    assert result.exactness.exact
    assert result.exactness.before == digest(pretrained.load(str(toy)).model)
    assert result.exactness.switches == 8
    exact = {s.name: s.changed_share for s in result.switches}
    assert exact["deck"] == exact["prepared"] == exact["dense"] == 0
    assert exact["lora-switch"] > 0, "adding and subtracting in bfloat16 cannot be exact"


def test_trained_counts_are_alike_and_training_moved_the_loss(result: DemoResult) -> None:
    counts = [a.trained for a in result.adapters]
    assert max(counts) < 1.15 * min(counts)  # the columns of a tiny model are a coarse measure
    for a in result.adapters:
        assert [step for step, _ in a.losses] == [1, 2]
        assert a.held_out[0][0] == 0
        assert a.held_out[-1][1] != a.held_out[0][1]
        assert a.held_out[0][1] == pytest.approx(result.matrix[BASE, a.skill].loss, rel=1e-3)
        assert a.held_out[-1][1] == pytest.approx(result.matrix[a.name, a.skill].loss, rel=1e-2)


def test_retained_shares_follow_from_the_losses(result: DemoResult) -> None:
    for fusion in result.fusions:
        for adapter, loss, share in zip(fusion.adapters, fusion.losses, fusion.retained, strict=True):
            skill = adapter.partition("-")[0]
            base, alone = result.matrix[BASE, skill].loss, result.matrix[adapter, skill].loss
            assert share is None if alone >= base else share == pytest.approx((base - loss) / (base - alone))


def test_adapters_are_whole_and_have_cards(result: DemoResult) -> None:
    folders = sorted(path.name for path in (result.folder / "adapters").iterdir())
    assert folders == sorted(a.name for a in result.adapters), "nothing unfinished beside them"
    for a in result.adapters:
        adapter = read(result.folder / "adapters" / a.name)
        assert adapter.digest == a.digest
        assert adapter.base.digest == result.exactness.before
        assert a.name in (result.folder / "adapters" / a.name / "README.md").read_text()


def test_results_are_json_and_say_the_same(result: DemoResult) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads((result.folder / "results.json").read_text("utf-8"), parse_constant=refuse)
    assert found["exactness"]["exact"] is True
    assert found["matrix"]["loss"][BASE]["names"] == result.matrix[BASE, "names"].loss
    assert found["headline"] == result.headline()
    assert str(result.folder.parent) not in json.dumps({k: v for k, v in found.items() if k != "adapters"})


class _Outside(HTMLParser):
    """Collects whatever a page would load, and checks that its tags are closed in order."""

    VOID = frozenset({"meta", "line", "circle", "rect", "polyline", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [str(v) for k, v in attrs if k in ("src", "href", "srcset") and v]
        if tag in ("script", "link", "iframe", "img"):
            self.outside.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_report_needs_nothing_else(result: DemoResult) -> None:
    text = (result.folder / "report.html").read_text("utf-8")
    parser = _Outside()
    parser.feed(text)
    assert parser.outside == []
    assert parser.open == []
    assert "url(" not in text
    assert "prefers-color-scheme" in text
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.S).lower().replace("finance", "")
    assert result.exactness.before in text
    assert text.count('class="own') == 6


def test_the_picture_is_a_png(result: DemoResult) -> None:
    assert (result.folder / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(result.folder.glob("*.part*"))


def test_the_terminal_tells_it_too(result: DemoResult, heard: io.StringIO) -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(result)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "phonemes-paca",
        "names-lora",
        "deck.use",
        "the base has the SHA-256 it began with",
        "report.html",
    ):
        assert part in shown
    lines = heard.getvalue()
    assert "training 6/6: Foreign name → English with LoRA" in lines
    assert "6/6 names LoRA: step 2/2" in lines
    assert "the base is back to the bit" in lines


def test_a_base_that_changed_is_said_loudly(result: DemoResult) -> None:
    from dataclasses import replace

    broken = replace(result, exactness=replace(result.exactness, after="0" * 64))
    console = Console(width=200, file=io.StringIO())
    console.print(broken)
    assert "THE BASE CHANGED" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "is NOT what it was" in broken.headline()
    assert "The base changed" in page(broken)
    assert broken.to_dict()["exactness"]["exact"] is False


def test_sparse_losing_is_said_as_it_is(result: DemoResult) -> None:
    from dataclasses import replace

    from intarsia.evaluate import Cell, Matrix

    def losing(adapter: str, task: str) -> Cell:
        if adapter == BASE:
            return Cell(5.0, 0.0)
        return Cell(1.0 if adapter == f"{task}-lora" else 2.0, 0.5)

    old = result.matrix
    cells = {key: losing(*key) for key in old.cells}
    lost = replace(result, matrix=Matrix(old.adapters, old.tasks, old.measures, cells))
    assert lost.sparse_wins() == []
    assert lost.on_diagonal(sparse=False) == ["phonemes", "docstring", "names"]
    assert "lower held-out loss on 0 of 3 skills" in lost.headline()


# ------------------------------------------------------------------------------------------------------ faults


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(IntarsiaError, match=r"holds something else \(thesis.txt\)"):
        demo.run(tmp_path, model="nowhere")
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(IntarsiaError, match="is a file"):
        demo.run(tmp_path / "file")


def test_ctrl_c_leaves_no_half_written_adapter(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train
    done: list[str] = []

    def stopped_at_the_second(config: Any, **more: Any) -> Any:
        if done:
            unfinished = Path(f"{config.output}.unfinished")
            unfinished.mkdir(parents=True)
            raise TrainingStopped(1, 2)
        done.append(config.output)
        return real(config, **more)

    monkeypatch.setattr(demo, "train", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt, match="stopped while training phonemes-lora; adapters that were finished"):
        demo.run(tmp_path / "out", model=str(toy), size=TINY)
    assert [path.name for path in (tmp_path / "out" / "adapters").iterdir()] == ["phonemes-paca"]
    assert not (tmp_path / "out" / "results.json").exists()


def test_steps_are_heard_under_a_title() -> None:
    lines: list[str] = []

    class Listening(Progress):
        def step(self, status: Status) -> None:
            lines.append(status.line())

    Titled(Listening(), "2/6 names LoRA").step(Status(3, 9, loss=1.5))
    assert lines == ["2/6 names LoRA: step 3/9  loss 1.5000"]


# ------------------------------------------------------------------------------------------------------ charts


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.13, 9.44), (0.002, 0.0021), (3.0, 3.0), (-2.0, 7.0)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    ticks = round_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 9
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1


def test_charts_place_values_where_they_belong() -> None:
    chart = line_chart([Line([(0, 4.0), (10, 2.0)], "sparse", "a", marked=True)], "l", "x")
    circles = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert circles[0][0] < circles[1][0]
    assert circles[0][1] < circles[1][1], "a higher loss stands higher"
    bars = log_bars(
        [Bar("a", 1.0, "1", "sparse"), Bar("b", 10.0, "10", "lora"), Bar("c", 100.0, "100", "plain")], "l", "ms"
    )
    one, ten, hundred = (float(w) for w in re.findall(r'width="([\d.]+)" height="22"', bars))
    assert hundred - ten == pytest.approx(ten - one, abs=0.2), "equal ratios, equal lengths"
    shares = share_bars(
        [("g", [Bar("a", 0.5, "", "lora"), Bar("b", 1.0, "", "lora"), Bar("c", -3.0, "", "lora")])], "l"
    )
    half, full, below = (float(w) for w in re.findall(r'width="([\d.]+)" height="19"', shares))
    assert full == pytest.approx(2 * half, abs=0.2)
    assert below == 2.0
