"""The support space: granularity x scorer x budget. Pure tensor functions."""

from intarsia.support.choose import choose, struct, top
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
from intarsia.support.permutation import permute, sample
from intarsia.support.scorers import NEED_GRADIENT, SCORERS

__all__ = [
    "GRANULARITIES", "NEED_GRADIENT", "SCORERS", "Column", "Diagonal", "Element", "Granularity", "Line", "Plan", "Row",
    "Shape", "Tile", "Wide", "choose", "file_index_dtype", "named_granularity", "permute", "sample", "struct", "top",
]  # fmt: skip
