"""Bases: how a layer stores its weight, how to read it, and how to store it in fewer bits."""

from intarsia.bases.convert import LOAD_IN, check_load_in, dequantise, quantise
from intarsia.bases.packing import Packing, differentiable, keep_bits, packing_of

__all__ = [
    "LOAD_IN", "Packing", "check_load_in", "dequantise", "differentiable", "keep_bits", "packing_of", "quantise",
]  # fmt: skip
