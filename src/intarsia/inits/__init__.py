"""How low-rank updates start. Importing this package makes every initialiser of ours known by its name: one file, one start."""

from intarsia.inits import eva, pissa, usual  # noqa: F401  # they register themselves
from intarsia.inits.initialiser import INITIALISERS, Initialiser, find, initialiser, is_initialiser, make

__all__ = ["INITIALISERS", "Initialiser", "find", "initialiser", "is_initialiser", "make"]
