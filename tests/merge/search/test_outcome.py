"""What is told of a search: the sentence, the tables, the picture; and what is left when writing fails."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from PIL import Image
from rich.console import Console

from intarsia.errors import IntarsiaError
from intarsia.merge.search import Compared, Gains, Objective, Outcome, Search, Trial, picture, space_of

SKILLS = ("a", "b", "c")
GAINS = Gains(dict.fromkeys(SKILLS, 3.0), dict.fromkeys(SKILLS, 1.0))


def losses(*retained: float) -> dict[str, float]:
    """Base 3, single 1: the loss at which so much is retained."""
    return {skill: 3.0 - 2.0 * share for skill, share in zip(SKILLS, retained, strict=True)}


def outcome(given=(0.5, 0.6, 0.7), found=(0.8, 0.7, 0.6), unseen=((0.4, 0.6, 0.7), (0.7, 0.6, 0.5))) -> Outcome:
    space = space_of({skill: {"weight": 0.5} for skill in SKILLS}, {"weight": (0.0, 1.5)})
    trials = (
        Trial(0, space.start, losses(*given), 1.0),
        Trial(1, {name: 0.6 for name in space.start}, losses(0.1, 0.1, 0.1), 1.0),
        Trial(2, {name: 0.7 for name in space.start}, losses(*found), 1.0),
        Trial(3, {name: 1.4 for name in space.start}, losses(float("-inf"), 0, 0), 1.0),
    )
    rows = dict.fromkeys(SKILLS, 8)
    search = Search(space, Objective(), GAINS, trials)
    return Outcome(
        search,
        Compared(GAINS, trials[0].losses, search.best.losses, rows),
        Compared(GAINS, losses(*unseen[0]), losses(*unseen[1]), rows),
    )


def shown(table) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_the_sentence_says_what_holds_on_other_rows():
    said = outcome().sentence()
    assert (
        "On 24 rows that the search never saw, the worst skill's retained share is 50.0%; with the weights as given 40.0%"
        in said
    )
    assert "On the rows of the search: 50.0% to 60.0%" in said


def test_what_does_not_carry_over_is_said():
    said = outcome(unseen=((0.6, 0.6, 0.7), (0.7, 0.6, 0.55))).sentence()
    assert "The gain on the rows of the search (50.0% to 60.0%) does not carry over" in said


def test_weights_that_nothing_surpasses_are_kept():
    found = outcome(found=(0.4, 0.4, 0.4))
    assert found.search.best.number == 0
    assert found.sentence().startswith("No trial was better than the weights as given, which are kept.")


def test_the_tables_hold_the_numbers():
    weights, skills = shown(outcome().weights_table()), shown(outcome().skills_table())
    assert "0.5" in weights
    assert "0.7" in weights
    assert "0 to 1.5" in weights
    rows = {line.split()[0]: line.split()[1:] for line in skills.splitlines() if line.strip()}
    assert rows["a"] == ["3.000", "1.000", "2.200", "1.600", "40.0%", "70.0%", "50.0%", "80.0%"]
    assert rows["worst"] == ["40.0%", "50.0%", "50.0%", "60.0%"]


def test_the_json_has_every_trial_and_no_number_that_json_has_not():
    found = json.loads(json.dumps(outcome().to_dict(), allow_nan=False))
    assert [t["trial"] for t in found["trials"]] == [0, 1, 2, 3]
    assert found["trials"][3]["value"] is None
    assert found["trials"][3]["loss"]["a"] is None
    assert found["trials"][2]["retained"] == pytest.approx({"a": 0.8, "b": 0.7, "c": 0.6})
    assert found["front"] == [0, 2]
    assert found["value"]["held_out"] == pytest.approx({"given": 0.4, "found": 0.5})


@pytest.mark.parametrize("skills", [2, 3])
def test_the_picture_has_a_panel_of_each_pair_and_the_history(tmp_path, skills):
    whole = outcome().search
    kept = SKILLS[:skills]
    gains = Gains({s: 3.0 for s in kept}, {s: 1.0 for s in kept})
    trials = tuple(dataclasses.replace(t, losses={s: t.losses[s] for s in kept}) for t in whole.trials)
    path = picture(Search(whole.space, whole.objective, gains, trials), tmp_path / "new" / "search.png", "three skills")
    with Image.open(path) as image:
        width, height = image.size
    assert round(width / height) == (2 if skills == 2 else 1), "two panels are one row, four are two"
    assert [p.name for p in path.parent.iterdir()] == ["search.png"]


def test_a_picture_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(IntarsiaError, match="should end in"):
        picture(outcome().search, tmp_path / "search.txt")
