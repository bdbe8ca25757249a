"""Training data: rows from a file, checked one by one, and encoded with the loss on the answer only.

Shapes (found out from the fields, or given as ``format``):

    alpaca   {"instruction", "input" (may be absent or empty), "output"}
    chat     {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content"}, ...]}
    prompt   {"prompt", "completion"}
    text     {"text"}

Files: .jsonl, .json (a list, or lines), .csv, .tsv, .parquet. Other fields of a row are ignored. A row is
named by its line (jsonl, csv, tsv) or its place in the list (json, parquet), counted from 1; the header of a
csv file is line 1.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from intarsia.errors import IntarsiaError, nearest

IGNORED = -100  # the label that cross entropy leaves out
SHOWN = 10  # bad rows listed one by one in an error; the rest is counted

ALPACA = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)

Piece = tuple[str, bool]  # a stretch of text, and whether it is trained


class BadRow(Exception):
    """Why one row cannot be used. ``reason``: what rows are counted by; ``detail``: what this one holds."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Row:
    """One row as it came: its number in the file and its fields, or what made it unreadable."""

    number: int
    fields: dict[str, Any] | BadRow


@dataclass(frozen=True)
class Example:
    """One encoded row: ``input_ids`` and as many ``labels``, IGNORED where nothing is trained."""

    number: int
    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Tokens that carry loss. The first token of a row is never predicted, so it never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class DataReport:
    """What became of the rows of one file."""

    path: str
    format: str
    rows: int = 0
    used: int = 0
    cut: int = 0  # rows whose end was cut off by the length limit
    tokens: int = 0
    trained_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.used} of {self.rows} rows used ({self.format})"]
        parts.append(f"{self.tokens} tokens, {self.trained_tokens} of them trained")
        parts += [f"{self.cut} rows cut short by the length limit"] if self.cut else []
        parts += [f"skipped {n}: {reason}" for reason, n in self.skipped.items()]
        return "; ".join(parts)


# --- shapes -------------------------------------------------------------------------------------------------


def _say(value: object) -> str:
    kinds = {
        type(None): "nothing",
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
    }
    return f"{kinds.get(type(value), 'a mapping')}: {json.dumps(value, default=str)[:40]}"


def _words(fields: dict[str, Any], name: str, *, optional: bool = False) -> str:
    """The text in one field of a row."""
    value = fields.get(name)
    if optional and value is None:
        return ""
    if name not in fields:
        raise BadRow(f"field {name!r} is missing", f"found {', '.join(map(repr, fields)) or 'no fields'}")
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is not text", f"found {_say(value)}")
    if not optional and not value.strip():
        raise BadRow(f"field {name!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f"field {name!r} is not valid Unicode", "half of a surrogate pair")
    return value


ROLES = ("system", "developer", "user", "assistant", "tool")


def _turns(fields: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a chat up to the assistant's last one (nothing could be learnt from what follows)."""
    messages = fields.get("messages")
    if "messages" not in fields:
        raise BadRow("field 'messages' is missing", f"found {', '.join(map(repr, fields)) or 'no fields'}")
    if not isinstance(messages, list):
        raise BadRow("field 'messages' is not a list of messages", f"found {_say(messages)}")
    turns = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRow("a message is not a mapping with 'role' and 'content'", f"message {i}: {_say(message)}")
        try:
            role, content = _words(message, "role"), _words(message, "content")
        except BadRow as bad:
            raise BadRow(f"in a message, {bad.reason}", f"message {i}") from None
        if role not in ROLES:
            raise BadRow("a message has an unknown role", f"message {i}: {role!r}; {nearest(role, ROLES)}")
        turns.append({"role": role, "content": content})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise BadRow("no message of the assistant to learn from")
    return turns


def _chat_pieces(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The rendered chat, cut where an answer begins and ends.

    The chat template is rendered for every prefix of the conversation: with its invitation to answer before
    each turn of the assistant, and with the turn itself. A template that shows earlier turns differently once
    more turns follow has no such cuts, and the row is refused rather than masked by guess.
    """

    def render(upto: int, invite: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(turns[:upto], tokenize=False, add_generation_prompt=invite)
        except Exception as error:  # a template is a program of somebody else's and raises what it likes
            raise BadRow("the chat template refuses these messages", str(error).strip()[:80]) from None
        return str(text)

    full, pieces, at = render(len(turns), False), [], 0
    special = tuple(set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab()))
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False)
        if not (after.startswith(before) and full.startswith(after) and len(before) >= at):
            raise BadRow("the chat template shows earlier turns differently later on", "give rows of a single answer")
        answer = after[len(before) :]
        # What a template writes after its end-of-turn token (mostly a newline) is never generated, so not
        # trained.
        ending = answer.rstrip() if answer.rstrip().endswith(special) else answer
        pieces += [(before[at:], False), (ending, True)]
        at = len(before) + len(ending)
    if not pieces[-1][0].endswith(special):
        pieces.append((str(tokenizer.eos_token or ""), True))
    return [piece for piece in pieces if piece[0]]  # the rest of the text, after the last answer, teaches nothing


def _alpaca(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    instruction, output = _words(fields, "instruction"), _words(fields, "output")
    context = _words(fields, "input", optional=True)
    if tokenizer.chat_template:
        user = f"{instruction}\n\n{context}" if context.strip() else instruction
        return _chat_pieces([{"role": "user", "content": user}, {"role": "assistant", "content": output}], tokenizer)
    prompt = ALPACA.format(
        instruction=instruction,
        with_input=", paired with an input that provides further context" if context.strip() else "",
        input=f"### Input:\n{context}\n\n" if context.strip() else "",
    )
    return [(prompt, False), (output, True), (str(tokenizer.eos_token or ""), True)]


def _chat(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    return _chat_pieces(_turns(fields), tokenizer)


def _prompt(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    prompt, completion = _words(fields, "prompt"), _words(fields, "completion")
    return [(prompt, False), (completion, True), (str(tokenizer.eos_token or ""), True)]


def _text(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    return [(_words(fields, "text"), True), (str(tokenizer.eos_token or ""), True)]


@dataclass(frozen=True)
class Shape:
    """One way to write a row: the fields it needs, and the pieces of text it becomes."""

    needs: tuple[str, ...]
    pieces: Callable[[dict[str, Any], PreTrainedTokenizerBase], list[Piece]]


SHAPES = {
    "chat": Shape(("messages",), _chat),
    "alpaca": Shape(("instruction", "output"), _alpaca),
    "prompt": Shape(("prompt", "completion"), _prompt),
    "text": Shape(("text",), _text),
}


def find_format(rows: Sequence[Row], path: str | Path) -> str:
    """The shape whose fields most rows have. Rows of another shape are bad rows later on."""
    fields = [row.fields for row in rows if isinstance(row.fields, dict)]
    if not fields:
        return "text"  # nothing readable: the error to come is about the rows, not about their shape
    score = {name: sum(all(f in row for f in shape.needs) for row in fields) for name, shape in SHAPES.items()}
    best = max(score, key=lambda name: score[name])
    if not score[best]:
        found = sorted({name for row in fields for name in row})
        known = "\n".join(f"  {name}: {', '.join(shape.needs)}" for name, shape in SHAPES.items())
        raise IntarsiaError(
            f"{path}: no row has the fields of a known shape; found "
            f"{', '.join(map(repr, found[:12])) or 'no fields'}. Shapes and the fields they need:\n{known}"
        )
    return best


# --- files --------------------------------------------------------------------------------------------------


def _fields(value: object) -> dict[str, Any] | BadRow:
    return value if isinstance(value, dict) else BadRow("not a mapping of fields", f"found {_say(value)}")


def _parse(line: bytes) -> dict[str, Any] | BadRow:
    try:
        return _fields(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError:
        return BadRow("not UTF-8 text")
    except json.JSONDecodeError as error:
        return BadRow("not valid JSON", f"{error.msg} at column {error.colno}")


def _json_rows(path: Path) -> Iterator[Row]:
    data = path.read_bytes()
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        try:
            items = json.loads(data.decode("utf-8-sig"))
        except ValueError as error:
            raise IntarsiaError(f"{path}: not valid JSON: {error}") from None
        for number, item in enumerate(items, 1):
            yield Row(number, _fields(item))
    else:
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if line.strip():
                yield Row(number, _parse(line.strip()))


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IntarsiaError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        repeated = [name for name, n in Counter(reader.fieldnames or []).items() if n > 1]
        if repeated:
            raise IntarsiaError(f"{path}: the header names {', '.join(map(repr, repeated))} more than once")
        for fields in reader:
            extra = fields.pop(None, None)
            values = [value for value in fields.values() if value is not None]
            problem = "more values than the header has" if extra else "fewer values than the header has"
            broken = bool(extra) or len(values) < len(fields)
            inside = sum(value.count("\n") for value in values)  # a quoted value may go over several lines
            yield Row(reader.line_num - inside, BadRow(problem) if broken else dict(fields))
    except csv.Error as error:
        raise IntarsiaError(f"{path}: not a valid table near line {reader.line_num}: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise IntarsiaError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise IntarsiaError(f"{path}: not a readable parquet file: {error}") from None
    for number, fields in enumerate(table.to_pylist(), 1):
        yield Row(number, fields)


READERS = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a data file, not yet checked against a shape. A missing or empty file is an error."""
    path = Path(path)
    if not path.is_file():
        where = "" if path.is_absolute() else f" (looked for from the current folder, {Path.cwd()})"
        near = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        hint = f"; {nearest(path.name, near)}" if near and "did you mean" in nearest(path.name, near) else ""
        raise IntarsiaError(f"no data file {str(path)!r}{where}{hint}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise IntarsiaError(
            f"{path}: cannot read data from a {path.suffix or 'nameless'} file; use {', '.join(READERS)}"
        )
    rows = list(reader(path))
    if not rows:
        raise IntarsiaError(f"{path}: no rows in this file")
    return rows


# --- encoding -----------------------------------------------------------------------------------------------


def encode(pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, *, bos: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row. ``bos``: begin with the beginning token if the tokenizer does so itself.

    Every piece begins on a token of its own, so that the tokens before an answer are those of the prompt
    alone, as they will be when the model is asked. Tokens of the text as a whole are taken wherever they
    agree with that.
    """
    head = [tokenizer.bos_token_id] if bos and _begins_with_bos(tokenizer) else []
    ids: list[int] = list(head)
    labels: list[int] = [IGNORED] * len(head)
    text = ""
    for piece, trained in pieces:
        text += piece
        whole = head + tokenizer(text, add_special_tokens=False)["input_ids"]
        more = whole[len(ids) :]
        if whole[: len(ids)] != ids:
            more = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += more
        labels += more if trained else [IGNORED] * len(more)
    return ids, labels


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def encode_row(row: Row, shape: Shape, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Example, bool]:
    """One row as an example, and whether its end was cut off. Raises BadRow."""
    if isinstance(row.fields, BadRow):
        raise row.fields
    pieces = shape.pieces(row.fields, tokenizer)
    templated = shape is SHAPES["chat"] or (shape is SHAPES["alpaca"] and bool(tokenizer.chat_template))
    ids, labels = encode(pieces, tokenizer, bos=not templated)  # a template writes its own beginning
    example = Example(row.number, ids[:max_length], labels[:max_length])
    if not example.trained:
        if len(ids) > max_length:
            before = next(i for i, label in enumerate(labels) if label != IGNORED)
            raise BadRow(f"answer cut off entirely by max_length={max_length}", f"{before} tokens stand before it")
        raise BadRow("nothing to train: a single token")
    return example, len(ids) > max_length


def load_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    max_length: int = 512,
    skip_bad_rows: bool = False,
) -> tuple[list[Example], DataReport]:
    """Read, check and encode a data file.

    Every bad row is found before anything is said: one error lists them with their numbers and counts the
    reasons. ``skip_bad_rows`` leaves them out instead and counts them in the report; a file with no good row
    is always an error.
    """
    rows = read_rows(path)
    if format != "auto" and format not in SHAPES:
        raise IntarsiaError(f"data.format: unknown format {format!r}; {nearest(format, [*SHAPES, 'auto'])}")
    name = find_format(rows, path) if format == "auto" else format
    if name == "chat" and not tokenizer.chat_template:
        raise IntarsiaError(
            f"{path}: chat messages need a tokenizer with a chat template, and this model's has none; "
            "give the rows as prompt and completion instead"
        )
    report = DataReport(str(path), name, rows=len(rows))
    examples: list[Example] = []
    bad: list[tuple[int, BadRow]] = []
    for row in rows:
        try:
            example, cut = encode_row(row, SHAPES[name], tokenizer, max_length)
        except BadRow as error:
            bad.append((row.number, error))
        else:
            examples.append(example)
            report.cut += cut
    report.used = len(examples)
    report.tokens = sum(len(e.input_ids) for e in examples)
    report.trained_tokens = sum(e.trained for e in examples)
    report.skipped = dict(Counter(error.reason for _, error in bad).most_common())
    if bad and (not skip_bad_rows or not examples):
        raise IntarsiaError(_complaint(report, bad))
    return examples, report


def _complaint(report: DataReport, bad: list[tuple[int, BadRow]]) -> str:
    row = "line" if Path(report.path).suffix.lower() in (".jsonl", ".csv", ".tsv") else "row"
    lines = [f"{report.path}: {len(bad)} of {report.rows} rows cannot be used (read as {report.format})"]
    lines += [f"  {n} x {reason}" for reason, n in report.skipped.items()]
    lines += [f"  {row} {number}: {error}" for number, error in bad[:SHOWN]]
    lines += [f"  ... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    if report.used:
        lines.append("Correct them, or leave them out with --skip-bad-rows (data.skip_bad_rows: true).")
    else:
        lines.append("No row is left to train on.")
    return "\n".join(lines)


def split(examples: list[Example], share: float, seed: int, most: int) -> tuple[list[Example], list[Example]]:
    """(train, eval): about ``share`` of the rows, at most ``most`` and at least one, held out by seed.

    Rows are drawn by a hash of what they hold, so that two equal rows never stand on different sides, and the
    choice depends neither on their order in the file nor on any library's random generator.
    """
    if not share or len(examples) < 2:
        return examples, []

    def key(example: Example) -> bytes:
        return hashlib.sha256(f"{seed} {example.input_ids} {example.labels}".encode()).digest()

    keys = [key(example) for example in examples]
    count = min(max(1, round(share * len(examples))), most)
    last = sorted(keys)[count - 1]
    train = [e for e, k in zip(examples, keys, strict=True) if k > last]
    if not train:
        raise IntarsiaError("holding out rows for evaluation leaves none to train on: all rows are the same")
    return train, [e for e, k in zip(examples, keys, strict=True) if k <= last]


@dataclass(frozen=True)
class Collator:
    """Examples -> one batch of tensors (B, T), padded on the right to the longest row."""

    pad: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        width = max(len(e.input_ids) for e in examples)

        def padded(rows: Iterable[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])  # (B, T)

        return {
            "input_ids": padded((e.input_ids for e in examples), self.pad),
            "attention_mask": padded(([1] * len(e.input_ids) for e in examples), 0),
            "labels": padded((e.labels for e in examples), IGNORED),
        }


def collator(tokenizer: PreTrainedTokenizerBase) -> Collator:
    """The collator that pads with the tokenizer's own padding token (masked anyway, whichever it is)."""
    known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None]
    return Collator(int(known[0]))


# --- what is trained ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchView:
    """What is trained and what is masked, token by token; print it with rich, or as plain text with ``str``.

    In colour the trained tokens are green and the masked ones dim; without colour the masked ones stand in
    [brackets].
    """

    examples: Sequence[Example]
    tokenizer: PreTrainedTokenizerBase

    def _tokens(self, example: Example) -> Iterator[tuple[str, bool]]:
        ids: list[int] = []
        for i, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True)):
            ids.append(token)
            text = str(self.tokenizer.decode(ids))
            last = i + 1 == len(example.labels) or (example.labels[i + 1] == IGNORED) != (label == IGNORED)
            if "\ufffd" not in text or len(ids) == 4 or last:  # a character may take up to four byte tokens
                yield text, label != IGNORED and i > 0
                ids = []

    def _lines(self, colour: bool) -> Iterator[Text]:
        for example in self.examples:
            head = f"row {example.number}: {len(example.input_ids)} tokens, {example.trained} trained"
            line = Text().append(head + "\n", style="bold" if colour else "")
            was: bool | None = None
            for text, trained in self._tokens(example):
                if trained != was and not colour:
                    line.append(("]" if was is False else "") + ("[" if not trained else ""))
                elif was is not None:
                    line.append("|", style="bright_black" if colour else "")
                shown = text.replace("\r", "\\r").replace("\n", "\\n\n")
                line.append(shown, style=("green" if trained else "bright_black") if colour else "")
                was = trained
            line.append("]" if was is False and not colour else "")
            yield line.append("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._lines(colour=console.color_system is not None and not console.no_color)

    def __str__(self) -> str:
        return "\n".join(line.plain for line in self._lines(colour=False))


def show_batch(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, rows: int = 4) -> BatchView:
    """A view of the first ``rows`` examples."""
    return BatchView(examples[:rows], tokenizer)
