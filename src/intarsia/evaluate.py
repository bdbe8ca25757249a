"""How good a model is: the loss on held-out answers, what it answers, and the table of adapters against tasks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from intarsia.errors import IntarsiaError
from intarsia.train.data import IGNORED, SHAPES, BadRow, Example, Row, collator, encode, encode_row, read_rows

T = TypeVar("T")

BASE = "base"  # the row of the matrix without any adapter

Measure = Callable[[Sequence[str], Sequence[str]], float]
Progress = Callable[[int, int, str], None]  # done, all, what


def encode_pairs(
    pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int = 512
) -> list[Example]:
    """(prompt, completion) pairs, encoded exactly as rows of those two fields are for training.

    Raises:
        IntarsiaError: naming the first pair that is empty or does not fit into ``max_length`` tokens.
    """
    examples = []
    for number, (prompt, completion) in enumerate(pairs, 1):
        row = Row(number, {"prompt": prompt, "completion": completion})
        try:
            examples.append(encode_row(row, SHAPES["prompt"], tokenizer, max_length)[0])
        except BadRow as bad:
            raise IntarsiaError(f"pair {number}: {bad}") from None
    return examples


def held_out_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], batch_size: int = 32
) -> float:
    """Mean cross entropy (nats) over all answer tokens of all examples; computed in float32, without dropout.

    Every token weighs the same, so the batch size changes nothing but rounding. The model's mode is as before.

    Raises:
        IntarsiaError: when there is no answer token to measure.
    """
    return answer_loss(*answer_sums(model, tokenizer, examples, batch_size))


def answer_loss(total: float, count: int) -> float:
    """The mean loss of the sums of :func:`answer_sums`."""
    if not count:
        raise IntarsiaError("held-out loss: there is no answer token in the examples")
    return total / count


@torch.no_grad()
def answer_sums(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], batch_size: int = 32
) -> tuple[float, int]:
    """(cross entropy summed over all answer tokens, their number); see :func:`held_out_loss`."""
    collate, device = collator(tokenizer), _device(model)
    total, count = 0.0, 0
    with _evaluating(model):
        for batch_of in _batches(sorted(examples, key=lambda e: len(e.input_ids)), batch_size):
            batch = {name: tensor.to(device) for name, tensor in collate(batch_of).items()}
            labels = batch.pop("labels")[:, 1:]  # (B, T-1): what each position is to predict
            logits = model(**batch).logits[:, :-1]  # (B, T-1, V)
            answer = labels != IGNORED
            total += F.cross_entropy(logits[answer].float(), labels[answer], reduction="sum").item()
            count += int(answer.sum())
    return total, count


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> list[str]:
    """What the model answers to each prompt, in their order: greedy, up to the first line break or end of text.

    Prompts are padded on the left and masked, so each answer is that of the prompt alone (up to rounding).
    """
    pad = collator(tokenizer).pad
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=_stops(tokenizer),
    )
    encoded = [encode([(prompt, False)], tokenizer, bos=True)[0] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    answers = [""] * len(prompts)
    with _evaluating(model):
        for rows in _batches(order, batch_size):
            width = max(len(encoded[i]) for i in rows)
            ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in rows])
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in rows])
            device = _device(model)
            out: Tensor = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = str(text).partition("\n")[0].strip()
    return answers


# ------------------------------------------------------------------------------------------------------ matrix


@dataclass(frozen=True)
class Task:
    """What adapters are measured on: encoded answers, and, where given, prompts with references and a measure."""

    name: str
    examples: Sequence[Example]
    prompts: Sequence[str] = ()
    references: Sequence[str] = ()
    measure: Measure | None = None
    measure_name: str = ""
    higher_is_better: bool = True
    max_new_tokens: int = 32


def answerable(task: Task, path: str | Path, format: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task with its prompts and the right answers, measured by the share that is right to the letter.

    Args:
        path: the file that the task's examples were read from.
        format: the shape of its rows; those of prompt and completion have an answer that can be right.

    Raises:
        IntarsiaError: for rows of another shape.
    """
    if format != "prompt":
        raise IntarsiaError(f"{path}: answers need rows of prompt and completion, and these are {format}")
    fields = {row.number: row.fields for row in read_rows(path)}
    prompts, references = [], []
    for example in task.examples:
        found = fields[example.number]
        assert not isinstance(found, BadRow)  # those are not among the examples
        pieces = SHAPES["prompt"].pieces(found, tokenizer)
        prompts.append("".join(text for text, trained in pieces if not trained))
        references.append(str(found["completion"]).strip())
    longest = max(example.trained for example in task.examples)
    return replace(
        task, prompts=prompts, references=references, measure=right, measure_name="right", max_new_tokens=longest + 1
    )


def right(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that are right to the letter; a reference counts with its first line, where answers end."""
    pairs = zip(answers, references, strict=True)
    return sum(answer.strip() == reference.partition("\n")[0].strip() for answer, reference in pairs) / len(references)


@dataclass(frozen=True)
class Cell:
    """One adapter on one task."""

    loss: float
    score: float | None = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """Adapters (rows) against tasks (columns)."""

    adapters: tuple[str, ...]
    tasks: tuple[str, ...]
    measures: Mapping[str, tuple[str, bool]]  # task -> name of its measure, whether higher is better
    cells: Mapping[tuple[str, str], Cell] = field(repr=False)  # (adapter, task)

    def __getitem__(self, key: tuple[str, str]) -> Cell:
        return self.cells[key]

    def best(self, task: str, what: str = "loss", among: Iterable[str] | None = None) -> str:
        """The adapter that does best on the task, by ``loss`` or by ``score``."""
        rows = [a for a in (self.adapters if among is None else among) if getattr(self[a, task], what) is not None]
        up = what == "score" and self.measures[task][1]
        return (max if up else min)(rows, key=lambda adapter: getattr(self[adapter, task], what))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: losses and scores as ``{adapter: {task: number}}``."""
        return {
            "adapters": list(self.adapters),
            "tasks": list(self.tasks),
            "measures": {t: {"name": n, "higher_is_better": up} for t, (n, up) in self.measures.items()},
            "loss": {a: {t: self[a, t].loss for t in self.tasks} for a in self.adapters},
            "score": {a: {t: self[a, t].score for t in self.tasks} for a in self.adapters},
        }

    def table(self) -> Table:
        """For the terminal: held-out loss, the task's own measure beside it, the best of each column in bold."""
        table = Table(title="held-out loss, and each task's own measure", title_justify="left")
        table.add_column("adapter", no_wrap=True)
        for task in self.tasks:
            name, up = self.measures[task]
            table.add_column(f"{task}\nloss" + (f" · {name} {'↑' if up else '↓'}" if name else ""), justify="right")
        for adapter in self.adapters:
            cells = [self._shown(adapter, task) for task in self.tasks]
            table.add_row(adapter, *cells, end_section=adapter == BASE)
        return table

    def _shown(self, adapter: str, task: str) -> str:
        cell = self[adapter, task]

        def bold(text: str, what: str) -> str:
            best = self[self.best(task, what), task]
            return f"[bold green]{text}[/]" if getattr(cell, what) == getattr(best, what) else text

        loss = bold(f"{cell.loss:.3f}", "loss")
        return loss if cell.score is None else f"{loss} · {bold(f'{cell.score:.3f}', 'score')}"


def matrix(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    adapters: Sequence[str],
    use: Callable[[str | None], None],
    *,
    batch_size: int = 32,
    generate_for: Callable[[str, str], bool] | None = None,
    progress: Progress | None = None,
) -> Matrix:
    """Measure the base and every adapter on every task.

    Args:
        use: makes one adapter act, or none for the base; called once a row. It is called with None at the end.
        generate_for: (adapter, task) -> whether to let the model answer there; by default wherever there is a measure.
    """
    rows = (BASE, *adapters)
    cells: dict[tuple[str, str], Cell] = {}
    try:
        for adapter in rows:
            use(None if adapter == BASE else adapter)
            for task in tasks:
                wanted = task.measure is not None and (generate_for is None or generate_for(adapter, task.name))
                cells[adapter, task.name] = evaluate(model, tokenizer, task, batch_size, answer=wanted)
                if progress:
                    progress(len(cells), len(rows) * len(tasks), f"{adapter} on {task.name}")
    finally:
        use(None)
    measures = {task.name: (task.measure_name, task.higher_is_better) for task in tasks}
    return Matrix(rows, tuple(task.name for task in tasks), measures, cells)


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, batch_size: int = 32, *, answer: bool = True
) -> Cell:
    """The model as it is now on one task; ``answer=False`` leaves out generation and its measure."""
    loss = held_out_loss(model, tokenizer, task.examples, batch_size)
    if not answer or task.measure is None:
        return Cell(loss)
    answers = generate(model, tokenizer, task.prompts, task.max_new_tokens, batch_size)
    return Cell(loss, task.measure(answers, task.references), tuple(answers))


# ------------------------------------------------------------------------------------------------------ pieces


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode again outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


_STOPS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, list[int]] = weakref.WeakKeyDictionary()


def _stops(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: end of text, and all that hold a line break. Kept: they take a while to find."""
    if tokenizer not in _STOPS:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        _STOPS[tokenizer] = ends + [i for i, text in enumerate(texts) if "\n" in text and i not in ends]
    return _STOPS[tokenizer]
