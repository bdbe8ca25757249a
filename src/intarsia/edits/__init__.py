"""Edits: the few kinds of change that a finished adapter makes, their algebra, and how they are placed into a weight."""

from intarsia.edits.activated import Activated, Seen, is_tokens
from intarsia.edits.ahead import Ahead, Call, Prefix, Prompt, Rows, run
from intarsia.edits.algebra import add, overlap, positions, scale, to_dense
from intarsia.edits.blocks import Blocks, diagonal
from intarsia.edits.bottleneck import ACTIVATIONS, Bottleneck
from intarsia.edits.core import Core, thin, times
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
    joined,
    row_norms,
    want_numbers,
    want_scale,
    want_tensors,
    without_scale,
)
from intarsia.edits.insert import AHEAD, INSERTED, PLACES, SITS_AT, Insert, Inserted, sizes, where
from intarsia.edits.kernel import KERNELS, Kernel, merge, sparsify
from intarsia.edits.placement import Placement, Runs, check_finite, gathered, memory, place, put, put_row, summed
from intarsia.edits.routed import GATES, Routed, Routing
from intarsia.edits.seeded import BASES, ORDERS, Combined, Scaled, bases, combined_factors, scaled_factors
from intarsia.edits.sequential import Sequential
from intarsia.edits.structured import BlockAffine, Everywhere, Multiplied, Tiled
from intarsia.edits.sum import Sum
from intarsia.edits.transformed import Transformed
from intarsia.edits.transforms import TRANSFORMS, Transform

__all__ = [
    "ACTIVATIONS", "AHEAD", "BASES", "GATES", "INSERTED", "KERNELS", "KINDS", "ORDERS", "PLACES", "SITS_AT",
    "TRANSFORMS", "Activated", "Ahead", "BlockAffine", "Blocks", "Bottleneck", "Call", "Combined", "Core", "Dense",
    "Edit", "Everywhere", "Insert", "Inserted", "Kernel", "Kronecker", "LowRank", "Multiplied", "Placement",
    "Prefix", "Prompt", "Rescaled", "Routed", "Routing", "Rows", "Runs", "Scaled", "Seen", "Sequential", "Sparse",
    "Sum", "Tiled", "Transform", "Transformed", "add", "bases", "build_edit", "check_finite", "columns",
    "combined_factors", "diagonal", "elements", "gathered", "is_tokens", "joined", "memory", "merge", "overlap",
    "place", "positions", "put", "put_row", "row_norms", "run", "scale", "scaled_factors", "sizes", "sparsify",
    "summed", "thin", "times", "to_dense", "want_numbers", "want_scale", "want_tensors", "where", "without_scale",
]  # fmt: skip
