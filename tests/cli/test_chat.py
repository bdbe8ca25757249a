"""``intarsia chat``: streamed answers, live switches, and nothing that ends the program but leaving it."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch

import intarsia as ia
from intarsia import pretrained
from intarsia.cli import chat as command
from intarsia.cli.conversation import Conversation, Settings
from intarsia.errors import IntarsiaError


@pytest.fixture
def base(world) -> pretrained.Pretrained:
    return pretrained.load(world.base)


def answer(conversation: Conversation, text: str) -> str:
    return "".join(conversation.say(text))


def events(ended) -> list[dict]:
    return [json.loads(line) for line in ended.out.splitlines()]


# --- the conversation


def test_greedy_answers_are_those_of_transformers(base):
    said = answer(talk := Conversation(base, Settings(max_new_tokens=24), plain=True), "abc ->")
    ids = base.tokenizer("abc ->", return_tensors="pt", add_special_tokens=False)
    out = base.model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    expected = base.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == talk.answer.text == expected
    assert said


def test_turns_go_through_the_chat_template_and_the_cache_changes_nothing(base):
    talk = Conversation(base, Settings(max_new_tokens=8, system="be brief"))
    first = answer(talk, "one")
    fed = len(talk.cached)
    second = answer(talk, "two")
    assert fed < len(talk.cached)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "two"}]
    whole = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert second == answer(Conversation(base, Settings(max_new_tokens=8), plain=True), whole)
    ids = base.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert talk.cached[: len(ids)] == ids
    assert talk.turns == [*turns[1:], {"role": "assistant", "content": second}]


def test_a_cache_of_other_words_is_not_used(base):
    talk = Conversation(base, Settings(max_new_tokens=4), plain=True)
    answer(talk, "short")
    longer = "something else that is longer than all that was said before"
    assert answer(talk, longer) == answer(Conversation(base, Settings(max_new_tokens=4), plain=True), longer)


def test_a_switch_leaves_nothing_of_the_old_weights_in_the_cache(base, world):
    deck = ia.Deck(base.model)
    deck.add(world.adapters["spells"])
    session = command.Session(Conversation(base, Settings(max_new_tokens=8)), deck, json=False)
    session.hear("one")
    assert session.conversation.cached
    session.hear("/use spells")
    assert not session.conversation.cached
    assert session.conversation.cache is None
    session.hear("two")
    fresh = Conversation(base, Settings(max_new_tokens=8), turns=session.conversation.turns[:2])
    assert answer(fresh, "two") == session.conversation.answer.text
    deck.off()


def test_sampling_follows_the_seed(base):
    def sampled(seed: int, top_p: float = 1.0) -> str:
        return answer(Conversation(base, Settings(12, temperature=1.5, top_p=top_p, seed=seed), plain=True), "a")

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    greedy = answer(Conversation(base, Settings(12), plain=True), "a")
    assert sampled(1, top_p=0.0) == sampled(2, top_p=0.0) == greedy


def test_every_character_comes_whole(base, monkeypatch):
    ids = base.tokenizer("né → ü", add_special_tokens=False)["input_ids"]
    talk = Conversation(base, Settings(), plain=True)
    monkeypatch.setattr(talk, "_tokens", lambda prompt: iter(ids))
    pieces = list(talk.say("x"))
    assert pieces == ["n", "é", " ", "→", " ", "ü"]


def test_an_end_token_ends_the_answer(base, monkeypatch):
    talk = Conversation(base, Settings(max_new_tokens=5), plain=True)
    answer(talk, "a")
    assert (talk.answer.end, talk.answer.tokens) == ("length", 5)
    first = int(talk._logits(base.tokenizer("a", add_special_tokens=False)["input_ids"]).argmax())
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", [first, 3])
    answer(talk, "a")
    assert (talk.answer.end, talk.answer.tokens) == ("eos", 0)


def test_what_does_not_fit_the_context(base):
    talk = Conversation(base, Settings(max_new_tokens=8))
    for _ in range(6):
        answer(talk, "x" * 40)
    assert 0 < len(talk.turns) < 12, "the oldest turns went"
    with pytest.raises(IntarsiaError, match="this message has .* tokens; at most 248 fit"):
        answer(talk, "y" * 300)
    endless = Conversation(base, Settings(max_new_tokens=10_000), plain=True)
    answer(endless, "z" * 190)
    assert endless.answer.end in ("context", "eos")


def test_a_model_without_a_chat_template(base, monkeypatch):
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    with pytest.raises(IntarsiaError, match="no chat template.*--plain"):
        Conversation(base, Settings())
    talk = Conversation(base, Settings(), plain=True)
    with pytest.raises(IntarsiaError, match="no chat template"):
        talk.set_plain(False)
    assert talk.plain


# --- the command, from a file


def test_switches_show_in_the_answers_and_leave_no_trace(intarsia, world):
    lines = "abc\n/use spells\nabc\n/use spells 0.0\nabc\n/fuse spells=0.5 counts=0.5\nabc\n/off\nabc\n"
    ended = intarsia(
        "chat", world.base, world.adapters["spells"], world.adapters["counts"], "--plain", "--json",
        "--max-new-tokens", 12, stdin=lines,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    told = events(ended)
    texts = [event["text"] for event in told if event["event"] == "answer"]
    assert texts[0] == texts[2] == texts[4]
    assert len(set(texts)) == 3
    switches = [event for event in told if event["event"] == "switch"]
    assert [event["active"] for event in switches] == [
        {"spells": 1.0}, {"spells": 0.0}, {"spells": 0.5, "counts": 0.5}, {}
    ]  # fmt: skip
    assert all(event["milliseconds"] > 0 for event in switches)


def test_a_script_reads_like_a_conversation(intarsia, world):
    lines = "/use other\nabc\n\n/list\n/plain\nabc\n/plain\n/reset\n/help\n/quit\nnever\n"
    ended = intarsia("chat", world.base, f"other={world.adapters['spells']}", "--max-new-tokens", 4, stdin=lines)
    assert ended.code == 0, ended.err
    assert "base> /use other" in ended.out
    assert " ms)" in ended.out
    assert "other> abc" in ended.out
    assert "* other  1    shira, 4.99% of 14 weights, " in ended.out
    assert "each line is continued as it stands" in ended.out
    assert "a new conversation" in ended.out
    assert "/fuse NAME=0.6 NAME=0.4" in ended.out
    assert "never" not in ended.out
    assert ended.err.count("/plain gives it lines as they stand") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/usee spells", "unknown command /usee; did you mean /use or /fuse?"),
        ("/", "unknown command /; known: "),
        ("/use spels", "the deck has no adapter 'spels'; did you mean 'spells'?"),
        ("/use", "/use takes a name and perhaps a strength: /use NAME [STRENGTH]"),
        ("/use spells much", "'much' is not a number"),
        ("/use spells nan", "expected a finite number"),
        ("/fuse", "/fuse takes names with weights"),
        ("/fuse spells", "'spells' has no weight: /fuse NAME=0.6 NAME=0.4"),
        ("/fuse spells=1 spells=2", "'spells=2' is given twice"),
        ("/fuse spells=1 no=2", "the deck has no adapter 'no'"),
        ("x" * 400, "tokens; at most"),
    ],
)
def test_a_mistake_is_told_and_the_conversation_goes_on(intarsia, world, line, said):
    given = ("chat", world.base, world.adapters["spells"], "--max-new-tokens", 2)
    ended = intarsia(*given, stdin=f"{line}\n/list\n")
    assert ended.code == 2, "a script with a mistake in it did not do what it says"
    assert f"error: {said}" in ended.err or said in ended.err.partition("error: ")[2]
    assert "  spells" in ended.out, "the next line was still heard"
    assert "*" not in ended.out, "nothing was set in"
    told = events(intarsia(*given, "--json", stdin=f"{line}\n"))
    assert [event["event"] for event in told] == ["error"]
    assert said in told[0]["message"]


def test_mistakes_on_the_command_line(intarsia, world, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter.json").write_text("{")
    spells = world.adapters["spells"]
    for words, said in {
        (world.base, broken, "nowhere"): "nowhere does not exist",
        (world.base, spells, spells): "two adapters are named 'spells'",
        (world.base, f"a b={spells}"): "no spaces",
        (tmp_path, spells): "no config.json in this folder",
        (spells,): "this folder holds an adapter, not a model",
    }.items():
        ended = intarsia("chat", *words, stdin="never heard\n")
        assert (ended.code, ended.out) == (2, "")
        assert said in ended.err


def test_nothing_from_the_model_steers_the_terminal():
    assert command._visible("a\x1b[2Jb\r\x07\n\tü→") == "a\ufffd[2Jb\ufffd\ufffd\n\tü→"


# --- the command, from a keyboard


def keyboard(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What ``input`` gives, one after the other; an exception class is raised."""
    given = iter(lines)

    def read(prompt: str) -> str:
        line = next(given, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_ctrl_c_ends_the_answer_and_not_the_program(base, monkeypatch, capsys):
    session = command.Session(Conversation(base, Settings(max_new_tokens=6)), ia.Deck(base.model), json=False)
    tokens = Conversation._tokens

    def interrupted(self, ids):
        for i, token in enumerate(tokens(self, ids)):
            if i == 3 and len(self.turns) == 0:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Conversation, "_tokens", interrupted)
    keyboard(monkeypatch, "one", KeyboardInterrupt, "/nothing", "two", "/list")
    command._talk(session)
    said = capsys.readouterr()
    assert said.out.count("(stopped)") == 1
    assert "(Ctrl-D or /quit leaves)" in said.out
    assert "unknown command /nothing" in said.err
    turns = session.conversation.turns
    assert [turn["content"] for turn in turns if turn["role"] == "user"] == ["one", "two"]
    whole = Conversation(base, Settings(max_new_tokens=3))
    assert turns[1]["content"] == answer(whole, "one").rstrip("\ufffd"), "what came before Ctrl-C is kept"


def test_quit_leaves_at_once(base, monkeypatch):
    session = command.Session(Conversation(base, Settings()), ia.Deck(base.model), json=False)
    keyboard(monkeypatch, "/quit", "not heard")
    command._talk(session)
    assert session.conversation.turns == []


def test_tab_completes_commands_and_names(base, world):
    deck = ia.Deck(base.model)
    deck.add(world.adapters["spells"], world.adapters["counts"])
    session = command.Session(Conversation(base, Settings()), deck, json=False)
    assert session.words("/u", "/u") == ["/use "]
    assert session.words("/use ", "") == ["spells", "counts"]
    assert session.words("/fuse sp", "sp") == ["spells="]
    assert session.words("hello /u", "/u") == []


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_real_terminal(program, world):
    ours, theirs = pty.openpty()
    started = subprocess.Popen(
        [*program, "chat", str(world.base), str(world.adapters["spells"]), "--max-new-tokens", "3"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        env=os.environ | {"TERM": "xterm", "INPUTRC": "/dev/null"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def until(text: bytes, again: bytes = b"") -> None:
        """Read until the terminal has shown ``text``; keys ``again`` are struck once a second meanwhile."""
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            ready, _, _ = select.select([ours], [], [], 1)
            assert time.monotonic() < end, f"waited for {text!r} in vain after {seen.decode(errors='replace')!r}"
            if not ready:
                os.write(ours, again)
                continue
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux: the other side is closed
                piece = b""
            assert piece, seen.decode(errors="replace")
            seen += piece
        seen = seen.partition(text)[2]

    try:
        until(b"Ctrl-D leaves")
        until(b"> ")
        os.write(ours, b"/us\tspe\t\r")
        until(b" ms)")
        until(b"spells")
        until(b"> ")
        os.write(ours, b"half a line")
        until(b"half a line")
        # Python's readline misses a Ctrl-C that comes between two of its waits for a key (until the next key).
        until(b"(Ctrl-D or /quit leaves)", again=b"\x03")
        until(b"> ")
        os.write(ours, b"hello\r")
        until(b"3 tokens")
        until(b"> ")
        os.write(ours, b"\x04")
        assert started.wait(timeout=60) == 0
    finally:
        started.kill()
        started.wait()
        os.close(ours)


def test_answers_need_no_gradient(base):
    assert not torch.is_inference_mode_enabled()
    answer(talk := Conversation(base, Settings(max_new_tokens=2), plain=True), "a")
    assert not talk._logits([1, 2, 3]).requires_grad
