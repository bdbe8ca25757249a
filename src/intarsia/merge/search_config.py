"""The section ``search:`` of a recipe: on which rows, between which bounds, for how long.

search:
  data: {pirate: pirate.jsonl, json: json.jsonl}    # rows of every adapter's skill, by the adapter's name
  trials: 60
  objective: worst
  weight: [0, 1.5]
  density: [0.1, 1.0]                               # left out: densities stay as they are
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from intarsia.train.config import PathText, Section


class SearchConfig(Section):
    """The search for the weights of a merge."""

    data: dict[str, PathText] = Field(default_factory=dict, description="rows of each adapter's skill, by its name")
    held_out: dict[str, PathText] = Field(
        default_factory=dict, description="rows to report on; without them a share of data is held out"
    )
    hold_out: float = Field(default=0.5, gt=0, lt=1, description="share of data to report on, which no trial sees")
    rows: int | None = Field(default=None, ge=1, description="at most so many rows of each skill in a trial")
    trials: int = Field(default=60, ge=1, description="points to measure, of all runs together")
    objective: Literal["worst", "mean", "weighted"] = Field(
        default="worst", description="of the skills' retained shares: the least, the mean, or weighted by importance"
    )
    importance: dict[str, float] = Field(default_factory=dict, description="of each skill, for objective: weighted")
    weight: list[float] = Field(default=[0.0, 1.5], min_length=2, max_length=2, description="lowest and highest weight")
    density: list[float] | None = Field(
        default=None, min_length=2, max_length=2, description="lowest and highest density; left out: not searched"
    )
    points: int = Field(default=1, ge=1, description="more than 1: a gradient of so many values over the layers")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the sampler, and of the rows that are held out")
    format: Literal["auto", "alpaca", "chat", "prompt", "text"] = Field(default="auto", description="shape of the rows")
    max_length: int = Field(default=512, ge=2, description="tokens a row; what goes beyond is cut off at the end")
    batch_size: int = Field(default=16, ge=1, description="rows a forward pass")
    skip_bad_rows: bool = Field(default=False, description="leave bad rows out and count them, instead of stopping")

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        for key in ("weight", "density"):
            if isinstance(bounds := value.get(key), list | tuple):
                value[key] = [float(one) if type(one) is int else one for one in bounds]
        return value
