"""What to compress to: density and alpha by held-out data, or the density that fills a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from intarsia.compress.numbers import Progress
from intarsia.compress.sizes import folder_bytes
from intarsia.compress.sparsify import check_density, ternary
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)  # the authors' grids
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
STEPS = 12  # of the search for a budget: the density to a factor of about 1.002


@dataclass(frozen=True)
class Trial:
    """One point of the grid, and what was measured there."""

    density: float
    alpha: float
    loss: float


def search(
    adapter: Adapter,
    measure: Callable[[Adapter], float],
    densities: Sequence[float] = DENSITIES,
    alphas: Sequence[float] = ALPHAS,
    progress: Progress | None = None,
) -> tuple[Adapter, list[Trial]]:
    """ComPEFT at every density and alpha. -> the one of the least loss (of equals the smallest), and all trials.

    Args:
        measure: the loss of an adapter, on data that is not used to judge the outcome.

    Raises:
        IntarsiaError: for an empty grid, and as :func:`intarsia.compress.ternary`.
    """
    grid = [(density, alpha) for density in sorted(densities) for alpha in alphas]
    if not grid:
        raise IntarsiaError("there is no density or no alpha to try")
    trials: list[Trial] = []
    best: tuple[float, Adapter] | None = None
    for density, alpha in grid:
        made = ternary(adapter, density, alpha)
        trials.append(Trial(density, alpha, measure(made)))
        if best is None or trials[-1].loss < best[0]:
            best = trials[-1].loss, made
        if progress:
            progress(len(trials), len(grid), f"density {density:g}, alpha {alpha:g}: loss {trials[-1].loss:.4f}")
    assert best is not None
    return best[1], trials


def within(most: int, make: Callable[[float], Adapter], progress: Progress | None = None) -> Adapter:
    """The adapter of the highest density whose folder takes at most so many bytes, as it is written.

    Args:
        make: the adapter at a density.

    Raises:
        IntarsiaError: where even the smallest one takes more, and how much.
    """
    low, high, best = 0.0, 1.0, make(1.0)
    if folder_bytes(best) <= most:
        return best
    least = 0
    for step in range(STEPS):
        middle = (low + high) / 2
        check_density(middle)
        made = make(middle)
        size = folder_bytes(made)
        if size <= most:
            low, best = middle, made
        else:
            high, least = middle, size
        if progress:
            progress(step + 1, STEPS, f"density {middle:.3g}: {size:,} bytes")
    if not low:
        raise IntarsiaError(
            f"a budget of {most:,} bytes is too small: at a density of {high:.2g} it takes {least:,}, most of it names and digests"
        )
    return best
