"""``intarsia check``: the contract on somebody's own method."""

from __future__ import annotations

import pytest

from intarsia import contract

MINE = '''"""Mine: a LoRA whose forward is {factor} of what it should be.    W' = W + s B A

Nobody 2026, arXiv:0000.00000, section 1.
Trained: r (O + I) numbers a weight.
"""

from dataclasses import dataclass

from intarsia import register
from intarsia.methods.lora import Lora

{before}
@dataclass(frozen=True)
class {name}(Lora):
    name, title, paper = "{name}", "Mine", "arXiv:0000.00000"
    small = ({{"rank": 2}}, {{"rank": 3}})

    def branch(self, p, x):
        return {factor} * super().branch(p, x)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contract, "LAWS", {k: contract.LAWS[k] for k in ("forward is the fold", "starts as the base")})
    return tmp_path


def test_a_sound_method_passes(intarsia, folder):
    (folder / "sound_method.py").write_text(MINE.format(name="Sound", factor=1.0, before=""))
    ended = intarsia("check", "sound_method:Sound")
    assert ended.code == 0, ended.err
    assert "every law holds: 4 checks in 2 settings of Sound" in ended.out
    assert intarsia("check", "sound_method:Sound", "--json").json["passed"] is True


def test_a_broken_law_is_named_with_what_was_found(intarsia, folder):
    (folder / "broken_method.py").write_text(MINE.format(name="Broken", factor=1.01, before=""))
    ended = intarsia("check", "broken_method:Broken")
    assert ended.code == 1
    assert "forward is the fold" in ended.out
    assert "rank=2: forward against fold" in " ".join(ended.out.split())
    assert "2 broken" in ended.out
    assert "starts as the base" in ended.out
    plain = intarsia("check", "broken_method:Broken", "--json")
    assert plain.code == 1
    assert '"passed": false' in plain.out
    assert plain.out.count('"state": "broken"') == 2


def test_a_registered_method_goes_by_its_name(intarsia, folder):
    assert intarsia("check", "lora").code == 0


@pytest.mark.parametrize(
    ("text", "subject", "said"),
    [
        ("", "nothing_there:Mine", "No module named 'nothing_there'"),
        ("", "no_such_class:Mine", "has no attribute 'Mine'"),
        ("x = = 1", "wrong_syntax:Mine", "SyntaxError: invalid syntax (wrong_syntax.py, line 1)"),
        ("\n1 / 0\n", "raises_itself:Mine", "raises_itself.py, line 2)"),
        ("Mine = 3", "not_a_method:Mine", "expected a method"),
        ("", "lroa", "is no registered method; give module:Class"),
    ],
)
def test_what_cannot_be_checked(intarsia, folder, text, subject, said):
    module = subject.partition(":")[0]
    if module != "nothing_there":
        (folder / f"{module}.py").write_text(text)
    ended = intarsia("check", subject)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
