"""``intarsia compress ADAPTER OUT --to RULE``: a smaller adapter, what that loses, and what every other way would take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli import given, terminal
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from intarsia.compress import Trial
    from intarsia.evaluate import Task
    from intarsia.store import Adapter
    from intarsia.train.progress import Progress

RULES = "ternary, stc, bits, prune, low-rank, prefix or sparse"
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def compress(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Its folder, or NAME@VERSION in the registry.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the smaller one.")],
    to: Annotated[str, typer.Option("--to", help=f"The rule: {RULES}.")],
    density: Annotated[
        list[float] | None,
        typer.Option(
            "--density", help="ternary, stc, prune, sparse: share of the numbers that is kept; several with --search."
        ),
    ] = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(
            "--alpha", help="ternary: size of a number, in standard deviations; several with --search. 1 by default."
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="bits: 1, 2, 4 or 8 for every number.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="low-rank, prefix: of every weight.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="Instead of a density: the most that the folder takes (300kB, 1.5MB), or a share (10%)."
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="ternary: choose density and alpha on every other row of --data, judge on the rest."
        ),
    ] = False,
    balanced: Annotated[
        bool,
        typer.Option(
            "--balanced", help="First make the factors of each low rank alike in size; the change stays the same."
        ),
    ] = False,
    masks: Annotated[
        bool, typer.Option("--masks", help="Store three values as two bit masks: larger, quick to count.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="NAME=FILE", help="Rows to measure the loss on, before and after; several times."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The base for --data; by default the one that it was made on.")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="Shape of the rows: alpaca, chat, prompt, text.")] = "auto",
    rows: Annotated[int | None, typer.Option("--rows", min=2, help="At most so many rows of each file.")] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens a row; the rest is cut off.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows a forward pass.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter that stands at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Compress an adapter: fewer numbers, simpler numbers, or another form; the sizes and the loss before and after."""
    from intarsia import compress as rules
    from intarsia import store
    from intarsia.interop.output import check_output

    most, share = _budget(budget)
    densities = list(density or []) + ([share] if share is not None else [])
    _check(to, densities, alpha, bits, rank, most, search, bool(data))
    folder, files = given.adapter_folder(adapter), _files(data or [])
    if folder.resolve() == output.resolve():
        raise IntarsiaError(f"{output} is what is compressed; choose another place for what comes of it")
    check_output(output, overwrite, "an adapter", marks=(store.HEAD,))
    before = store.read(folder)
    trials: list[Trial] = []
    with terminal.progress() as progress:
        bench = _Bench.load(before, files, model, format, rows, max_length, batch_size, progress) if files else None
        start = rules.balanced(before) if balanced else before
        if search and bench is not None:
            made, trials = bench.search(start, densities, alpha or [])
        else:
            made = rules.compressed(
                start, to, density=densities[0] if densities else None, alpha=alpha[0] if alpha else None, bits=bits,
                rank=rank, budget=most, progress=progress.work,
            )  # fmt: skip
        losses = bench.losses({"before": before, "after": made}, search) if bench is not None else {}
        note = {f"held-out loss, {task}": loss for task, loss in losses.get("after", {}).items()}
        made = replace(made, name=output.resolve().name, note={**made.note, **note})
        error = rules.change_error(before, made)
        sizes = {"float32": rules.folder_bytes(before), "bfloat16": rules.folder_bytes(before.rounded("bfloat16"))}
        store.write(made, output, overwrite, coding="masks" if masks else "compact")
    size = sum((output / name).stat().st_size for name in (store.HEAD, store.TENSORS, store.CARD))
    if json:
        return terminal.print_json(
            {
                "output": str(output),
                "digest": made.digest,
                "steps": made.about["compressed"],
                "bytes": size,
                "before": sizes,
            }
            | {"ratio_32": sizes["float32"] / size, "ratio_16": sizes["bfloat16"] / size, "error": error}
            | {"loss": losses, "trials": [asdict(trial) for trial in trials]}
        )
    return _print(output, made, size, sizes, error, losses, trials)


@dataclass(frozen=True)
class _Bench:
    """A model with adapters at hand, and rows to measure them on."""

    deck: Any
    tokenizer: Any
    tasks: Sequence[Task]
    batch_size: int
    progress: Progress

    @classmethod
    def load(
        cls,
        adapter: Adapter,
        files: Mapping[str, Path],
        model: str | None,
        format: str,
        rows: int | None,
        max_length: int,
        batch_size: int,
        progress: Progress,
    ) -> _Bench:
        from intarsia.deck import Deck
        from intarsia.evaluate import Task
        from intarsia.train.data import load_examples

        pretrained = given.load_base({adapter.name: adapter}, model, progress)
        tasks = []
        for name, path in files.items():
            examples, report = load_examples(path, pretrained.tokenizer, format=format, max_length=max_length)
            progress.say(str(report))
            tasks.append(Task(name, examples[:rows]))
            if len(tasks[-1].examples) < 2:
                raise IntarsiaError(f"{path} has fewer than two rows; with one, nothing can be told")
        return cls(Deck(pretrained.model), pretrained.tokenizer, tasks, batch_size, progress)

    def loss(self, adapter: Adapter | None, pick: slice = slice(None)) -> dict[str, float]:
        """Task -> held-out loss on the rows of a slice; without an adapter that of the base."""
        from intarsia.evaluate import held_out_loss

        if adapter is not None:
            self.deck.add(measured=adapter)
        try:
            if adapter is not None:
                self.deck.use("measured")
            return {
                task.name: held_out_loss(self.deck.model, self.tokenizer, task.examples[pick], self.batch_size)
                for task in self.tasks
            }
        finally:
            self.deck.off()
            if adapter is not None:
                self.deck.remove("measured")

    def losses(self, adapters: Mapping[str, Adapter], search: bool) -> dict[str, dict[str, float]]:
        """What -> task -> loss, of the base too; after a search on the rows that it has not seen."""
        pick = slice(1, None, 2) if search else slice(None)
        found = {"base": self.loss(None, pick)}
        for done, (what, adapter) in enumerate(adapters.items(), 1):
            found[what] = self.loss(adapter, pick)
            self.progress.work(done, len(adapters), f"loss {what}")
        return found

    def search(
        self, adapter: Adapter, densities: Sequence[float], alphas: Sequence[float]
    ) -> tuple[Adapter, list[Trial]]:
        """ComPEFT on the grid, by the mean loss over the tasks on every other row."""
        from intarsia import compress as rules

        def measure(made: Adapter) -> float:
            losses = self.loss(made, slice(0, None, 2))
            return sum(losses.values()) / len(losses)

        return rules.search(adapter, measure, densities or rules.DENSITIES, alphas or rules.ALPHAS, self.progress.work)


def _check(
    to: str,
    densities: list[float],
    alphas: list[float] | None,
    bits: int | None,
    rank: int | None,
    budget: int | None,
    search: bool,
    data: bool,
) -> None:
    from intarsia.compress import check_options

    if search and (to != "ternary" or not data or budget is not None):
        raise IntarsiaError(
            "--search chooses the density and alpha of --to ternary on rows of --data NAME=FILE, without a budget of bytes"
        )
    if not search and (len(densities) > 1 or len(alphas or []) > 1):
        raise IntarsiaError("several densities or alphas are given; --search with --data NAME=FILE chooses among them")
    density = densities[0] if densities else 0.1 if search else None
    check_options(to, density=density, alpha=alphas[0] if alphas else None, bits=bits, rank=rank, budget=budget)


def _budget(text: str | None) -> tuple[int | None, float | None]:
    """Bytes, or a share: ``300kB``, ``1.5MB``, ``20000`` or ``10%``, ``0.1``."""
    if text is None:
        return None, None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%|[kmg]?b)?\s*", text, flags=re.IGNORECASE)
    if found is None or not float(found[1]):
        raise IntarsiaError(
            f"--budget {text}: expected bytes (20000, 300kB, 1.5MB) or a share of the numbers (10%, 0.1)"
        )
    number, unit = float(found[1]), (found[2] or "").lower()
    if unit == "%" or (not unit and number <= 1):
        return None, number / 100 if unit == "%" else number
    return round(number * UNITS[unit]), None


def _files(data: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE, or a file that is named by its stem. All must be there, before a model is loaded."""
    named: dict[str, Path] = {}
    for text in data:
        name, sign, path = text.partition("=")
        if not sign or Path(text).exists():
            name, path = Path(text).stem, text
        if not Path(path).is_file():
            raise IntarsiaError(f"no data file {path}; expected --data NAME=FILE")
        if not name or name in named:
            raise IntarsiaError(
                f"--data {text}: {'two files are named ' + repr(name) if name else 'the name is missing'}; NAME=FILE"
            )
        named[name] = Path(path)
    return named


def _print(
    output: Path,
    made: Adapter,
    size: int,
    sizes: Mapping[str, int],
    error: float | None,
    losses: Mapping[str, Mapping[str, float]],
    trials: Sequence[Trial],
) -> None:
    from rich.table import Table

    from intarsia.train.progress import size as shown

    out = terminal.output()
    say: Callable[[str], None] = lambda text: out.print(text, markup=False, soft_wrap=True)  # noqa: E731
    step = {key: value for key, value in made.about["compressed"][-1].items() if key not in ("to", "from")}
    lost = "" if error is None else f", {error:.1%} of the change lost"
    say(
        f"{output}  {made.about['compressed'][-1]['to']}  "
        + " ".join(f"{k}={v:.4g}" for k, v in step.items() if not isinstance(v, str))
    )
    say(
        f"{shown(size)}: {sizes['float32'] / size:.1f}x smaller than in 32 bits ({shown(sizes['float32'])}), "
        f"{sizes['bfloat16'] / size:.1f}x than in 16 bits{lost}"
    )
    if trials:
        say(
            f"the best of {len(trials)} densities and alphas, chosen on every other row; the losses are those of the rest"
        )
    if losses:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("held-out loss", no_wrap=True)
        for what in losses:
            table.add_column(what, justify="right")
        table.add_column("change", justify="right")
        for task in losses["base"]:
            change = losses["after"][task] - losses["before"][task]
            table.add_row(task, *(f"{losses[what][task]:.4f}" for what in losses), f"{change:+.4f}")
        out.print(table)
