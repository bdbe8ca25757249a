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
    rounding,
    spectra,
    weight_changes,
)
from intarsia.analyze.picture import picture
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
    "Group", "Rounding", "Spectrum", "WeightChange", "change_norm", "change_of", "effective_rank",
    "energy_share", "group", "invisible_share", "layer_of", "needs_weight", "picture", "rounding", "singular_values",
    "spectra", "spectrum", "stable_rank", "weight_changes",
]  # fmt: skip
