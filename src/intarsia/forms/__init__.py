"""Forms: the shapes of computation that many methods share. A form owns forward, fold, edit and restore."""

from intarsia.forms.ahead import Ahead
from intarsia.forms.carry import carried, carry
from intarsia.forms.chosen import SCHEDULES, SCORER_NAMES, Chosen
from intarsia.forms.competing import Competing
from intarsia.forms.coupled import Coupled
from intarsia.forms.delta import Delta
from intarsia.forms.insert import Insert
from intarsia.forms.joint import Joint, Part
from intarsia.forms.kernel import Kernel
from intarsia.forms.pair import Pair
from intarsia.forms.rescale import Rescale
from intarsia.forms.sparse import Sparse, auto_scale
from intarsia.forms.split import Split

__all__ = [
    "SCHEDULES",
    "SCORER_NAMES",
    "Ahead",
    "Chosen",
    "Competing",
    "Coupled",
    "Delta",
    "Insert",
    "Joint",
    "Kernel",
    "Pair",
    "Part",
    "Rescale",
    "Sparse",
    "Split",
    "auto_scale",
    "carried",
    "carry",
]
