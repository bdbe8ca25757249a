"""Reading, checking, encoding and showing training data."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch
from rich.console import Console

from intarsia.errors import IntarsiaError
from intarsia.train import data
from toy import CHAT, toy_tokenizer

PROMPTS = [{"prompt": f"word {i} ->", "completion": f" answer {i}"} for i in range(5)]


def write(path, rows: list[Any]):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path, tokenizer=None, **more):
    return data.load_examples(path, tokenizer or toy_tokenizer(), **more)


def trained_text(example, tokenizer) -> str:
    return str(tokenizer.decode([t for t, y in zip(example.input_ids, example.labels, strict=True) if y != -100]))


def text(example, tokenizer) -> str:
    return str(tokenizer.decode(example.input_ids))


# --- files


def test_every_kind_of_file_gives_the_same_examples(tmp_path):
    import pyarrow
    import pyarrow.parquet

    files = [tmp_path / name for name in ("a.jsonl", "b.json", "c.json", "d.csv", "e.tsv", "f.parquet")]
    write(files[0], PROMPTS)
    files[1].write_text(json.dumps(PROMPTS))
    write(files[2], PROMPTS)  # lines under the name .json
    files[3].write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in PROMPTS))
    files[4].write_text("prompt\tcompletion\n" + "".join(f"{r['prompt']}\t{r['completion']}\n" for r in PROMPTS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PROMPTS), files[5])
    expected = [(e.input_ids, e.labels) for e in load(files[0])[0]]
    assert len(expected) == 5
    for file in files[1:]:
        assert [(e.input_ids, e.labels) for e in load(file)[0]] == expected, file.name


def test_rows_of_a_table_are_named_by_their_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffprompt,completion\r\n"two\r\nlines",x\r\n\r\ny,z\r\n', newline="")
    assert [row.number for row in data.read_rows(path)] == [2, 5]
    assert data.read_rows(path)[0].fields == {"prompt": "two\r\nlines", "completion": "x"}


def test_blank_lines_count_as_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", [PROMPTS[0], "", PROMPTS[1]])
    assert [row.number for row in data.read_rows(path)] == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b'[{"prompt": ', "not valid JSON"),
        ("a.csv", b"prompt,completion\n", "no rows"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"prompt,completion\n\xff,b\n", "not UTF-8"),
        ("a.csv", b"prompt,prompt\na,b\n", "'prompt' more than once"),
        ("a.csv", b'prompt,completion\n"a,b\n', "not a valid table near line"),
        ("a.parquet", b"PAR1 nonsense", "not a readable parquet file"),
        ("a.xlsx", b"x", "cannot read data from a .xlsx file; use .jsonl"),
    ],
)
def test_an_unusable_file_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntarsiaError, match=message):
        load(tmp_path / name)


def test_a_missing_file_names_the_nearest_one(tmp_path):
    write(tmp_path / "phonemes.jsonl", PROMPTS)
    with pytest.raises(IntarsiaError, match=r"no data file .*did you mean 'phonemes.jsonl'"):
        load(tmp_path / "phoneme.jsonl")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(IntarsiaError, match="pip install pyarrow"):
        load(tmp_path / "a.parquet")


# --- shapes and masking


def test_prompt_and_completion_train_the_completion_and_the_end(tmp_path):
    tokenizer = toy_tokenizer()
    examples, report = load(write(tmp_path / "a.jsonl", PROMPTS), tokenizer)
    assert report.format == "prompt"
    assert text(examples[2], tokenizer) == "word 2 -> answer 2<|end|>"
    assert trained_text(examples[2], tokenizer) == " answer 2<|end|>"


def test_the_prompt_has_the_tokens_it_will_have_when_asked(tmp_path):
    tokenizer = toy_tokenizer()
    path = write(tmp_path / "a.jsonl", [{"prompt": "cat", "completion": "hen"}])  # "t" and "h" would merge
    (example,), _ = load(path, tokenizer)
    prompt = tokenizer("cat")["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer("cathen")["input_ids"][: len(prompt)] != prompt
    assert trained_text(example, tokenizer) == "hen<|end|>"


def test_text_trains_everything(tmp_path):
    tokenizer = toy_tokenizer()
    (example,), report = load(write(tmp_path / "a.jsonl", [{"text": "hello"}]), tokenizer)
    assert report.format == "text"
    assert example.labels == example.input_ids
    assert example.trained == 5  # h is given; e, l, l, o and the end are predicted
    assert text(example, tokenizer) == "hello<|end|>"


@pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": None}, {"input": "some context"}])
def test_alpaca_without_a_template_uses_the_classic_prompt(tmp_path, context):
    tokenizer = toy_tokenizer(chat=None)
    row = {"instruction": "Add.", "output": "4", **context}
    (example,), report = load(write(tmp_path / "a.jsonl", [row]), tokenizer)
    assert report.format == "alpaca"
    assert trained_text(example, tokenizer) == "4<|end|>"
    shown = text(example, tokenizer)
    assert shown.startswith("Below is an instruction that describes a task")
    assert shown.endswith("### Response:\n4<|end|>")
    assert ("### Input:\nsome context\n\n" in shown) == bool(context.get("input"))
    assert ("paired with an input" in shown) == bool(context.get("input"))


def test_alpaca_uses_the_chat_template_if_there_is_one(tmp_path):
    tokenizer = toy_tokenizer()
    row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    (example,), _ = load(write(tmp_path / "a.jsonl", [row]), tokenizer)
    assert text(example, tokenizer) == "<|user|>\nAdd.\n\n2 2<|end|>\n<|assistant|>\n4<|end|>"
    assert trained_text(example, tokenizer) == "4<|end|>"


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_every_answer_of_a_conversation_is_trained_and_nothing_else(tmp_path):
    tokenizer = toy_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, *turns("one", "two", "three", "four", "and?")]
    (example,), report = load(write(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer)
    assert report.format == "chat"
    assert trained_text(example, tokenizer) == "two<|end|>four<|end|>"
    assert text(example, tokenizer) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\none<|end|>\n<|assistant|>\ntwo<|end|>\n"
        "<|user|>\nthree<|end|>\n<|assistant|>\nfour<|end|>"
    )


def test_before_each_answer_stand_the_tokens_the_template_gives_when_asked(tmp_path):
    tokenizer = toy_tokenizer()
    messages = turns("the", "th", "hat", "\nth")
    (example,), _ = load(write(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer)
    for i in (1, 3):
        asked = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
        assert example.input_ids[: len(ids)] == ids
        assert example.labels[len(ids) - 1] == -100
        assert example.labels[len(ids)] != -100


def test_an_answer_that_the_template_does_not_end_gets_an_end(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = toy_tokenizer(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    (example,), _ = load(write(tmp_path / "a.jsonl", [{"messages": turns("a", "b", "c", "d")}]), tokenizer)
    assert trained_text(example, tokenizer) == "b\nd\n<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [{"messages": turns("a", "b")}, {"messages": turns("a", "b", "c", "d")}]
    tokenizer = toy_tokenizer(template)
    examples, report = load(write(tmp_path / "a.jsonl", rows), tokenizer, skip_bad_rows=True)
    assert trained_text(examples[0], tokenizer) == "<think>b<|end|>"
    assert report.skipped == {"the chat template shows earlier turns differently later on": 1}


def test_a_template_that_raises_is_a_bad_row(tmp_path):
    tokenizer = toy_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(IntarsiaError, match=r"line 1: the chat template refuses these messages \(roles must alternate"):
        load(write(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}]), tokenizer)


def test_chat_needs_a_template(tmp_path):
    with pytest.raises(IntarsiaError, match="chat messages need a tokenizer with a chat template"):
        load(write(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}]), toy_tokenizer(chat=None))


def test_a_tokenizer_with_a_beginning_token_begins_raw_text_with_it_and_a_template_does_not(tmp_path):
    from tokenizers import processors

    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", bos), ("<|end|>", end)]
    )
    (raw,), _ = load(write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}]), tokenizer)
    assert text(raw, tokenizer) == "<|start|>ab<|end|>"
    assert trained_text(raw, tokenizer) == "b<|end|>"
    (chat,), _ = load(write(tmp_path / "b.jsonl", [{"messages": turns("a", "b")}]), tokenizer)
    assert bos not in chat.input_ids


def test_format_given_is_obeyed_and_a_wrong_one_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x y", "prompt": "a", "completion": "b"}])
    assert load(path)[1].format == "prompt"
    assert load(path, format="text")[1].format == "text"
    with pytest.raises(IntarsiaError, match="did you mean 'alpaca'"):
        load(path, format="alpacca")


def test_fields_of_no_shape_are_an_error_that_lists_the_shapes(tmp_path):
    with pytest.raises(IntarsiaError, match=r"found 'answer', 'question'.*\n.*\n  alpaca: instruction, output"):
        load(write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}]))


# --- bad rows


BAD = [
    (PROMPTS[0], None),
    ({"prompt": "a"}, r"field 'completion' is missing \(found 'prompt'\)"),
    ({"prompt": "a", "completion": 4}, r"field 'completion' is not text \(found a number: 4\)"),
    ({"prompt": "  ", "completion": "b"}, r"field 'prompt' is empty"),
    ({"prompt": "a", "completion": None}, r"field 'completion' is not text \(found nothing: null\)"),
    ("{'prompt': 'a'}", r"not valid JSON \(Expecting property name"),
    ("[1]", r"not a mapping of fields \(found a list: \[1\]\)"),
    ({"prompt": "a", "completion": "\ud800"}, r"field 'completion' is not valid Unicode"),
    (
        {"prompt": "a" * 60, "completion": "b"},
        r"answer cut off entirely by max_length=50 \(60 tokens stand before",
    ),
    (PROMPTS[1], None),
]


def test_all_bad_rows_are_named_in_one_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [row for row, _ in BAD])
    with pytest.raises(IntarsiaError, match="8 of 10 rows cannot be used") as caught:
        load(path, max_length=50)
    for number, (_, reason) in enumerate(BAD, 1):
        found = re.search(f"line {number}: {reason}", str(caught.value))
        assert bool(found) == (reason is not None), f"line {number}: {caught.value}"
    assert "2 x field 'completion' is not text" in str(caught.value)
    assert "--skip-bad-rows" in str(caught.value)


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [row for row, _ in BAD])
    examples, report = load(path, max_length=50, skip_bad_rows=True)
    assert [e.number for e in examples] == [1, 10]
    assert (report.rows, report.used, sum(report.skipped.values())) == (10, 2, 8)
    assert report.skipped["field 'completion' is not text"] == 2
    assert "skipped 2: field 'completion' is not text" in str(report)


def test_nothing_left_is_an_error_even_when_skipping(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(IntarsiaError, match="No row is left to train on"):
        load(path, skip_bad_rows=True)


def test_a_long_list_of_bad_rows_is_shortened(tmp_path):
    path = write(tmp_path / "a.jsonl", [PROMPTS[0], *[{"prompt": "a", "completion": ""}] * 300])
    with pytest.raises(IntarsiaError, match=r"300 x field 'completion' is empty") as caught:
        load(path)
    assert "... and 290 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 20


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "field 'messages' is not a list of messages"),
        ([], "no message of the assistant"),
        (turns("only the user"), "no message of the assistant"),
        (["hi"], "a message is not a mapping"),
        ([{"role": "user"}], r"in a message, field 'content' is missing \(message 1\)"),
        (
            [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}],
            "did you mean 'assistant'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}, *turns("a", "b")], "field 'content' is not text"),
    ],
)
def test_a_bad_conversation_says_why(tmp_path, messages, reason):
    with pytest.raises(IntarsiaError, match=reason):
        load(write(tmp_path / "a.jsonl", [{"messages": messages}]))


@pytest.mark.parametrize(("line", "reason"), [("a", "fewer values"), ("a,b,c", "more values")])
def test_a_table_row_of_another_width_is_bad(tmp_path, line, reason):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion\na,b\n{line}\n")
    with pytest.raises(IntarsiaError, match=f"line 3: {reason}"):
        load(path)


def test_a_cut_answer_is_counted(tmp_path):
    tokenizer = toy_tokenizer()
    path = write(tmp_path / "a.jsonl", [{"prompt": "abcd", "completion": "efgh"}, {"prompt": "a", "completion": "b"}])
    examples, report = load(path, tokenizer, max_length=6)
    assert report.cut == 1
    assert trained_text(examples[0], tokenizer) == "ef"
    assert "1 rows cut short" in str(report)


# --- split and batches


def examples_of(n: int) -> list[data.Example]:
    return [data.Example(i, [i, i + 1, i + 2], [-100, i + 1, i + 2]) for i in range(n)]


def test_the_split_is_by_seed_and_not_by_order():
    rows = examples_of(100)
    train, held = data.split(rows, 0.1, 0, 50)
    assert len(held) == 10
    assert sorted([*train, *held], key=lambda e: e.number) == rows
    again = data.split(rows[::-1], 0.1, 0, 50)[1]
    assert {e.number for e in again} == {e.number for e in held}
    assert {e.number for e in data.split(rows, 0.1, 1, 50)[1]} != {e.number for e in held}
    assert len(data.split(rows, 0.5, 0, 7)[1]) == 7


def test_equal_rows_stand_on_one_side():
    rows = [data.Example(i, [i % 4, 7], [-100, 7]) for i in range(40)]
    train, held = data.split(rows, 0.1, 0, 50)
    assert held
    assert not {tuple(e.input_ids) for e in train} & {tuple(e.input_ids) for e in held}
    with pytest.raises(IntarsiaError, match="all rows are the same"):
        data.split([data.Example(i, [1, 7], [-100, 7]) for i in range(4)], 0.5, 0, 9)


def test_no_share_holds_nothing_out():
    rows = examples_of(5)
    assert data.split(rows, 0.0, 0, 50) == (rows, [])
    assert data.split(rows[:1], 0.5, 0, 50) == (rows[:1], [])


def test_a_batch_is_padded_on_the_right_and_padding_is_masked():
    rows = [data.Example(1, [5, 6, 7], [-100, 6, 7]), data.Example(2, [8], [8])]
    batch = data.Collator(pad=9)(rows)
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 9]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 6, 7], [8, -100, -100]]))


def test_the_padding_token_is_the_tokenizers_own():
    assert data.collator(toy_tokenizer()).pad == toy_tokenizer().pad_token_id


# --- the view


def test_the_view_shows_what_is_masked_in_brackets(tmp_path):
    tokenizer = toy_tokenizer()
    rows = [{"prompt": "the", "completion": "é\n"}]
    examples, _ = load(write(tmp_path / "a.jsonl", rows), tokenizer)
    assert str(data.show_batch(examples, tokenizer)) == "row 1: 6 tokens, 4 trained\n[th|e]é|\\n\n|<|end|>\n"


def test_the_view_in_colour_has_trained_green_and_masked_grey(tmp_path):
    tokenizer = toy_tokenizer(CHAT)
    examples, _ = load(write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "cd"}]), tokenizer)
    console = Console(force_terminal=True, color_system="standard", width=80)
    with console.capture() as capture:
        console.print(data.show_batch(examples, tokenizer))
    assert "\x1b[32mc" in capture.get()
    assert "\x1b[90ma" in capture.get()
    assert "[a" not in capture.get().replace("\x1b[", "")
    plain = Console(force_terminal=False, width=80)
    with plain.capture() as capture:
        plain.print(data.show_batch(examples, tokenizer))
    assert "[a|b]c|d|<|end|>" in capture.get()


def test_the_view_shows_so_many_rows(tmp_path):
    tokenizer = toy_tokenizer()
    examples, _ = load(write(tmp_path / "a.jsonl", PROMPTS), tokenizer)
    assert str(data.show_batch(examples, tokenizer, rows=2)).count("row ") == 2
