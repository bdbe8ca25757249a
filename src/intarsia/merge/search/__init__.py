"""The search for the weights of a merge: a space, an objective, trials that are kept, and CMA-ES."""

from intarsia.merge.search.live import Live, drawn, hold_out
from intarsia.merge.search.objective import Gains, Objective
from intarsia.merge.search.outcome import Compared, Outcome
from intarsia.merge.search.picture import picture
from intarsia.merge.search.saving import lineage, save, trials_of
from intarsia.merge.search.search import Search, check_installed, pareto, search
from intarsia.merge.search.space import Dimension, Space, parameters_at, space_of
from intarsia.merge.search.trials import Trial, TrialFile
from intarsia.merge.search.weights import Task, check_skills, find_weights

__all__ = [
    "Compared", "Dimension", "Gains", "Live", "Objective", "Outcome", "Search", "Space", "Task", "Trial", "TrialFile",
    "check_installed", "check_skills", "drawn", "find_weights", "hold_out", "lineage", "parameters_at", "pareto", "picture", "save", "search",
    "space_of", "trials_of",
]  # fmt: skip
