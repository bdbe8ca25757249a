"""Ranks by layer type: how far can each type be cut alone before the model is worse by more than a threshold?

As LoRD does it (Kaushal et al. 2023, section 3.2): for each type of layer, the last part of its name, the ranks are tried from the
highest down with all other layers whole; the lowest one whose measure stays within the threshold is kept, and all types are
cut together in the end, which is worse than each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from intarsia.bases.thin import put
from intarsia.calibrate import Progress
from intarsia.shrink.factors import Directions, factorize

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclass(frozen=True)
class Trial:
    """One type of layers cut to a share of its rank, all others whole."""

    kind: str
    share: float
    measured: float
    worse: float  # as a share of what the whole model measures


def choose_shares(
    model: nn.Module,
    directions: Mapping[str, Directions],
    measure: Callable[[nn.Module], float],
    *,
    shares: Sequence[float] = SHARES,
    threshold: float = 0.01,
    multiple: int = 1,
    progress: Progress | None = None,
) -> tuple[dict[str, float], list[Trial]]:
    """The lowest share of the rank for each type of layer, for :func:`factorize`; types that bear none are not named. -> shares, trials.

    Args:
        measure: what is to stay low, such as the perplexity on held-out text. The model is as before when this returns.
        threshold: how much higher it may be for one type cut alone, as a share: 0.01 is one percent.
    """
    before, chosen, trials = measure(model), {}, []
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in directions))
    for number, kind in enumerate(kinds, 1):
        mine = {name: one for name, one in directions.items() if name.rpartition(".")[2] == kind}
        for share in sorted(shares, reverse=True):
            whole = {name: model.get_submodule(name) for name in mine}
            try:
                # Also where it takes more numbers: how much a cut hurts is asked, not yet whether it pays.
                factorize(model, mine, share, multiple=multiple, always=True)
                measured = measure(model)
            finally:
                put(model, whole)
            trials.append(Trial(kind, share, measured, measured / before - 1))
            if not trials[-1].worse <= threshold:
                break
            chosen[kind] = share
        if progress:
            progress(number, len(kinds), "types of layers")
    return chosen, trials
