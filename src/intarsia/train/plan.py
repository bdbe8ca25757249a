"""A run before it runs: everything loaded and checked, nothing written yet, and what it will take."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia import allocators, processes, registry
from intarsia.bases import packing_of
from intarsia.disjoint import adapters_to_avoid
from intarsia.errors import IntarsiaError
from intarsia.method import Method
from intarsia.model import attached_names, digest
from intarsia.model import plan as plan_sites
from intarsia.optim import Recipe
from intarsia.optim import build as build_optimizer
from intarsia.pretrained import Pretrained
from intarsia.pretrained import load as load_pretrained
from intarsia.site import find_sites
from intarsia.store import Adapter
from intarsia.support import Shape
from intarsia.train.config import PLAIN_OPTIMIZERS, Config
from intarsia.train.data import BatchView, DataReport, Example, load_examples, split
from intarsia.train.data import show_batch as view
from intarsia.train.progress import Progress, size
from intarsia.train.snapshots import snapshot_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MUCH_TOO_LOW = 8  # a learning rate that many times below the method's own gets a warning
STATE_BYTES = {"adamw": 8, "adafactor": 4, "sgd": 0}  # of optimizer state for a trained number; adafactor: at most

# What may change between a run and its continuation without changing the result.
FREE = ("output", "overwrite", "train.log_every", "train.eval_every", "train.save_every", "train.shard", "avoid")


@dataclass(frozen=True)
class Estimate:
    """What a run will train and take."""

    trained: int  # numbers
    base: int  # numbers of the base
    sites: int
    targeted: int  # weights that the targets name; a method may take some of them
    optimizer_bytes: int
    checkpoint_bytes: int
    steps: int
    rows: int
    held_out: int
    tokens: int  # that go through the model in the whole run, padding aside
    lr: float

    @property
    def share(self) -> float:
        """Trained numbers as a share of the base's."""
        return self.trained / self.base

    def __str__(self) -> str:
        of = "" if self.sites == self.targeted else f"of the {self.targeted} targeted "
        return (
            f"{self.trained:,} numbers trained at {self.sites} {of}weights ({self.share:.2%} of the base), "
            f"{size(self.optimizer_bytes)} of optimizer state; {self.steps} steps, about {self.tokens:,} tokens, "
            f"lr {self.lr:g}; {self.rows} rows to train on, {self.held_out} held out"
        )


@dataclass(frozen=True)
class Plan:
    """A run that has been checked as far as it can be without starting it."""

    config: Config
    method: Method
    allocator: allocators.Allocator | None  # who trains when
    avoid: list[Adapter]  # whose entries are not chosen
    pretrained: Pretrained
    train: list[Example]
    held_out: list[Example]
    reports: list[DataReport]
    optimizer: Recipe | None  # None: one of Trainer's own
    estimate: Estimate
    snapshots: list[int]  # steps
    settings: Mapping[str, Any]  # everything that the result depends on, flat: {"train.lr": 0.001, ...}

    def warnings(self) -> list[str]:
        """What is probably not meant so."""
        found = []
        usual, lr = _usual_lr(self.method, self.optimizer), self.estimate.lr
        if self.config.train.optimizer == "adamw" and lr < usual / MUCH_TOO_LOW:
            found.append(
                f"train.lr={lr:g} is {usual / lr:.0f} times below what {self.method.name} was measured to want "
                f"({usual:g}); it will learn slowly, if at all. Leave train.lr out to use that"
            )
        sought = self.method.invoked_by()
        without = sum(not _holds(example.input_ids, sought) for example in self.train) if sought else 0
        if without:
            text = self.pretrained.tokenizer.decode(list(sought))
            found.append(
                f"{without} of {len(self.train)} rows to train on do not have {text!r} (tokens {list(sought)}), which "
                f"{self.method.name} is invoked by; nothing is learned of them"
            )
        for report in self.reports:
            skipped = sum(report.skipped.values())
            found += [f"{report.path}: {skipped} bad rows skipped"] if skipped else []
            found += [f"{report.path}: {report.cut} rows cut short by train.max_length"] if report.cut else []
        return found


def plan(config: Config, pretrained: Pretrained | None = None, progress: Progress | None = None) -> Plan:
    """Load the model and the data of a config and check all of it. Nothing is written, nothing is attached.

    ``pretrained``: a model that is loaded already, without adapters, instead of the config's; it is not changed.
    Raises IntarsiaError for anything that would stop the run later on.
    """
    progress = progress or Progress()
    if config.train.shard and not processes.started():
        raise IntarsiaError("train.shard needs several processes: torchrun --nproc-per-node 2 -m intarsia train ...")
    if config.train.shard and config.load_in:
        raise IntarsiaError(f"train.shard deals out plain weights; leave load_in={config.load_in} out, or train.shard")
    method = registry.build(
        registry.with_tokens(config.method, lambda text: [0])
    )  # wrong ones are told before a model is loaded
    allocator = allocators.build(config.allocator) if config.allocator is not None else None
    if allocator is not None and processes.count() > 1:
        raise IntarsiaError(f"{allocator.name} works in one process so far; start one, or leave allocator out")
    recipe = _optimizer(config, method)
    if pretrained is None:
        device = None if config.train.shard else processes.device()  # what is to be sharded may not fit on one
        pretrained = load_pretrained(
            config.model, dtype=config.dtype, load_in=config.load_in, device=device, progress=progress.say
        )
    elif config.train.shard:
        raise IntarsiaError(
            "train.shard deals the base out for good; leave pretrained out, so that train() loads its own"
        )
    model = pretrained.model
    if "original" in method.needs() and original_name(config) is None:
        raise IntarsiaError(
            f"{method.name} computes from what the compression of the base changed: name the model before it, original: ..., or "
            "store the base in fewer bits, load_in: nf4"
        )
    method = registry.build(registry.with_tokens(config.method, partial(_tokens, pretrained.tokenizer)))
    if attached_names(model):
        raise IntarsiaError(f"the model has adapters already ({', '.join(attached_names(model))}); detach them first")
    targeted = find_sites(model, config.targets, config.exclude, method.default_targets)
    avoid = _to_avoid(config, method)
    planned = plan_sites(model, method, config.targets, config.exclude, avoid)
    train, held_out, reports = load_data(config, pretrained)
    trained = sum(planned.values())
    steps = step_count(config, len(train))
    snapshots = snapshot_steps(steps, config.train.snapshots, config.train.snapshots_from)
    moving = any(method.moves(step, steps) for step in range(1, steps + 1))
    packed = [name for name in planned if not packing_of(targeted[name].stored).in_place]
    if moving and processes.count() > 1:
        raise IntarsiaError(
            f"the support of {method.name} cannot move with several processes: each would choose by its own rows. "
            "Start one process, or leave method.schedule out"
        )
    if moving and packed:
        stored = targeted[packed[0]].stored
        raise IntarsiaError(
            f"{packed[0]}: its weight is stored in {packing_of(stored).name(stored)}, and a support only moves over a plain "
            "base; leave load_in out, or take a method whose support stays"
        )
    optimizer = _optimizer_bytes(config, recipe, [(targeted[name].shape, count) for name, count in planned.items()])
    per_row = sum(len(e.input_ids) for e in train) / len(train)
    estimate = Estimate(
        trained=trained,
        base=sum(packing_of(p).shape(p).numel() for p in model.parameters()),
        sites=len(planned),
        targeted=len(targeted),
        optimizer_bytes=optimizer,
        checkpoint_bytes=optimizer + trained * (4 + 8),  # values and, at worst, an index each
        steps=steps,
        rows=len(train),
        held_out=len(held_out),
        tokens=round(per_row * _rows_seen(config, len(train), steps)),
        lr=config.train.lr or _usual_lr(method, recipe),
    )
    depends_on = settings(config, method, pretrained, avoid, recipe)
    return Plan(
        config, method, allocator, avoid, pretrained, train, held_out, reports, recipe, estimate, snapshots, depends_on
    )


def _optimizer(config: Config, method: Method) -> Recipe | None:
    """One of ours, or None for one of Trainer's. Raises IntarsiaError where it cannot train what the method has."""
    wanted = config.train.optimizer
    recipe = None if wanted in PLAIN_OPTIMIZERS else build_optimizer(wanted)
    if recipe is not None and recipe.needs_pairs and not method.pairs:
        able = ", ".join(name for name, cls in registry.methods().items() if cls.pairs)
        raise IntarsiaError(
            f"train.optimizer: {recipe.name} is for methods with pairs of factors, and {method.name} has none; take another "
            f"optimizer, or another method (such as {able})"
        )
    return recipe


def _usual_lr(method: Method, recipe: Recipe | None) -> float:
    return recipe.usual_lr(method.default_lr) if recipe else method.default_lr


def _optimizer_bytes(config: Config, recipe: Recipe | None, shapes: Iterable[tuple[Shape, int]]) -> int:
    """Bytes of its state, from the shape of each weight and how many numbers are trained there."""
    if recipe is None:
        return sum(trained for _, trained in shapes) * STATE_BYTES[str(config.train.optimizer)]
    # Where not the whole weight is trained, as if it were one vector; the state of a pair of factors is at most a little more.
    return 4 * sum(recipe.numbers(shape if math.prod(shape) == trained else (trained,)) for shape, trained in shapes)


def original_name(config: Config) -> str | None:
    """The model before its weights were compressed: as the config says, or the one that ``load_in`` stores in fewer bits."""
    return config.original or (config.model if config.load_in else None)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _holds(ids: list[int], sought: tuple[int, ...]) -> bool:
    return any(tuple(ids[at : at + len(sought)]) == sought for at in range(len(ids) - len(sought) + 1))


def _to_avoid(config: Config, method: Method) -> list[Adapter]:
    output = Path(config.output).resolve()
    if any(Path(folder).resolve() == output for folder in config.avoid):
        raise IntarsiaError(f"avoid names {config.output!r}, the output of this run; leave it out, or write elsewhere")
    return adapters_to_avoid(config.avoid, method)


def step_count(config: Config, rows: int) -> int:
    """Optimizer steps of the run."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, math.ceil((config.train.epochs or 1) * _steps_an_epoch(config, rows)))


def _steps_an_epoch(config: Config, rows: int) -> int:
    return math.ceil(math.ceil(rows / config.train.batch_size) / config.train.accumulate)


def _rows_seen(config: Config, rows: int, steps: int) -> int:
    epochs, more = divmod(steps, _steps_an_epoch(config, rows))
    return epochs * rows + min(rows, more * config.train.batch_size * config.train.accumulate)


def load_data(config: Config, pretrained: Pretrained) -> tuple[list[Example], list[Example], list[DataReport]]:
    """(train, held out, reports) of a config's data, encoded for this model."""
    data, longest = config.data, config.train.max_length
    context = getattr(pretrained.model.config, "max_position_embeddings", None)
    longest = min(longest, context) if isinstance(context, int) else longest

    def load(path: str) -> tuple[list[Example], DataReport]:
        return load_examples(
            path,
            pretrained.tokenizer,
            format=data.format,
            max_length=longest,
            skip_bad_rows=data.skip_bad_rows,
        )

    examples, report = load(data.train)
    if data.eval is None:
        train, held_out = split(examples, data.eval_share, config.seed, data.eval_rows)
        return train, held_out, [report]
    held_out, eval_report = load(data.eval)
    return examples, held_out[: data.eval_rows], [report, eval_report]


def show_batch(config: Config, rows: int = 4, pretrained: Pretrained | None = None) -> BatchView:
    """What is trained and what is masked in the first rows of a config's data, token by token."""
    pretrained = pretrained or load_pretrained(config.model, dtype=config.dtype)
    return view(load_data(config, pretrained)[0], pretrained.tokenizer, rows)


def settings(
    config: Config,
    method: Method,
    pretrained: Pretrained,
    avoid: Iterable[Adapter] = (),
    optimizer: Recipe | None = None,
) -> dict[str, Any]:
    """All that the result of a run depends on: the config without what is free, the data, the base and the adapters to avoid by
    digest."""
    tree = config.model_dump(mode="json") | {"method": method.config()}
    if optimizer is not None:
        tree["train"]["optimizer"] = optimizer.config()
    if config.allocator is not None:
        tree["allocator"] = allocators.build(config.allocator).config()
    flat = _flat(tree)
    others = {"avoid": [adapter.digest[:12] for adapter in avoid]} if config.avoid else {}
    files = {"data.train": config.data.train, "data.eval": config.data.eval}
    digests = {
        f"contents of {key}": hashlib.sha256(Path(path).read_bytes()).hexdigest() for key, path in files.items() if path
    }
    return (
        {k: v for k, v in flat.items() if k not in FREE}
        | others
        | digests
        | {"weights of the base": digest(pretrained.model)}
    )


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat
