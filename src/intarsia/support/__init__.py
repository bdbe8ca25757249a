"""The support space: granularity x scorer x budget. Pure tensor functions."""

from intarsia.registry import OUTSIDE
from intarsia.support.budgets import BUDGETS, OF_THE_MODEL, allocate, proportional
from intarsia.support.choose import Drawn, choose, free_count, free_units, struct, top
from intarsia.support.granularity import (
    GRANULARITIES,
    Column,
    Diagonal,
    Element,
    Granularity,
    Line,
    Plan,
    Row,
    Shape,
    Tile,
    Wide,
    file_index_dtype,
    named_granularity,
)
from intarsia.support.noise import combination, noise
from intarsia.support.permutation import draw, permute, ranks, sample, sample_rows, uniform
from intarsia.support.principal import principal
from intarsia.support.scorers import CROWDED, SCORERS, is_scorer, needs_of, score, scorer

__all__ = [
    "BUDGETS", "CROWDED", "GRANULARITIES", "OF_THE_MODEL", "OUTSIDE", "SCORERS", "Column", "Diagonal", "Drawn", "Element",
    "Granularity", "Line", "Plan", "Row", "Shape", "Tile", "Wide", "allocate", "choose", "combination", "draw",
    "file_index_dtype", "free_count", "free_units", "is_scorer", "named_granularity", "needs_of", "noise", "permute",
    "principal", "proportional", "ranks", "sample", "sample_rows", "score", "scorer", "struct", "top", "uniform",
]  # fmt: skip
