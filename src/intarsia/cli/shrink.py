"""``intarsia shrink MODEL OUT --data FILE``: a model of fewer numbers, what it lost, and which layers gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli import given, terminal
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from torch import nn

    from intarsia.pretrained import Pretrained
    from intarsia.shrink import Factored, Trial
    from intarsia.train.data import Example


def shrink(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a .gguf file, a hub id, or an alias.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the smaller one.")],
    data: Annotated[Path, typer.Option("--data", help="Rows like those that it will be used on.")],
    rank: Annotated[
        float | None, typer.Option("--rank", help="A share of the full rank (0.7), or a number; for all targets.")
    ] = None,
    search: Annotated[
        float | None,
        typer.Option(
            "--search",
            metavar="WORSE",
            help="Instead of a rank: the lowest for each type of layer that makes the perplexity no more than this share worse (0.01).",
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", help="Which layers: all-linear by default, globs, re:...; several times."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Layers to leave whole; several times.")
    ] = None,
    multiple: Annotated[
        int, typer.Option("--multiple", min=1, help="Round ranks up to a multiple of it; GPUs like 128.")
    ] = 1,
    by: Annotated[str, typer.Option("--by", help="outputs (LoRD), or weight, the plain SVD.")] = "outputs",
    format: Annotated[str, typer.Option("--format", help="Shape of the rows: alpaca, chat, prompt, text.")] = "auto",
    rows: Annotated[int, typer.Option("--rows", min=4, help="At most so many rows, every fourth to measure on.")] = 256,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens a row; the rest is cut off.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows a forward pass.")] = 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the shrunk model that stands at OUT.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Shrink a model: its linear layers become two thin ones each (LoRD). Every command takes what comes of it as a model."""
    from intarsia import shrink as room
    from intarsia.bases.thin import RANKS
    from intarsia.interop.output import check_output

    if (rank is None) == (search is None):
        raise IntarsiaError("give either --rank, such as 0.7, or --search, such as 0.01")
    check_output(output, overwrite, "a model with thin layers", marks=(RANKS,))
    with terminal.progress() as progress:
        pretrained = given.load_model(model, progress)
        examples = _examples(data, pretrained, format, rows, max_length)
        look, held_out = [e for i, e in enumerate(examples) if i % 4], examples[::4]

        def measure(model: nn.Module) -> float:
            return _perplexity(model, pretrained, held_out, batch_size)

        known = room.survey(
            pretrained.model, _batches(look, pretrained, batch_size), targets or "all-linear", exclude or (), by=by,
            progress=progress.work,
        )  # fmt: skip
        before = measure(pretrained.model)
        trials: list[Trial] = []
        wanted: Any = rank
        if search is not None:
            wanted, trials = room.choose_shares(
                pretrained.model, known, measure, threshold=search, multiple=multiple, progress=progress.work
            )
        done = room.factorize(pretrained.model, known, wanted, multiple=multiple)
        if not done.thin:
            raise IntarsiaError(
                "no layer would take fewer numbers at these ranks, so nothing is written; give a lower --rank"
            )
        after = measure(pretrained.model)
        written = room.save(pretrained.model, pretrained.tokenizer, output, overwrite=overwrite)
    if json:
        return terminal.print_json(
            {"output": str(written.path), "bytes": written.bytes, "perplexity": {"before": before, "after": after}}
            | {"numbers": {"before": done.before, "after": done.after}, "layers": [asdict(one) for one in done.layers]}
            | {"trials": [asdict(trial) for trial in trials]}
        )
    return _print(output, done, before, after, trials)


def _examples(data: Path, pretrained: Pretrained, format: str, rows: int, max_length: int) -> Sequence[Example]:
    from intarsia.train.data import load_examples

    examples, _ = load_examples(data, pretrained.tokenizer, format=format, max_length=max_length)
    if len(examples) < 4:
        raise IntarsiaError(f"{data} has {len(examples)} rows; at least 4 are needed, to look at and to measure on")
    return examples[:rows]


def _batches(examples: Sequence[Example], pretrained: Pretrained, size: int) -> list[dict[str, Any]]:
    from intarsia.train.data import collator

    collate, device = collator(pretrained.tokenizer), pretrained.model.device
    chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
    return [{k: t.to(device) for k, t in collate(chunk).items()} for chunk in chunks]


def _perplexity(model: nn.Module, pretrained: Pretrained, examples: Sequence[Example], size: int) -> float:
    from intarsia.evaluate import held_out_loss

    return math.exp(held_out_loss(model, pretrained.tokenizer, examples, size))


def _print(output: Path, done: Factored, before: float, after: float, trials: Sequence[Trial]) -> None:
    from rich.table import Table

    out = terminal.output()
    kinds: dict[str, list[Any]] = {}
    for layer in done.layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("layers", "thin", "rank", "numbers", "lost of the outputs"):
        table.add_column(column, no_wrap=True)
    for kind, layers in kinds.items():
        ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
        numbers = f"{sum(layer.before for layer in layers):,} -> {sum(layer.after for layer in layers):,}"
        lost = [layer.lost for layer in layers if layer.rank is not None]
        table.add_row(
            kind, f"{len(lost)} of {len(layers)}", "-".join(str(r) for r in {*ranks[:1], *ranks[-1:]}) or "whole", numbers,
            f"{sum(lost) / len(lost):.2%}" if lost else "",
        )  # fmt: skip
    out.print(table)
    if trials:
        out.print(f"{len(trials)} cuts of one type alone were tried")
    out.print(f"{output}: {done}; perplexity {before:.3f} -> {after:.3f}", soft_wrap=True, markup=False)
