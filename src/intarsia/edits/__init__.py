"""Edits: the few kinds of change that a finished adapter makes, their algebra, and how they are placed into a weight."""

from intarsia.edits.algebra import add, overlap, positions, scale, to_dense
from intarsia.edits.bottleneck import ACTIVATIONS, Bottleneck
from intarsia.edits.dense import Dense, Kronecker
from intarsia.edits.edit import (
    KINDS,
    Edit,
    LowRank,
    Rescaled,
    Sparse,
    build_edit,
    columns,
    elements,
    row_norms,
    want_numbers,
    want_scale,
    want_tensors,
)
from intarsia.edits.insert import INSERTED, PLACES, SITS_AT, Insert, Inserted, sizes
from intarsia.edits.kernel import KERNELS, Kernel, merge, sparsify
from intarsia.edits.placement import Placement, Runs, check_finite, gathered, memory, place, put, put_row, summed
from intarsia.edits.structured import BlockAffine, Everywhere, Multiplied, Tiled
from intarsia.edits.sum import Sum
from intarsia.edits.transformed import Transformed
from intarsia.edits.transforms import TRANSFORMS, Transform

__all__ = [
    "ACTIVATIONS", "INSERTED", "KERNELS", "KINDS", "PLACES", "SITS_AT", "TRANSFORMS", "BlockAffine", "Bottleneck",
    "Dense", "Edit", "Everywhere", "Insert", "Inserted", "Kernel", "Kronecker", "LowRank", "Multiplied", "Placement",
    "Rescaled", "Runs", "Sparse", "Sum", "Tiled", "Transform", "Transformed", "add", "build_edit", "check_finite",
    "columns", "elements", "gathered", "memory", "merge", "overlap", "place", "positions", "put", "put_row",
    "row_norms", "scale", "sizes", "sparsify", "summed", "to_dense", "want_numbers", "want_scale", "want_tensors",
]  # fmt: skip
