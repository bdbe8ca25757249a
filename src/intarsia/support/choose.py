"""Choosing a support: granularity x scorer x count -> sorted unit indices, the same on every device and thread count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from intarsia.method import Start
from intarsia.site import Site
from intarsia.support.budgets import top_of_rows
from intarsia.support.granularity import Granularity, Shape
from intarsia.support.permutation import sample, sample_free, sample_free_rows, sample_rows
from intarsia.support.scorers import score


@dataclass(frozen=True)
class Drawn:
    """A random support as what draws it: ``count`` of so many units, or as many in each of ``rows`` output rows."""

    key: int
    rows: int | None = None

    def index(self, units: int, count: int, free: Tensor | None = None) -> Tensor:
        """The support, of the ``free`` units (units,) alone where they are given. -> (count,) sorted int64."""
        if self.rows is None:
            return sample(units, count, self.key) if free is None else sample_free(free, count, self.key)
        each, of_each = units // self.rows, count // self.rows
        if free is None:
            index = sample_rows(self.rows, each, of_each, self.key)
        else:
            index = sample_free_rows(free.view(self.rows, each), of_each, self.key)
        return (index + torch.arange(self.rows)[:, None] * each).view(-1)

    @classmethod
    def of(cls, index: Tensor, shape: Shape, units: int, key: int) -> Self | None:
        """What draws this sorted index of 0..units-1 of a weight with the key, if it was drawn so; otherwise None."""
        index, rows, count = index.to(torch.int64), shape[0], len(index)
        ways = [cls(key)]
        if count and count % rows == 0 and units % rows == 0:
            row = index.view(rows, -1) // (units // rows)
            ways += [cls(key, rows)] if bool((row == torch.arange(rows)[:, None]).all()) else []
        return next((drawn for drawn in ways if torch.equal(drawn.index(units, count), index)), None)


def choose(
    granularity: Granularity, scorer: str, count: int, site: Site, start: Start, offset: int = 0, by_row: bool = False
) -> Tensor:
    """``count`` units of the weight, none of which holds an entry of ``site.avoid``. -> (count,) sorted int64, on its device.

    Args:
        by_row: as many in each output row as in any other; of elements or lines.

    Raises:
        IntarsiaError: when the scorer fails or gives no finite numbers (a broken base or calibration).
    """
    rows, units, free = site.shape[0], granularity.units(site.shape), free_units(granularity, site)
    if scorer == "random":
        index = Drawn(start.key, rows if by_row else None).index(units, count, free)
    elif scorer == "struct":
        index = struct(site.shape, count, offset, free)
    else:
        scores = granularity.reduce(score(scorer, site, start))
        if free is not None:
            scores = scores.masked_fill(~free.to(scores.device), -torch.inf)
        index = top_of_rows(scores, rows, count) if by_row else top(scores, count)
    return index.to(site.weight.device)


def free_units(granularity: Granularity, site: Site) -> Tensor | None:
    """Which units have no entry that is to be avoided. -> (units,) bool on the CPU; None: nothing is to be avoided."""
    if site.avoid is None:
        return None
    rows, columns = site.shape
    taken = torch.zeros(rows * columns).index_fill_(0, site.avoid, 1.0)
    return granularity.reduce(taken.view(rows, columns)) == 0


def free_count(granularity: Granularity, site: Site) -> int:
    """How many units have no entry that is to be avoided."""
    free = free_units(granularity, site)
    return granularity.units(site.shape) if free is None else int(free.sum())


def top(scores: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` largest scores, sorted; equal scores go to the lower index. (n,) -> (count,)."""
    # topk breaks ties as it likes, and a bf16 weight has thousands of equal magnitudes at the threshold.
    threshold = scores.topk(count).values[-1]
    above = (scores > threshold).nonzero().squeeze(1)
    level = (scores == threshold).nonzero().squeeze(1)[: count - len(above)]
    return torch.cat([above, level]).sort().values


def struct(shape: Shape, count: int, offset: int = 0, free: Tensor | None = None) -> Tensor:
    """SHiRA-Struct: the main diagonal, then evenly spaced whole rows from ``offset``, ``count`` entries exactly.

    The paper sets the spacing f, and the count follows; here the count is given, as for every other scorer: the last
    row is filled from the left as far as the count goes. A count below the diagonal's takes its first entries.

    Args:
        free: (O * I,) bool, the entries that may be taken. The diagonal is left out where it is not free, and where the rows
            from ``offset`` on are not, those from the next offset follow.
    """
    rows, columns = shape
    may = torch.ones(rows * columns, dtype=torch.bool) if free is None else free.clone()
    diagonal = torch.arange(min(rows, columns)) * (columns + 1)
    diagonal = diagonal[may[diagonal]][:count]
    may[diagonal] = False
    left = count - len(diagonal)
    wanted = -(-left // columns) + 1  # one more than whole rows: the diagonal entries in them are taken already
    spacing = max(1, rows // wanted)
    spaced = ((offset + more + i * spacing) % rows for more in range(spacing) for i in range(rows // spacing))
    picked = [diagonal]
    for row in dict.fromkeys([*spaced, *range(rows)]):
        if left <= 0:
            break
        entries = torch.arange(columns) + row * columns
        entries = entries[may[entries]][:left]
        picked.append(entries)
        left -= len(entries)
    return torch.cat(picked).sort().values
