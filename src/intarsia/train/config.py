"""A training run as a YAML file.

    model: smollm2-135m
    data: phonemes.jsonl                  # or {train: ..., eval: ..., format: alpaca}
    method: {name: shira, density: 0.01, scorer: snip}
    targets: all-linear
    output: out/phonemes
    train: {steps: 200, lr: 2e-3, batch_size: 16}

Every key may be overridden on the command line: ``train.lr=1e-3``. Paths are taken from the current folder,
as on the command line itself, not from the folder of the config file. An unknown key anywhere is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from intarsia.errors import IntarsiaError, nearest


def _text_of_path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _is_names(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        return value
    raise ValueError(f"expected text or a list of texts, found {value!r}")


Names = Annotated[str | list[str], BeforeValidator(_is_names)]
PathText = Annotated[str, BeforeValidator(_text_of_path), Field(min_length=1)]


S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Strict: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the rows come from."""

    train: PathText = Field(description="file to train on: .jsonl, .json, .csv, .tsv or .parquet")
    eval: PathText | None = Field(
        default=None, description="file of held-out rows; without it a share of train is held out"
    )
    format: Literal["auto", "alpaca", "chat", "prompt", "text"] = Field(default="auto", description="shape of the rows")
    eval_share: float = Field(
        default=0.05, ge=0, lt=1, description="share of train to hold out if no eval file is given"
    )
    eval_rows: int = Field(default=200, ge=1, description="hold out, or read from the eval file, at most so many rows")
    skip_bad_rows: bool = Field(default=False, description="leave bad rows out and count them, instead of stopping")


class FirstConfig(Section):
    """The dense training that methods by movement begin with."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps; as many as the run's by default")
    lr: float = Field(default=5e-5, gt=0, description="highest learning rate of AdamW; it falls linearly")


PLAIN_OPTIMIZERS = ("adamw", "adafactor", "sgd")  # that Trainer has


class TrainConfig(Section):
    """How to train. Steps are optimizer steps."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps; or give epochs")
    epochs: float | None = Field(default=None, gt=0, description="passes over the data; 1 if steps is not given either")
    lr: float | None = Field(default=None, gt=0, description="highest learning rate; by default the method's own")
    batch_size: int = Field(default=16, ge=1, description="rows a forward pass, of all processes together")
    accumulate: int = Field(default=1, ge=1, description="forward passes an optimizer step")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how lr falls after the warmup"
    )
    warmup: float = Field(default=0.05, ge=0, description="share of the steps if below 1, otherwise steps")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="clip the gradient to this norm; 0: do not")
    optimizer: str | dict[str, Any] = Field(
        default="adamw",
        description="adamw, adafactor, sgd, or one of intarsia methods: its name, or a mapping of its name and fields",
    )
    max_length: int = Field(default=512, ge=2, description="tokens a row; what goes beyond is cut off at the end")
    gradient_checkpointing: bool = Field(default=False, description="less memory for a third more time")
    shard: bool = Field(default=False, description="deal the base out over the processes of a launcher (FSDP2)")
    calibration_batches: int = Field(
        default=1,
        ge=1,
        description="batches for methods that choose by gradients or inputs; more than one need a temporary file",
    )
    first: FirstConfig = Field(
        default_factory=FirstConfig, description="the dense training that methods by movement (lt-sft) begin with"
    )
    log_every: int = Field(default=1, ge=1, description="steps between two entries of log.jsonl")
    eval_every: int | None = Field(
        default=None, ge=1, description="steps between evaluations; a quarter of the run by default"
    )
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; a tenth of the run by default"
    )
    snapshots: int = Field(default=0, ge=0, description="adapters to keep along the run, in <output>/snapshots")
    snapshots_from: float = Field(
        default=2 / 3, ge=0, lt=1, description="share of the run after which snapshots are taken, evenly up to its end"
    )

    @field_validator("optimizer")
    @classmethod
    def _optimizer_is_known(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(value, dict) and not isinstance(value.get("name"), str):
            raise ValueError("an optimizer needs a name: optimizer: {name: galore, rank: 8}")
        if value in PLAIN_OPTIMIZERS:
            return value
        if isinstance(value, dict) and value["name"] in PLAIN_OPTIMIZERS:
            if len(value) > 1:
                raise ValueError(f"{value['name']} has no fields here; write optimizer: {value['name']}")
            return str(value["name"])
        from intarsia.optim import build  # here, because it imports torch

        build(value, also=PLAIN_OPTIMIZERS)
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both (train.steps=null takes one out)")
        return self


class SaveConfig(Section):
    """How the adapter is written."""

    coding: Literal["compact", "plain"] = Field(
        default="compact", description="indices in few bytes, or as they are, for programs that read the tensors alone"
    )
    values: Literal["exact", "bfloat16", "float16"] = Field(
        default="exact", description="keep every bit of what was learned, or round it once"
    )


class Config(Section):
    """One training run."""

    model: PathText = Field(description="a local folder, a .gguf file, a hub id, or smollm2-135m")
    data: DataConfig = Field(description="a file, or a mapping")
    method: dict[str, Any] = Field(description="a method's name, or a mapping of its name and fields")
    allocator: dict[str, Any] | None = Field(
        default=None, description="who trains when: an allocator's name, or a mapping of its name and fields"
    )
    targets: Names = Field(default="all-linear", description="which weights: all-linear, globs, re:...")
    exclude: list[str] = Field(default_factory=list, description="weights to leave alone, named like targets")
    avoid: list[PathText] = Field(
        default_factory=list,
        description="adapters whose entries are not chosen, so that fusing keeps all values: folders, or NAME@VERSION",
    )
    output: PathText = Field(description="folder to write the adapter to")
    overwrite: bool = Field(default=False, description="replace an adapter that stands in the output folder")
    seed: int = Field(default=0, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the base; auto: its own"
    )
    load_in: Literal["nf4", "int8"] | None = Field(
        default=None, description="store the base's linear weights in fewer bits; the adapter then belongs to that base"
    )
    original: PathText | None = Field(
        default=None,
        description="the model before it was compressed, for methods that repair that (eora); with load_in: the model itself",
    )
    train: TrainConfig = Field(default_factory=lambda: TrainConfig())
    save: SaveConfig = Field(default_factory=SaveConfig)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        if isinstance(value.get("data"), str | os.PathLike):
            value["data"] = {"train": value["data"]}
        value |= {key: {"name": value[key]} for key in ("method", "allocator") if isinstance(value.get(key), str)}
        value |= {key: [value[key]] for key in ("exclude", "avoid") if isinstance(value.get(key), str)}
        return value

    @model_validator(mode="after")
    def _method_has_a_name(self) -> Self:
        if not isinstance(self.method.get("name"), str):
            raise ValueError("method needs a name: method: {name: shira, density: 0.01}")
        if self.allocator is not None and not isinstance(self.allocator.get("name"), str):
            raise ValueError("allocator needs a name: allocator: {name: ist, share: 0.25}")
        return self


def schema() -> dict[str, Any]:
    """The JSON schema of a config, for editors and for `intarsia train --schema`."""
    return Config.model_json_schema()


# --- reading --------------------------------------------------------------------------------------------------


class _Yaml(yaml.SafeLoader):
    """YAML 1.2 scalars, which are what people mean: 2e-3 is a number; no, off and 1:30 are text. No key twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as the base class declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_DIGITS = "-+.0123456789"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list(_DIGITS)),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list(_DIGITS)),
    ("merge", r"<<", ["<"]),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _number(kind: type[int] | type[float]) -> Callable[[yaml.SafeLoader, yaml.ScalarNode], int | float]:
    return lambda loader, node: kind(node.value.replace(".inf", "inf").replace(".nan", "nan"))


_Yaml.add_constructor("tag:yaml.org,2002:int", _number(int))
_Yaml.add_constructor("tag:yaml.org,2002:float", _number(float))


def parse_value(text: str, where: str) -> Any:
    """One YAML value, numbers as people write them (``2e-3``). Raises IntarsiaError that begins with ``where``."""
    try:
        return yaml.load(text, Loader=_Yaml)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise IntarsiaError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise IntarsiaError(f"{where}: not valid YAML: {error}") from None


def _override(tree: dict[str, Any], assignment: str) -> None:
    """Set one ``a.b=value`` in a nested mapping; the value is read as YAML."""
    key, sign, value = assignment.partition("=")
    if not sign or not all(part.strip() for part in key.split(".")):
        raise IntarsiaError(f"override {assignment!r}: expected KEY=VALUE, such as train.lr=1e-3")
    *path, last = (part.strip() for part in key.split("."))
    here: Any = tree
    for i, part in enumerate(path):
        at: Any = _place(here, part, assignment)
        below = here[at] if isinstance(here, list) else here.get(at)
        short = SHORT.get(path[i - 1] if isinstance(here, list) else part) if i < 2 else None
        if below is None or (isinstance(below, str) and short):
            below = {} if below is None else {short: below}
        if not isinstance(below, Mapping | list):
            raise IntarsiaError(f"override {assignment!r}: {'.'.join(path[: i + 1])} is a value, not a section")
        here[at] = list(below) if isinstance(below, list) else dict(below)
        here = here[at]
    here[_place(here, last, assignment)] = parse_value(value, f"override {assignment!r}")


def _place(section: Any, key: str, assignment: str) -> Any:
    """A key of a mapping as it is, of a list as the number of a place in it: ``adapters.0.parameters.weight``."""
    if not isinstance(section, list):
        return key
    if not key.isdigit() or int(key) >= len(section):
        raise IntarsiaError(f"override {assignment!r}: {key} is no place in a list; expected 0 to {len(section) - 1}")
    return int(key)


SHORT = {
    "data": "train",
    "method": "name",
    "allocator": "name",
    "optimizer": "name",
    "adapters": "adapter",  # each of a list
}  # sections that may be written as one word, and what the word then is


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A config file, with ``a.b=value`` overrides set on top. Raises IntarsiaError."""
    return make_config(load_tree(path, overrides), str(path))


def load_tree(path: str | Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a config file holds, or nothing without a file, with overrides set on top; not checked yet."""
    tree = {} if path is None else _read_tree(Path(path))
    for assignment in overrides:
        _override(tree, assignment)
    return tree


def _read_tree(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise IntarsiaError(f"no config file {str(path)!r}{f'; {nearest(path.name, near)}' if near else ''}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise IntarsiaError(f"{path}: not UTF-8 text") from None
    tree = parse_value(text, str(path))
    if not isinstance(tree, dict):
        raise IntarsiaError(f"{path}: a config is a mapping of keys such as model, data, method, output")
    return tree


def make_config(tree: Mapping[str, Any], where: str = "config") -> Config:
    """A config from nested mappings. All mistakes are reported at once, each with its full key."""
    return validated(Config, tree, where)


def validated(kind: type[S], tree: Mapping[str, Any], where: str) -> S:
    """The same for any section: its values, or one error with every mistake."""
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as error:
        faults = [_fault(one, kind) for one in error.errors()]
        faults = list(dict.fromkeys(faults))
        raise IntarsiaError("\n  ".join([f"{where}: {len(faults)} mistake(s)", *faults])) from None


def _keys(whole: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that may stand in a section."""
    section = whole
    for name in (part for part in path if not part.isdigit()):  # a number is a place in a list of sections
        section = next(kind for kind in _kinds(section.model_fields[name].annotation) if issubclass(kind, BaseModel))
    return list(section.model_fields)


def _kinds(annotation: Any) -> list[type]:
    return [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]


def _fault(error: Any, whole: type[BaseModel]) -> str:
    where = [str(part) for part in error["loc"]]
    key, kind, found = ".".join(where), error["type"], error["input"]
    if kind == "extra_forbidden":
        *path, last = where
        top = _keys(whole, [])
        elsewhere = [
            f"{s}.{last}" for s in ("train", "data", "save") if not path and s in top and last in _keys(whole, [s])
        ]
        elsewhere += [last] if path and last in _keys(whole, []) else []
        full = [".".join([*path, name]) for name in _keys(whole, path)]
        hint = f"it is {elsewhere[0]}" if elsewhere else nearest(key, full)
        return f"unknown key {key!r}; {hint}"
    if kind == "missing":
        return f"key {key!r} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    message = message.removeprefix("input should be ").replace("a valid ", "").replace("string", "text")
    message = message.replace("value should have at least 1 item after validation, not 0", "text that is not empty")
    message = "a mapping of keys" if kind in ("model_type", "dict_type") else message
    quotes = "; write it in quotes" if kind == "string_type" and isinstance(found, int | float) else ""
    return f"{key}: expected {message}, found {found!r}{quotes}"
