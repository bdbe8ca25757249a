"""Forms: the shapes of computation that many methods share. A form owns forward, fold, edit and restore."""

from intarsia.forms.ahead import Ahead
from intarsia.forms.carry import carried, carry
from intarsia.forms.chosen import SCHEDULES, SCORER_NAMES, Chosen
from intarsia.forms.competing import Competing
from intarsia.forms.coupled import Coupled
from intarsia.forms.delta import Delta, Remade
from intarsia.forms.factored import Factored
from intarsia.forms.gated import Gated
from intarsia.forms.growing import Growing
from intarsia.forms.guided import Guided
from intarsia.forms.importance import Sensed, falling, smooth
from intarsia.forms.insert import Insert
from intarsia.forms.joint import Joint, Part
from intarsia.forms.kernel import Kernel
from intarsia.forms.mixture import Mixture
from intarsia.forms.nested import Nested
from intarsia.forms.paced import Paced
from intarsia.forms.pair import Pair
from intarsia.forms.rescale import Rescale
from intarsia.forms.sparse import Sparse, auto_scale
from intarsia.forms.split import Split
from intarsia.forms.structured import Structured, shared_out
from intarsia.forms.threshold import HEIGHTS, soft, soft_in_turns

__all__ = [
    "HEIGHTS",
    "SCHEDULES",
    "SCORER_NAMES",
    "Ahead",
    "Chosen",
    "Competing",
    "Coupled",
    "Delta",
    "Factored",
    "Gated",
    "Growing",
    "Guided",
    "Insert",
    "Joint",
    "Kernel",
    "Mixture",
    "Nested",
    "Paced",
    "Pair",
    "Part",
    "Remade",
    "Rescale",
    "Sensed",
    "Sparse",
    "Split",
    "Structured",
    "auto_scale",
    "carried",
    "carry",
    "falling",
    "shared_out",
    "smooth",
    "soft",
    "soft_in_turns",
]
