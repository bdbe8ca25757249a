"""Edits: the few kinds of change that a finished adapter makes, and how they are placed into a weight."""

from intarsia.edits.edit import (
    KINDS,
    SPARSE,
    Columns,
    Edit,
    Elements,
    LowRank,
    Rescaled,
    Sparse,
    build_edit,
    row_norms,
)
from intarsia.edits.placement import Placement, place

__all__ = [
    "KINDS", "SPARSE", "Columns", "Edit", "Elements", "LowRank", "Placement", "Rescaled", "Sparse", "build_edit", "place",
    "row_norms",
]  # fmt: skip
