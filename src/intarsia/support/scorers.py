"""Scorers: what ranks the entries of a weight to choose a support. Each is (site, start) -> (O, I) float scores.

A scorer is one function here; the higher score wins, and ties go to the lower flat index.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from intarsia.method import Start
from intarsia.site import Site

Scorer = Callable[[Site, Start], Tensor]


def magnitude(site: Site, start: Start) -> Tensor:
    """|W|. SHiRA-WM (Bhardwaj et al. 2024, section 3.1)."""
    return _wide(site.weight).abs()


def gradient(site: Site, start: Start) -> Tensor:
    """|G|, G the loss gradient summed over the calibration data. SHiRA-Grad (section 3.1)."""
    return _gradient(start).abs()


def snip(site: Site, start: Start) -> Tensor:
    """|W * G|: the first-order change of the loss when the entry is removed. SHiRA-SNIP (section 3.1)."""
    return (_wide(site.weight) * _gradient(start)).abs()


SCORERS: dict[str, Scorer] = {"magnitude": magnitude, "gradient": gradient, "snip": snip}
NEED_GRADIENT = frozenset({"gradient", "snip"})


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _gradient(start: Start) -> Tensor:
    if start.gradient is None:
        raise AssertionError("a scorer that needs the gradient was called without one")  # attach() gathers it
    return start.gradient
