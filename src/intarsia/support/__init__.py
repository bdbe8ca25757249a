"""The support space: granularity x scorer x budget. Pure tensor functions."""

from intarsia.support.choose import choose, struct, top
from intarsia.support.granularity import GRANULARITIES, Column, Element, Granularity, Shape, file_index_dtype
from intarsia.support.permutation import permute, sample
from intarsia.support.scorers import NEED_GRADIENT, SCORERS

__all__ = [
    "GRANULARITIES", "NEED_GRADIENT", "SCORERS", "Column", "Element", "Granularity", "Shape", "choose", "file_index_dtype",
    "permute", "sample", "struct", "top",
]  # fmt: skip
