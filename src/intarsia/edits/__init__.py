"""Edits: the few kinds of change that a finished adapter makes, their algebra, and how they are placed into a weight."""

from intarsia.edits.ahead import Ahead, Call, Prefix, Prompt, Rows, run
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
    want_tensors,
)
from intarsia.edits.insert import AHEAD, INSERTED, PLACES, SITS_AT, Insert, Inserted, sizes, where
from intarsia.edits.kernel import KERNELS, Kernel, merge, sparsify
from intarsia.edits.placement import Placement, Runs, check_finite, gathered, memory, place, put, put_row, summed
from intarsia.edits.sum import Sum

__all__ = [
    "ACTIVATIONS", "AHEAD", "INSERTED", "KERNELS", "KINDS", "PLACES", "SITS_AT", "Ahead", "Bottleneck", "Call", "Dense", "Edit",
    "Insert", "Inserted", "Kernel", "Kronecker", "LowRank", "Placement", "Prefix", "Prompt", "Rescaled", "Rows", "Runs", "Sparse",
    "Sum", "add", "build_edit", "check_finite", "columns", "elements", "gathered", "memory", "merge", "overlap", "place",
    "positions", "put", "put_row", "row_norms", "run", "scale", "sizes", "sparsify", "summed", "to_dense", "want_numbers",
    "want_tensors", "where",
]  # fmt: skip
