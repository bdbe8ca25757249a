"""The live line, the plain lines, the log and the loss curve."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from intarsia.train.plots import loss_curve, smooth
from intarsia.train.progress import Log, Pace, PlainProgress, Progress, Status, clock, progress_on, read_log, size


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def plain(clock=None):
    stream = io.StringIO()
    return PlainProgress(Console(file=stream, width=40), seconds=10, now=clock or Clock()), stream


def test_a_status_says_all_that_is_known():
    whole = Status(12, 200, loss=2.31, lr=4e-3, tokens_per_second=349.6, seconds_left=100, memory=1_240_000_000)
    assert whole.line() == "step 12/200  loss 2.3100  lr 4.00e-03  350 tokens/s  1:40 left  1.24 GB"
    assert Status(1, 2).line() == "step 1/2"


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00"), (59.6, "1:00"), (187, "3:07"), (3723, "1:02:03")])
def test_clock(seconds, said):
    assert clock(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(12, "12 B"), (1500, "1.5 kB"), (812_000, "812 kB"), (3e12, "3 TB")])
def test_size(count, said):
    assert size(count) == said


def test_pace_measures_from_where_it_began():
    clock = Clock()
    pace = Pace(steps=110, first=100, now=clock)
    clock.time, pace.tokens = 20.0, 500
    status = pace.after(104, loss=1.0)
    assert (status.tokens_per_second, status.seconds_left) == (25.0, 30.0)
    assert pace.after(105).loss == 1.0  # what is not known anew stays
    assert status.memory is not None
    assert status.memory > 1_000_000


def test_plain_lines_come_at_the_ends_and_now_and_then():
    clock = Clock()
    progress, stream = plain(clock)
    for step in range(1, 101):
        clock.time += 1.0
        progress.step(Status(step, 100))
    said = stream.getvalue().splitlines()
    assert said[0] == "step 1/100"
    assert said[-1] == "step 100/100"
    assert 10 <= len(said) <= 13


def test_plain_lines_are_not_broken_and_markup_is_not_read():
    progress, stream = plain()
    progress.say("[red]x[/red] " + "long " * 20)
    progress.warn("careful")
    assert stream.getvalue().splitlines() == ["[red]x[/red] " + "long " * 20, "warning: careful"]


def test_a_terminal_gets_one_live_line_and_others_plain_lines():
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=100)
    with progress_on(terminal) as progress:
        progress.say("worth keeping")
        for step in range(1, 50):
            progress.step(Status(step, 50))
        progress.work(3, 4, "evaluating")
    assert isinstance(progress_on(Console(file=io.StringIO())), PlainProgress)
    assert "worth keeping\n" in stream.getvalue()
    assert stream.getvalue().count("\n") <= 3  # steps write over each other


def test_silence_is_the_default():
    with Progress() as progress:
        progress.say("")
        progress.warn("")
        progress.work(1, 2, "")
        progress.step(Status(1, 2))


def test_the_log_is_written_at_once_and_survives_a_half_written_line(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    log.write("step", step=1, loss=2.0)
    log.write("step", step=2, loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    assert [e["step"] for e in read_log(path)] == [1, 2]
    again = Log(path)
    again.keep_until(1)
    again.write("step", step=2, loss=0.5)
    assert [e["loss"] for e in read_log(path)] == [2.0, 0.5]


def test_smoothing_is_the_mean_of_the_last_ones():
    assert smooth([4.0, 2.0, 0.0, 2.0], 2) == [4.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "events",
    [
        [{"event": "eval", "step": 0, "eval_loss": 5.0}]
        + [{"event": "step", "step": i, "loss": 5 / i} for i in range(1, 60)]
        + [{"event": "eval", "step": 59, "eval_loss": 1.0}],
        [{"event": "step", "step": 1, "loss": 3.0}],
        [],
    ],
)
def test_the_curve_is_a_picture(tmp_path, events):
    path = loss_curve(events, tmp_path / "loss.png", "a title")
    with Image.open(path) as picture:
        assert picture.width > 800
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    held_out = (0xC2, 0x41, 0x0C)
    assert (held_out in colours) == any(e["event"] == "eval" for e in events)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
