"""Compress: smaller adapters that still have the skill. Functions from adapters to adapters; files are small because the store sees what they are.

Each says in ``about["compressed"]`` what was done, and to which adapter.
"""

from intarsia.compress.bitmasks import Bitmasks, bitmasks, distance, dot
from intarsia.compress.bits import in_bits
from intarsia.compress.known import systems
from intarsia.compress.numbers import learned
from intarsia.compress.rank import balanced, change_error, to_low_rank, to_prefix, to_sparse
from intarsia.compress.search import ALPHAS, DENSITIES, Trial, search, within
from intarsia.compress.sizes import Size, folder_bytes, sizes
from intarsia.compress.sparsify import prune, stc, ternary
from intarsia.compress.targets import TARGETS, Target, check_options, compressed

__all__ = [
    "ALPHAS", "DENSITIES", "TARGETS", "Bitmasks", "Size", "Target", "Trial", "balanced", "bitmasks", "change_error", "check_options",
    "compressed", "distance", "dot", "folder_bytes", "in_bits", "learned", "prune", "search", "sizes", "stc", "systems", "ternary",
    "to_low_rank", "to_prefix", "to_sparse", "within",
]  # fmt: skip
