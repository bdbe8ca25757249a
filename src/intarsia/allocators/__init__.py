"""Allocators: who gets how much of a budget, and who trains when, while training runs."""

from intarsia.allocators.allocator import Allocator, Draws, build, known, register, systems
from intarsia.allocators.ist import Ist
from intarsia.allocators.reallocation import reallocate, told
from intarsia.allocators.turns import Turns, damped, layer_of

__all__ = [
    "Allocator", "Draws", "Ist", "Turns", "build", "damped", "known", "layer_of", "reallocate", "register", "systems", "told",
]  # fmt: skip
