"""Analysis of finished adapters: what they change, by how much, of which rank, and what rounding leaves of it."""

from intarsia.analyze.alignment import subspace_alignment
from intarsia.analyze.assignment import assignment
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
from intarsia.analyze.intruders import SVD, Direction, Intruders, adapter_intruders, check_settings, intruders
from intarsia.analyze.known import systems
from intarsia.analyze.matching import Matching, barrier, between, permuted, weight_matching
from intarsia.analyze.norms import HeadNorms, NormReport, ScoreBound, norm_report
from intarsia.analyze.nuclear_norm import hidden_states, matrix_entropy, matrix_nuclear_norm
from intarsia.analyze.pair import Pair
from intarsia.analyze.pair_picture import interference_picture
from intarsia.analyze.picture import Heat, check_picture, heat, intruder_heat, picture, write_picture
from intarsia.analyze.product import awom, awor
from intarsia.analyze.rankme import rankme, rankme_of
from intarsia.analyze.repair import Repaired, check_factor, repair, repaired, truncated
from intarsia.analyze.report import report
from intarsia.analyze.spectrum import (
    change_of,
    effective_rank,
    energy_share,
    needs_weight,
    numerical_rank,
    singular_values,
    spectrum,
    stable_rank,
)

__all__ = [
    "Direction", "Group", "HeadNorms", "Heat", "Interference", "Intruders", "Matching", "NormReport", "Pair",
    "Repaired", "Rounding", "ScoreBound", "Spectrum", "Summand", "SVD", "WeightChange", "adapter_intruders",
    "assignment", "awom", "awor", "barrier", "between", "change_norm", "change_of", "check_factor", "check_picture",
    "check_settings", "effective_rank", "energy_share", "group", "heat", "hidden_states", "input_norms",
    "interference", "interference_picture", "intruder_heat", "intruders", "invisible_share", "layer_of",
    "matrix_entropy", "matrix_nuclear_norm", "module_of", "needs_weight", "norm_report", "numerical_rank", "permuted",
    "picture", "rankme", "rankme_of", "repair", "repaired", "report", "rounding", "singular_values", "spectra",
    "spectrum", "stable_rank", "subspace_alignment", "systems", "truncated", "weight_changes", "weight_matching",
    "write_picture",
]  # fmt: skip
