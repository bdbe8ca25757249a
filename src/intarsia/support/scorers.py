"""Scorers: what ranks the entries of a weight to choose a support. Each is (site, start) -> (O, I) scores.

A scorer is one function: the highest scores win, and ties go to the lower flat index. :func:`scorer` declares what it needs
from calibration data, as fields of ``start``:

    gradient   (O, I)   the loss gradient of the base, summed over the batches
    fisher     (O, I)   the squares of the batches' gradients, summed: the empirical Fisher information's diagonal
    inputs     (I,)     ||x_j||: the norm of each input of the layer over all tokens; takes forward passes only
    magnitudes (I,)     sum |x_j| over them, likewise
    movement   (O, I)   |W1 - W0|: how far a first, dense training moved the weight (``intarsia.lottery``)

A scorer of another package is named ``"package.module:function"``. The module is imported when a support is chosen, never
because a file names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError, nearest
from intarsia.method import NEEDS, Start
from intarsia.registry import OUTSIDE, imported
from intarsia.site import Site

Scorer = Callable[[Site, Start], Tensor]
S = TypeVar("S", bound=Scorer)

SCORERS: dict[str, Scorer] = {}
# Scorers whose entries crowd into a few rows and columns, because a gradient is nearly of low rank and a few inputs are much
# larger than the others. A step on such a support weighs more: docs/learning-rate.md.
CROWDED = frozenset({"gradient", "snip", "fisher", "wanda", "activation"})


def scorer(*needs: str) -> Callable[[S], S]:
    """Decorator: what a scorer needs from calibration data (see the head of this file); nothing for none.

    One of this package is known by its name from then on.
    """
    unknown = [need for need in needs if need not in NEEDS]
    if unknown:
        raise IntarsiaError(f"a scorer cannot need {unknown[0]!r}; {nearest(unknown[0], NEEDS)}")

    def declare(function: S) -> S:
        function.needs = frozenset(needs)  # type: ignore[attr-defined]
        if function.__module__ == __name__:
            SCORERS[function.__name__] = function
        return function

    return declare


@scorer()
def magnitude(site: Site, start: Start) -> Tensor:
    """|W|. SHiRA-WM (Bhardwaj et al. 2024, section 3.1)."""
    return _wide(site.weight).abs()


@scorer("gradient")
def gradient(site: Site, start: Start) -> Tensor:
    """|G|, G the loss gradient summed over the calibration data. SHiRA-Grad (section 3.1)."""
    return start.given("gradient").abs()


@scorer("gradient")
def snip(site: Site, start: Start) -> Tensor:
    """|W * G|: the first-order change of the loss when the entry is removed. SHiRA-SNIP (section 3.1)."""
    return (_wide(site.weight) * start.given("gradient")).abs()


@scorer("inputs")
def wanda(site: Site, start: Start) -> Tensor:
    """|W_ij| ||x_j||: how much an entry contributes to its output (Sun et al. 2023, arXiv:2306.11695, section 3).

    The paper compares within each output, which is ``budget="neuron"``.
    """
    return _wide(site.weight).abs() * start.given("inputs")


@scorer("inputs")
def activation(site: Site, start: Start) -> Tensor:
    """||x_j||, the same in every row: with single entries it takes whole columns, ties going to the upper rows."""
    return start.given("inputs").expand(site.shape)


@scorer("fisher")
def fisher(site: Site, start: Start) -> Tensor:
    """sum over batches of G^2 (Sung et al. 2021, "FISH mask", arXiv:2111.09839, section 3.2).

    A batch stands for a sample; with batches of one row it is the paper's empirical Fisher information.
    """
    return start.given("fisher")


@scorer()
def residual(site: Site, start: Start) -> Tensor:
    """|W - W_r|: what the best approximation of rank r leaves, r = 16 and at most a quarter of the smaller side.

    So the support takes what a low-rank adapter of usual size could express worst. W_r comes from a randomised range
    finder with power iterations (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4), from the site's own generator: an
    exact decomposition of a 4096 x 4096 weight takes a minute.
    """
    W = _wide(site.weight)
    r = max(1, min(16, min(site.shape) // 4))
    sketch = torch.randn(site.shape[1], min(r + 16, *site.shape), generator=start.generator(), dtype=W.dtype)
    Q = torch.linalg.qr(W @ sketch.to(W.device)).Q  # (O, r + 16)
    for _ in range(4):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U: Tensor = Q @ torch.linalg.svd(Q.mT @ W, full_matrices=False).U[:, :r]  # (O, r)
    return (W - U @ (U.mT @ W)).abs()


@scorer("movement")
def movement(site: Site, start: Start) -> Tensor:
    """|W1 - W0| of a first, dense training: the lottery ticket (Ansell et al. 2022, arXiv:2110.07560, section 3)."""
    return start.given("movement")


# ------------------------------------------------------------------ by name
def is_scorer(name: str) -> bool:
    """Whether the name can be a scorer's: a known one, or one of the shape ``package.module:function``."""
    return name in SCORERS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is not None


def find(name: str) -> Scorer:
    """The scorer of that name; one of another package is imported.

    Raises:
        IntarsiaError: where there is none.
    """
    if name in SCORERS:
        return SCORERS[name]
    if ":" not in name:
        raise IntarsiaError(f"unknown scorer {name!r}; {nearest(name, SCORERS)}, or {OUTSIDE!r}")
    found: Scorer = imported("scorer", name)
    if not callable(found):
        raise IntarsiaError(f"scorer {name!r} is a {type(found).__name__}; expected a function (site, start) -> scores")
    return found


def needs_of(name: str) -> frozenset[str]:
    """What a scorer needs from calibration data: declared by :func:`scorer`, nothing where it is not."""
    return getattr(find(name), "needs", frozenset())


def score(name: str, site: Site, start: Start) -> Tensor:
    """The scores of a site. -> (O, I) float32 or wider, on the weight's device.

    Raises:
        IntarsiaError: when the scorer fails, or its scores are not finite numbers of the weight's shape.
    """
    function = find(name)
    try:
        scores = function(site, start)
    except IntarsiaError:
        raise
    except Exception as error:
        if name in SCORERS:
            raise
        raise IntarsiaError(f"{site.name}: the scorer {name!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(scores, Tensor) or tuple(scores.shape) != site.shape or scores.is_complex():
        found = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise IntarsiaError(
            f"{site.name}: the scorer {name!r} gave {found}; expected a score for every entry, {site.shape}"
        )
    scores = scores.detach().to(site.weight.device)
    if not scores.isfinite().all():
        raise IntarsiaError(
            f"{site.name}: the scorer {name!r} gave scores that are not finite; check the base and the calibration data"
        )
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
