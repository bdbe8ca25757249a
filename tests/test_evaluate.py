"""Evaluation: the loss is the one computed by hand, a batch answers like each prompt alone, the matrix reads right."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console

from intarsia import evaluate
from intarsia.errors import IntarsiaError
from intarsia.evaluate import BASE, Cell, Matrix, Task, encode_pairs, generate, held_out_loss, matrix
from toy import toy_model, toy_tokenizer

PAIRS = [("one ->", " two"), ("a longer prompt ->", " x"), ("b", " the answer is long")]


def test_loss_is_the_mean_over_answer_tokens_and_the_end() -> None:
    model, tokenizer = toy_model().train(), toy_tokenizer()
    total, count = 0.0, 0
    model.eval()
    for prompt, completion in PAIRS:  # by hand, one at a time, no padding, from probabilities
        before = tokenizer(prompt)["input_ids"]
        answer = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            chances = model(torch.tensor([before + answer])).logits[0].double().softmax(-1)
        for place, token in enumerate(answer, len(before) - 1):
            total -= math.log(chances[place, token].item())
            count += 1
    found = [held_out_loss(model, tokenizer, encode_pairs(PAIRS, tokenizer), size) for size in (1, 2, 16)]
    assert found == pytest.approx([total / count] * 3, rel=1e-5)


def test_loss_leaves_mode_and_gradients_as_they_were() -> None:
    model, tokenizer = toy_model().train(), toy_tokenizer()
    model.model.layers[0].eval()
    held_out_loss(model, tokenizer, encode_pairs(PAIRS, tokenizer))
    assert model.training
    assert not model.model.layers[0].training
    assert all(p.grad is None for p in model.parameters())


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(IntarsiaError, match="no answer token"):
        held_out_loss(toy_model(), toy_tokenizer(), [])


def test_a_pair_without_an_answer_is_named() -> None:
    with pytest.raises(IntarsiaError, match="pair 2: field 'completion' is empty"):
        encode_pairs([("a", " b"), ("a", " ")], toy_tokenizer())


def test_a_batch_answers_like_each_prompt_alone() -> None:
    model, tokenizer = toy_model(seed=3), toy_tokenizer()
    prompts = ["a", "a much longer prompt than that", "mid size", "zz", "the"]
    alone = [generate(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, 12, batch_size=5) == alone
    assert generate(model, tokenizer, prompts, 12, batch_size=2) == alone
    assert len(set(alone)) > 1


def test_generation_is_greedy_and_ends_at_a_line_break() -> None:
    model, tokenizer, prompt = toy_model(seed=3), toy_tokenizer(), "a much longer prompt"
    newline = tokenizer("\n")["input_ids"][0]
    with torch.no_grad():
        model.lm_head.weight[[newline, tokenizer.eos_token_id]] = 0.0  # this model says neither
        tokens = tokenizer(prompt)["input_ids"]
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    said = tokens[-12:]
    assert generate(model, tokenizer, [prompt], 12) == [tokenizer.decode(said, skip_special_tokens=True).strip()]

    third = next(token for token in said[2:] if token not in said[:2])  # and now it says a line break in its place
    with torch.no_grad():
        model.lm_head.weight[[third, newline]] = model.lm_head.weight[[newline, third]].clone()
    until = tokenizer.decode(said[: said.index(third)], skip_special_tokens=True)
    assert generate(model, tokenizer, [prompt], 12) == [until.strip()]
    assert evaluate._stops(tokenizer) == [tokenizer.eos_token_id, newline]


@pytest.fixture
def small() -> Matrix:
    cells = {
        (BASE, "a"): Cell(3.0, 0.1),
        (BASE, "b"): Cell(4.0, 0.9, ("x",)),
        ("one", "a"): Cell(1.0, 0.8),
        ("one", "b"): Cell(3.5, 0.95),
        ("two", "a"): Cell(2.0, None),
        ("two", "b"): Cell(1.5, 0.2),
    }
    return Matrix((BASE, "one", "two"), ("a", "b"), {"a": ("hits", True), "b": ("errors", False)}, cells)


def test_best_follows_the_direction_of_the_measure(small: Matrix) -> None:
    assert (small.best("a"), small.best("b")) == ("one", "two")
    assert small.best("a", "score") == "one"  # higher is better, and what was not measured is not the best
    assert small.best("b", "score") == "two"  # lower is better
    assert small.best("b", "loss", among=[BASE, "one"]) == "one"


def test_a_matrix_is_plain_json_and_a_table(small: Matrix) -> None:
    plain = json.loads(json.dumps(small.to_dict()))
    assert plain["loss"]["one"] == {"a": 1.0, "b": 3.5}
    assert plain["score"]["two"] == {"a": None, "b": 0.2}
    assert plain["measures"]["b"] == {"name": "errors", "higher_is_better": False}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(small.table())
    text = console.export_text()
    console.file.close()
    assert "hits ↑" in text
    assert "errors ↓" in text
    assert "1.500 · 0.200" in text


def test_matrix_switches_once_a_row_and_ends_at_the_base() -> None:
    model, tokenizer = toy_model(), toy_tokenizer()
    examples = encode_pairs(PAIRS, tokenizer)
    prompts, answers = [p for p, _ in PAIRS], [c for _, c in PAIRS]
    tasks = [
        Task("told", examples, prompts, answers, lambda p, r: float(len(p)), "number", max_new_tokens=2),
        Task("silent", examples[:1]),
    ]
    used: list[str | None] = []
    steps: list[tuple[int, int]] = []
    found = matrix(
        model, tokenizer, tasks, ["x"], used.append,
        generate_for=lambda adapter, task: adapter == "x", progress=lambda done, of, what: steps.append((done, of)),
    )  # fmt: skip
    assert used == [None, "x", None]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found[BASE, "told"].score is None
    assert found["x", "told"].score == 3.0
    assert len(found["x", "told"].answers) == 3
    assert found["x", "silent"].score is None
    assert found["x", "told"].loss == pytest.approx(held_out_loss(model, tokenizer, examples))


def test_matrix_gives_the_base_back_when_something_fails() -> None:
    used: list[str | None] = []
    with pytest.raises(IntarsiaError, match="no answer token"):
        matrix(toy_model(), toy_tokenizer(), [Task("empty", [])], ["x"], used.append)
    assert used == [None, None]
