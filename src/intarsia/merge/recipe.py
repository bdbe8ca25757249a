"""A merge as a YAML file, in the shape that mergekit's users know.

    merge_method: ties
    adapters:
      - adapter: out/pirate               # a folder, or NAME@VERSION in the registry
        parameters: {weight: 0.6, density: 0.5}
      - adapter: json@latest
        parameters: {weight: [{filter: self_attn, value: 0.2}, {value: [0.2, 0.8]}]}
    parameters: {normalize: true, lambda: 1.0}
    seed: 0
    output: out/both

Every key may be overridden on the command line: ``parameters.lambda=0.5``, ``adapters.pirate.parameters.weight=0.3``.
Paths are taken from the current folder. An unknown key anywhere is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from intarsia import store
from intarsia.errors import IntarsiaError, nearest
from intarsia.merge.plan import Wanted, settings
from intarsia.merge.search_config import SearchConfig
from intarsia.store import Adapter
from intarsia.train.config import PathText, Section, load_tree, validated


class Part(Section):
    """One adapter."""

    adapter: PathText = Field(description="its folder, or NAME@VERSION in the registry")
    name: str | None = Field(default=None, min_length=1, description="what it is called here; by default as the folder")
    parameters: dict[str, Any] = Field(default_factory=dict, description="weight, density and others of its own")

    @property
    def called(self) -> str:
        """Its name in this merge."""
        if self.name is not None:
            return self.name
        name = Path(self.adapter).resolve().name
        return name if Path(self.adapter).exists() else name.partition("@")[0]


class Recipe(Section):
    """One merge."""

    merge_method: str = Field(description="the rule: sum, ties, dare, ...")
    adapters: list[Part] = Field(min_length=1, description="what is merged, each {adapter: FOLDER, parameters: {...}}")
    parameters: dict[str, Any] = Field(default_factory=dict, description="of the rule, and of all adapters")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of rules that draw")
    output: PathText | None = Field(default=None, description="folder to write the merged adapter to")
    overwrite: bool = Field(default=False, description="replace an adapter that stands in the output folder")
    values: Literal["exact", "bfloat16", "float16"] = Field(
        default="exact", description="keep every bit, or round once"
    )
    model: PathText | None = Field(
        default=None, description="the base, for what depends on its weights, and to measure on"
    )
    search: SearchConfig | None = Field(default=None, description="find the weights, on rows of every adapter's skill")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        if isinstance(parts := value.get("adapters"), list):
            value["adapters"] = [{"adapter": part} if isinstance(part, str) else part for part in parts]
        for key in ("models", "slices", "modules"):
            if key in value:
                raise ValueError(
                    f"{key}: mergekit's models are adapters here: adapters: [{{adapter: FOLDER, parameters: ...}}]"
                )
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [part.called for part in self.adapters]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(
                f"two adapters are named {twice[0]!r}; give one of them another name: {{adapter: ..., name: other}}"
            )
        return self

    def wanted(self) -> Wanted:
        """Rule and parameters, as they were written. Raises IntarsiaError for what cannot be a parameter."""
        own = {
            part.called: settings(f"adapters.{i}.parameters", part.parameters) for i, part in enumerate(self.adapters)
        }
        return Wanted(self.merge_method, settings("parameters", self.parameters), own, self.seed)

    def open(self) -> dict[str, Adapter]:
        """The adapters by name, their numbers not read yet. Raises one IntarsiaError with all that is wrong."""
        found: dict[str, Adapter] = {}
        faults = []
        for part in self.adapters:
            try:
                adapter = store.open(store.folder_of(part.adapter))
                found[part.called] = dataclasses.replace(adapter, name=part.called)
            except IntarsiaError as error:
                faults.append(str(error))
        if faults:
            raise IntarsiaError("\n".join(faults))
        return found


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    return Recipe.model_json_schema()


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from its file, with ``a.b=value`` overrides set on top. Raises one IntarsiaError with every mistake."""
    return make_recipe(load_tree(path, _by_place(load_tree(path), overrides)), str(path))


def make_recipe(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from nested mappings. All mistakes are reported at once, each with its full key."""
    return validated(Recipe, tree, where)


def _by_place(tree: Mapping[str, Any], overrides: Iterable[str]) -> list[str]:
    """Overrides that name an adapter, with its place in the list instead."""
    places = {}
    parts = tree.get("adapters")
    for place, part in enumerate(parts if isinstance(parts, list) else ()):
        found = {"adapter": part} if isinstance(part, str) else part
        if isinstance(found, Mapping) and isinstance(text := found.get("name") or found.get("adapter"), str):
            places[Path(text).name.partition("@")[0]] = str(place)
    return [_placed(one, places) for one in overrides]


def _placed(override: str, places: Mapping[str, str]) -> str:
    key, sign, value = override.partition("=")
    for name, place in places.items():
        if key.startswith(f"adapters.{name}."):
            return f"adapters.{place}.{key.removeprefix(f'adapters.{name}.')}{sign}{value}"
    first, *path = key.split(".")
    if first == "adapters" and len(path) > 1 and not path[0].isdigit():
        raise IntarsiaError(f"override {override!r}: no adapter {path[0]!r} is merged; {nearest(path[0], places)}")
    return override
