"""Forms: the shapes of computation that many methods share. A form owns forward, fold, edit and restore."""

from intarsia.forms.carry import carried, carry
from intarsia.forms.chosen import SCHEDULES, SCORER_NAMES, Chosen
from intarsia.forms.competing import Competing
from intarsia.forms.coupled import Coupled
from intarsia.forms.delta import Delta, Remade
from intarsia.forms.factored import Factored
from intarsia.forms.insert import Insert
from intarsia.forms.joint import Joint, Part
from intarsia.forms.kernel import Kernel
from intarsia.forms.mixture import Mixture
from intarsia.forms.pair import Pair
from intarsia.forms.rescale import Rescale
from intarsia.forms.sparse import Sparse, auto_scale
from intarsia.forms.split import Split

__all__ = [
    "SCHEDULES",
    "SCORER_NAMES",
    "Chosen",
    "Competing",
    "Coupled",
    "Delta",
    "Factored",
    "Insert",
    "Joint",
    "Kernel",
    "Mixture",
    "Pair",
    "Part",
    "Remade",
    "Rescale",
    "Sparse",
    "Split",
    "auto_scale",
    "carried",
    "carry",
]
