"""Shrinking a base for good: fewer numbers in the model itself, before any adapter."""

from intarsia.shrink.factors import Directions, Factored, Layer, factorize, survey
from intarsia.shrink.known import systems
from intarsia.shrink.ranks import Trial, choose_shares
from intarsia.shrink.write import save

__all__ = [
    "Directions", "Factored", "Layer", "Trial", "choose_shares", "factorize", "save", "survey", "systems",
]  # fmt: skip
