"""``intarsia merge CONFIG.yaml --search NAME=FILE``: the weights of a merge, found on rows of every adapter's skill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.cli import given, reporting, terminal
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from intarsia.cli.reporting import Asked
    from intarsia.merge import Plan, Recipe
    from intarsia.merge.search import Outcome, Task
    from intarsia.merge.search_config import SearchConfig
    from intarsia.pretrained import Pretrained
    from intarsia.store import Adapter
    from intarsia.train.data import Example
    from intarsia.train.progress import Progress


def wanted(
    recipe: Recipe, data: Sequence[str], trials: int | None, objective: str | None, restart: bool, asked: Asked
) -> SearchConfig | None:
    """The section ``search`` of the recipe with what the command line says on top; None where no search is asked for.

    Rows to measure on after the merge (``--data``) are those that the search is reported on.

    Raises:
        IntarsiaError: for NAME=FILE that is none, a name given twice, and options of a search where there is none.
    """
    from intarsia.merge.search_config import SearchConfig
    from intarsia.train.config import validated

    if recipe.search is None and not data:
        options = {"--trials": trials, "--objective": objective, "--restart": restart or None}
        if unused := [option for option, value in options.items() if value is not None]:
            raise IntarsiaError(
                f"{', '.join(unused)} is about a search; say on which rows: --search NAME=FILE, one of each adapter"
            )
        return None
    if asked.others or asked.rows is not None:
        raise IntarsiaError(
            "--other and --rows are about a merge without a search; measure on other text afterwards (intarsia eval), and let "
            "trials see fewer rows by search.rows=N"
        )
    tree = {} if recipe.search is None else recipe.search.model_dump()
    tree |= {"held_out": {name: str(file) for name, file in asked.skills.items()}} if asked.skills else {}
    tree |= {"data": {**tree.get("data", {}), **given.named_files("--search", data)}}
    tree |= {k: v for k, v in {"trials": trials, "objective": objective}.items() if v is not None}
    return validated(SearchConfig, tree, "search")


def check(ready: Plan, config: SearchConfig) -> None:
    """Raise IntarsiaError for whatever can be known to fail before a model is loaded."""
    from intarsia.merge.search import check_installed, check_skills

    check_installed()
    check_skills(ready.adapters, config.data)
    if config.held_out:
        check_skills(ready.adapters, config.held_out)
    files = [*config.data.values(), *config.held_out.values()]
    if missing := list(dict.fromkeys(file for file in files if not Path(file).is_file())):
        raise IntarsiaError(f"search: no data file {', '.join(missing)}")
    described(config, ready)


def run(
    ready: Plan, recipe: Recipe, config: SearchConfig, asked: Asked, output: Path, restart: bool, json: bool
) -> None:
    """Report on the adapters, search, write the merged one, and tell of it."""
    from intarsia.merge.search import Live, find_weights, save, trials_of

    with terminal.progress() as progress:
        pretrained = reporting.model_of(ready, recipe, progress)
        rows, held_out = _rows(config, pretrained, progress)
        base = _base_weights(ready, pretrained.model)
        report = reporting.before(ready, asked, base, progress)
    if report is not None and not json:
        reporting.print_before(report)
        terminal.output().print()
    with terminal.progress() as progress:
        task = _task(ready, config, rows, held_out, base)
        live = Live(pretrained.model, pretrained.tokenizer, config.batch_size)
        settings = task.settings(live)
        file = trials_of(output, settings, restart=restart)
        if file.trials:
            progress.say(f"{len(file.trials)} trials are in {file.path}; going on from there")
        with file.held(settings):
            outcome = find_weights(task, live, trials=config.trials, file=file, progress=progress)
        values = None if recipe.values == "exact" else recipe.values
        adapter = save(outcome, task, file, output, overwrite=recipe.overwrite, values=values)
    if json:
        plain = {"output": str(output), "digest": adapter.digest, "method": dict(adapter.method)} | outcome.to_dict()
        return terminal.print_json(plain | ({} if report is None else {"interference": report.to_dict()}))
    return _print(outcome, adapter, output)


def _rows(
    config: SearchConfig, pretrained: Pretrained, progress: Progress
) -> tuple[Mapping[str, Sequence[Example]], Mapping[str, Sequence[Example]]]:
    """(rows to search on, rows to report on): two files of each skill, or two shares of one."""
    from intarsia.merge.search import check_apart, drawn, hold_out
    from intarsia.train.data import load_examples

    def read(files: Mapping[str, str]) -> dict[str, list[Example]]:
        found = {}
        for skill, file in files.items():
            found[skill], report = load_examples(
                file, pretrained.tokenizer, format=config.format, max_length=config.max_length,
                skip_bad_rows=config.skip_bad_rows,
            )  # fmt: skip
            progress.say(f"{skill}: {report}")
        return found

    rows = read(config.data)
    search, held_out = (
        (rows, read(config.held_out)) if config.held_out else hold_out(rows, config.hold_out, config.seed)
    )
    check_apart(search, held_out)
    return drawn(search, config.rows, config.seed), held_out


def _task(
    ready: Plan,
    config: SearchConfig,
    rows: Mapping[str, Sequence[Example]],
    held_out: Mapping[str, Sequence[Example]],
    base: Mapping[str, Tensor] | None,
) -> Task:
    from intarsia.merge.search import Objective, Task
    from intarsia.merge.search.weights import ranges_of

    return Task(
        ready, rows, held_out, ranges_of(config.weight, config.density), Objective(config.objective, config.importance),
        points=config.points, seed=config.seed, base=base,
    )  # fmt: skip


def _base_weights(ready: Plan, model: nn.Module) -> Mapping[str, Tensor] | None:
    """The base's weights, where a change depends on them. The deck gives them back before each merge is made."""
    from intarsia.site import matrix_at

    if not any(edit.needs_weight for adapter in ready.adapters.values() for edit in adapter.outlines.values()):
        return None
    return {weight: matrix_at(model, weight) for weight in ready.rules}


def _print(outcome: Outcome, adapter: Adapter, output: Path) -> None:
    from intarsia.train.progress import clock

    out = terminal.output()
    out.print(outcome.weights_table())
    out.print()
    out.print(outcome.skills_table())
    out.print()
    out.print(outcome.sentence(), markup=False, soft_wrap=True)
    search = outcome.search
    out.print(
        f"{output}  {len(search.trials)} trials in {clock(search.seconds)}, found in trial {search.best.number}, "
        f"sha256 {adapter.digest[:12]}; search.png, search.json, trials.jsonl",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def described(config: SearchConfig, ready: Plan) -> dict[str, Any]:
    """What would be searched, as plain JSON values."""
    task = _task(ready, config, dict.fromkeys(config.data, ()), dict.fromkeys(config.data, ()), None)
    return {
        "trials": config.trials,
        "objective": task.objective.to_dict(),
        "space": task.space.to_dict(),
        "data": config.data,
    }
