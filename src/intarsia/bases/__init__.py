"""Bases: how a layer stores its weight, how to read it, how to store it in fewer bits, and how to make it smaller or worse."""

from intarsia.bases.convert import LOAD_IN, check_load_in, dequantise, quantise
from intarsia.bases.lossy import degrade, pruned, rounded, two_of_four
from intarsia.bases.packing import Packing, differentiable, keep_bits, packing_of
from intarsia.bases.thin import Thin, make_room, read_ranks

__all__ = [
    "LOAD_IN", "Packing", "Thin", "check_load_in", "degrade", "dequantise", "differentiable", "keep_bits", "make_room",
    "packing_of", "pruned", "quantise", "read_ranks", "rounded", "two_of_four",
]  # fmt: skip
