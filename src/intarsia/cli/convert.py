"""``intarsia convert IN OUT --to FORMAT``: adapters in and out of other people's formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli import given, terminal
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from intarsia.interop import Written
    from intarsia.pretrained import Pretrained
    from intarsia.store import Adapter

FORMATS = "peft-lora, peft-shira, weight-patch, full-model, gguf or intarsia"


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The folder of an adapter, ours or PEFT's.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A folder; for weight-patch and gguf a file.")],
    to: Annotated[str, typer.Option("--to", help=f"What to write: {FORMATS}.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The model it was made on; by default the one that our adapters name.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="peft-lora: approximate what is no LoRA by one of this rank, with a loss."),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="weight-patch: write whole weights too, where every entry changes.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="full-model, gguf: float32, float16, bfloat16; by default the base's."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Write an adapter in another format: exactly, or not at all unless the loss is accepted."""
    from intarsia.interop import convert as run

    with terminal.progress() as progress:

        def load(adapter: Adapter | None) -> Pretrained:
            if adapter is None and base is None:
                raise IntarsiaError(f"{source} does not say which weights it belongs to; name the model: --base MODEL")
            named = {adapter.name: adapter} if adapter is not None else {}
            model = base if adapter is None else given.base_of(named, base)
            assert model is not None
            return given.load_model(model, progress, named=base is not None, adapters=list(named))

        written = run(
            source, output, to, load=load, rank=rank, dense=dense, dtype=dtype, overwrite=overwrite, progress=progress.work
        )  # fmt: skip
    if json:
        return terminal.print_json(
            {"output": str(written.path), "to": to, "bytes": written.bytes, "loss": written.loss} | dict(written.facts)
        )
    return _print(written, to)


def _print(written: Written, to: str) -> None:
    from intarsia.train.progress import size

    exact = f"{written.loss:.1%} of the change is lost" if written.loss else "exact"
    facts = ", ".join(f"{key} {value}" for key, value in written.facts.items())
    terminal.output().print(f"{written.path}  {to}, {size(written.bytes)}, {exact}", markup=False, soft_wrap=True)
    if facts:
        terminal.output().print(f"  {facts}", markup=False, soft_wrap=True)
