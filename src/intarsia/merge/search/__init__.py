"""The search for the weights of a merge: a space, an objective, trials that are kept, and CMA-ES."""

from intarsia.merge.search.config import SearchConfig
from intarsia.merge.search.live import Live, drawn, hold_out
from intarsia.merge.search.objective import Gains, Objective
from intarsia.merge.search.outcome import Compared, Outcome
from intarsia.merge.search.picture import check_picture, picture
from intarsia.merge.search.search import Search, pareto, search
from intarsia.merge.search.space import Dimension, Space, parameters_at, space_of
from intarsia.merge.search.trials import Trial, TrialFile
from intarsia.merge.search.weights import Task, check_skills, find_weights

__all__ = [
    "Compared", "Dimension", "Gains", "Live", "Objective", "Outcome", "Search", "SearchConfig", "Space", "Task", "Trial",
    "TrialFile", "check_picture", "check_skills", "drawn", "find_weights", "hold_out", "parameters_at", "pareto", "picture",
    "search", "space_of",
]  # fmt: skip
