"""Edits: the few kinds of change that a finished adapter makes, and how they are placed into a weight."""

from intarsia.edits.edit import KINDS, Edit, LowRank, Rescaled, Sparse, build_edit, columns, elements, row_norms
from intarsia.edits.kernel import KERNELS, Kernel, merge, sparsify
from intarsia.edits.placement import Placement, place
from intarsia.edits.sum import Sum

__all__ = [
    "KERNELS", "KINDS", "Edit", "Kernel", "LowRank", "Placement", "Rescaled", "Sparse", "Sum", "build_edit", "columns",
    "elements", "merge", "place", "row_norms", "sparsify",
]  # fmt: skip
