"""What ``intarsia bench methods`` runs: methods x learning rates x seeds, on given data.

    model: smollm2-135m
    skill: phonemes                        # or data: {train: ..., eval: ...}
    other: prose.jsonl                     # text on which forgetting is measured
    methods: [shira, shira scorer=snip, lora]
    lr: [1e-3, 2e-3, 4e-3, 8e-3]           # or 0.5x, 1x, 2x of each method's own
    seeds: 3
    count: lora rank=3                     # everybody trains as many numbers as this, or as this number says
    output: out/methods
    train: {steps: 50, batch_size: 8}

All methods get the same learning rates, seeds, steps and rows: equal effort. ``count`` makes the trained numbers equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from intarsia import registry
from intarsia.bench.budget import Scale, fitted
from intarsia.bench.wanted import label, method_config
from intarsia.errors import IntarsiaError
from intarsia.train.config import DataConfig, Names, PathText, Section, TrainConfig

MULTIPLE = re.compile(r"(\d+(\.\d*)?|\.\d+)\s*x")


def _rates(value: object) -> object:
    """One or several, as numbers or as text: ``1e-3,2e-3``, ``0.5x``."""
    parts: list[Any] = value if isinstance(value, list) else [value]
    parts = [piece for part in parts for piece in (part.split(",") if isinstance(part, str) else [part])]
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    return [part if isinstance(part, str) and MULTIPLE.fullmatch(part) else _rate(part) for part in parts]


def _rate(part: object) -> float:
    try:
        rate = float(str(part))
    except ValueError:
        raise ValueError(f"{part!r} is no learning rate; expected 1e-3, or 0.5x of the method's own") from None
    if not 0 < rate < float("inf"):
        raise ValueError(f"{part!r} is no learning rate: it is above 0 and finite")
    return rate


def _seeds(value: object) -> object:
    return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value


def _list(value: object) -> object:
    return [value] if isinstance(value, str | Mapping) else value


class Grid(Section):
    """The whole comparison."""

    model: PathText = Field(description="a local folder, a .gguf file, a hub id, or smollm2-135m")
    data: DataConfig | None = Field(default=None, description="a file, or a mapping; or name a skill")
    skill: str | None = Field(default=None, description="one of the demo's skills instead of data")
    other: PathText | None = Field(default=None, description="file of other rows, on which forgetting is measured")
    methods: Annotated[list[str | dict[str, Any]], BeforeValidator(_list)] = Field(
        min_length=1, description="names with fields: shira scorer=snip"
    )
    lr: Annotated[list[float | str], BeforeValidator(_rates)] = Field(
        min_length=1, description="learning rates; 0.5x: half of the method's own"
    )
    seeds: Annotated[list[int], BeforeValidator(_seeds)] = Field(
        default=[0, 1, 2], min_length=1, description="how many, or which"
    )
    count: int | str | dict[str, Any] | None = Field(
        default=None, description="train so many numbers, or as many as this method"
    )
    targets: Names = "all-linear"
    exclude: list[str] = Field(default_factory=list)
    original: PathText | None = Field(default=None, description="the model before its weights were compressed")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    answers: bool = Field(default=False, description="let each run answer too, for the task's own measure; slower")
    rank: bool = Field(default=False, description="the effective rank of what each run changed; slower")
    keep: bool = Field(default=False, description="keep the adapters")
    output: PathText = Field(description="folder for the finished runs, and what goes on from them")
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        value = dict(value)
        if isinstance(value.get("data"), str):
            value["data"] = {"train": value["data"]}
        if isinstance(value.get("exclude"), str):
            value["exclude"] = [value["exclude"]]
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.data is None) == (self.skill is None):
            raise ValueError("give data or a skill, one of them")
        if self.train.lr is not None:
            raise ValueError("train.lr is what is compared: give lr, a list")
        return self


@dataclass(frozen=True)
class Entry:
    """One method of the comparison, at its count."""

    label: str  # as it was asked for
    config: Mapping[str, Any]  # all its fields
    default_lr: float
    trained: int


@dataclass(frozen=True)
class Case:
    """One run."""

    entry: Entry
    lr: float
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What makes it this run among those of one grid."""
        return {"method": dict(self.entry.config), "lr": self.lr, "seed": self.seed}

    def __str__(self) -> str:
        return f"{self.entry.label}, lr {self.lr:g}, seed {self.seed}"


def check_methods(grid: Grid) -> None:
    """Every method is known and has the fields it is given. Raises one IntarsiaError with every mistake."""
    faults = []
    asked = [*grid.methods, *([grid.count] if isinstance(grid.count, str | dict) else [])]
    for method in asked:
        try:
            method_config(method)
        except IntarsiaError as error:
            faults.append(str(error))
    if faults:
        raise IntarsiaError("\n".join(faults))


def entries(grid: Grid, scale: Scale | None) -> list[Entry]:
    """The methods, each at the count that the grid asks for; without a scale, as they were given and not counted.

    Raises:
        IntarsiaError: for a method that cannot be fitted to the count, does not fit the model, or is given twice.
    """
    count = grid.count
    if scale is not None and isinstance(count, str | dict):
        count = scale.trained(registry.build(method_config(count)))
    found = []
    for given in grid.methods:
        config = method_config(given)
        settled = fitted(config, scale, count) if scale and isinstance(count, int) else config
        method = registry.build(settled)
        try:
            trained = scale.trained(method) if scale else 0
        except IntarsiaError as error:
            raise IntarsiaError(f"{label(config)}: {error}") from error
        found.append(Entry(label(config), method.config(), method.default_lr, trained))
    seen: dict[str, Entry] = {}
    for entry in found:
        if (other := seen.setdefault(str(entry.config), entry)) is not entry:
            raise IntarsiaError(f"{entry.label!r} and {other.label!r} are one method; leave one of them out")
    return found


def cases(grid: Grid, methods: Sequence[Entry]) -> list[Case]:
    """Every run: all methods and rates with the first seed, then with the next."""
    return [Case(entry, rate, seed) for seed in grid.seeds for entry in methods for rate in rates(grid, entry)]


def rates(grid: Grid, entry: Entry) -> list[float]:
    """The learning rates of one method, lowest first."""
    found = {
        float(f"{float(rate.rstrip(' x')) * entry.default_lr:.6g}") if isinstance(rate, str) else rate
        for rate in grid.lr
    }
    return sorted(found)
