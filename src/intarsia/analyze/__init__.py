"""Analysis of finished adapters: what they change, by how much, of which rank, and what rounding leaves of it."""

from intarsia.analyze.change import (
    Group,
    Rounding,
    Spectrum,
    WeightChange,
    change_norm,
    group,
    invisible_share,
    layer_of,
    module_of,
    rounding,
    spectra,
    weight_changes,
)
from intarsia.analyze.inputs import input_norms
from intarsia.analyze.interference import Interference, Summand, interference
from intarsia.analyze.pair import Pair
from intarsia.analyze.pair_picture import interference_picture
from intarsia.analyze.picture import check_picture, picture, write_picture
from intarsia.analyze.product import awom, awor
from intarsia.analyze.spectrum import (
    change_of,
    effective_rank,
    energy_share,
    needs_weight,
    singular_values,
    spectrum,
    stable_rank,
)

__all__ = [
    "Group", "Interference", "Pair", "Rounding", "Spectrum", "Summand", "WeightChange", "awom", "awor", "change_norm",
    "change_of", "check_picture", "effective_rank", "energy_share", "group", "input_norms", "interference",
    "interference_picture", "invisible_share", "layer_of", "module_of", "needs_weight", "picture", "rounding",
    "singular_values", "spectra", "spectrum", "stable_rank", "weight_changes", "write_picture",
]  # fmt: skip
