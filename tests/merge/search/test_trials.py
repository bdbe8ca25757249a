"""The file of trials: what a killed process leaves, what is refused, who holds it."""

from __future__ import annotations

import math

import pytest

from intarsia.errors import IntarsiaError
from intarsia.merge.search.objective import Gains
from intarsia.merge.search.trials import Trial, TrialFile

SETTINGS = {"adapters": {"a": "0" * 64, "b": "1" * 64}, "seed": 0, "space": {"weight of a": [0.0, 1.5, 0.5]}}
GAINS = Gains({"a": 3.1, "b": 2.0}, {"a": 1.0, "b": 1.0})


def trial(number: int, loss: float = 1.25) -> Trial:
    return Trial(number, {"weight of a": 0.1 * number}, {"a": loss, "b": 1 / 3}, 0.5)


def filled(path, count=3):
    file = TrialFile.read(path)
    with file.held(SETTINGS):
        file.add_gains("search", GAINS)
        for number in range(count):
            file.add(trial(number))
    return path


def test_what_is_written_is_read_back_to_the_bit(tmp_path):
    file = TrialFile.read(filled(tmp_path / "trials.jsonl"))
    assert (file.settings, file.gains) == (SETTINGS, {"search": GAINS})
    assert file.trials == [trial(0), trial(1), trial(2)]
    with file.held(SETTINGS):
        file.add(trial(3, math.inf))
    assert TrialFile.read(file.path).trials[3].losses["a"] == math.inf


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_half_a_line_at_the_end_is_cut_off(tmp_path, cut):
    path = filled(tmp_path / "trials.jsonl")
    path.write_bytes(path.read_bytes()[:-cut])
    file = TrialFile.read(path)
    assert file.trials == [trial(0), trial(1)]
    with file.held(SETTINGS):
        file.add(trial(2))
    assert TrialFile.read(path).trials == [trial(0), trial(1), trial(2)]


def test_a_file_of_half_a_line_begins_anew(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"settings": {"a')
    file = TrialFile.read(path)
    with file.held(SETTINGS):
        file.add_gains("search", GAINS)
    assert TrialFile.read(path).settings == SETTINGS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"not json\n", "line 3: no line of a search's trials"),
        (b"[1]\n", "line 3"),
        (b'{"trial": 5, "point": {}, "loss": {}, "seconds": 1}\n', "trial 5 where 0 was expected"),
        (b'{"trial": 0, "point": {"x": "y"}, "loss": {}, "seconds": 1}\n', "line 3"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line, said):
    path = filled(tmp_path / "trials.jsonl", 0)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(IntarsiaError, match=said):
        TrialFile.read(path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"adapters": {"a": "0" * 64, "b": "2" * 64}}, "adapters: b was 111111111111..., is now 222222222222..."),
        ({"adapters": {"a": "0" * 64}}, "adapters: b was 111111111111..., is now not there"),
        ({"seed": 1}, "seed was 0, is now 1"),
        ({"space": {"weight of a": [0.0, 2.0, 0.5]}}, "space: weight of a was [0.0, 1.5, 0.5], is now [0.0, 2.0, 0.5]"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(tmp_path, changed, said):
    path = filled(tmp_path / "trials.jsonl")
    before = path.read_bytes()
    with (
        pytest.raises(IntarsiaError, match="holds 3 trials of a search with other settings") as error,
        TrialFile.read(path).held(SETTINGS | changed),
    ):
        pass
    assert said in str(error.value)
    assert path.read_bytes() == before


def test_one_search_at_a_time(tmp_path):
    path = filled(tmp_path / "trials.jsonl")
    with (
        TrialFile.read(path).held(SETTINGS) as file,
        pytest.raises(IntarsiaError, match="another process is searching"),
        TrialFile.read(path).held(SETTINGS),
    ):
        pass
    file = TrialFile.read(path)
    with TrialFile.read(path).held(SETTINGS) as other:
        other.add(trial(3))
    with file.held(SETTINGS):
        file.add(trial(4))  # what the other one did since is neither lost nor made again
    assert [one.number for one in TrialFile.read(path).trials] == [0, 1, 2, 3, 4]


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(IntarsiaError, match="file"), TrialFile(tmp_path / "file" / "trials.jsonl").held(SETTINGS):
        pass
