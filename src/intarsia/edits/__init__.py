"""Edits: the few kinds of change that a finished adapter makes, and how they are placed into a weight."""

from intarsia.edits.edit import KINDS, Edit, LowRank, Rescaled, Sparse, build_edit, columns, elements, row_norms
from intarsia.edits.placement import Placement, place

__all__ = [
    "KINDS", "Edit", "LowRank", "Placement", "Rescaled", "Sparse", "build_edit", "columns", "elements", "place",
    "row_norms",
]  # fmt: skip
