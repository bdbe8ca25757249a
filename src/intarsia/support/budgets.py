"""Budgets: how many units each weight gets, and how they lie in it.

    weight   the same share of every weight
    neuron   that too, and as many units in each output row as in any other (as Wanda compares)
    model    the best units of the whole model: one threshold for all weights, the count exact
    layer    the same total, each weight's count in proportion to its mean score

For the last two the counts follow from the scores of all weights, which may lie in files mapped into memory: one weight at a
time is worked on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from intarsia.errors import IntarsiaError

BUDGETS = ("weight", "neuron", "model", "layer")
OF_THE_MODEL = frozenset({"model", "layer"})
DIGIT = 16  # bits that one pass over the scores settles


def allocate(budget: str, scores: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many of ``total`` units each site gets, from the scores (units,) of each. Exactly ``total`` in sum.

    Where many units stand at the threshold, earlier sites come first, and in a site lower indices, as in ``top``.
    """
    if budget == "model":
        return _above_threshold(scores, total)
    means = {name: float(each.double().mean()) for name, each in scores.items()}
    below = [name for name, mean in means.items() if mean < 0]
    if below:
        raise IntarsiaError(f"{below[0]}: its mean score is {means[below[0]]:g}; a budget by layer needs 0 or more")
    return proportional(means, {name: len(each) for name, each in scores.items()}, total)


def proportional(weights: Mapping[str, float], room: Mapping[str, int], total: int) -> dict[str, int]:
    """``total`` shared out in proportion to the weights, whole numbers, nobody more than its room; what is left over goes to
    the others. The largest remainders are rounded up, earlier ones first."""
    counts: dict[str, int] = {}
    left = min(total, sum(room.values()))
    while True:
        open_ = [name for name in room if name not in counts]
        of = weights if any(weights[name] > 0 for name in open_) else room
        whole = sum(of[name] for name in open_)
        ideal = {name: left * of[name] / whole if whole else 0.0 for name in open_}
        full = [name for name in open_ if ideal[name] >= room[name]]
        if not full:
            break
        for name in full:
            counts[name] = room[name]
            left -= room[name]
    counts |= {name: int(share) for name, share in ideal.items()}
    missing = left - sum(int(share) for share in ideal.values())
    for name in sorted(ideal, key=lambda name: int(ideal[name]) - ideal[name])[:missing]:
        counts[name] += 1
    return {name: counts[name] for name in room}


def top_of_rows(scores: Tensor, rows: int, count: int) -> Tensor:
    """The best ``count // rows`` units of each row; equal scores go to the lower index. (rows * n,) -> (count,) sorted."""
    each = count // rows
    if not each:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    table = scores.view(rows, -1)
    threshold = table.topk(each, dim=1).values[:, -1:]
    above, level = table > threshold, table == threshold
    level &= level.cumsum(1) <= each - above.sum(1, keepdim=True)
    return (above | level).view(-1).nonzero().squeeze(1)


def _above_threshold(scores: Mapping[str, Tensor], total: int) -> dict[str, int]:
    threshold, level = kth_largest(list(scores.values()), total)
    bits, counts = _bits(list(scores.values())), {}
    for name, each in scores.items():
        keys = _ordered(each, bits)
        at = min(level, int((keys == threshold).sum()))
        counts[name] = int((keys > threshold).sum()) + at
        level -= at
    return counts


def kth_largest(scores: Sequence[Tensor], k: int) -> tuple[int, int]:
    """The k-th largest of all numbers together, as an ordered integer, and how many of those equal to it are among the k.

    By digits from the top: a histogram of 65536 counts for every 16 bits, and never more than one tensor at a time.
    """
    bits = _bits(scores)
    prefix, left = 0, k
    for shift in range(bits - DIGIT, -1, -DIGIT):
        first = shift == bits - DIGIT
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for each in scores:
            keys = _ordered(each, bits)
            digits = keys >> shift
            if first:
                digits += 1 << DIGIT - 1  # the sign is in the top digit
            else:
                digits = digits[(keys >> shift + DIGIT) == prefix] & (1 << DIGIT) - 1
            counts += digits.bincount(minlength=1 << DIGIT).cpu()
        from_the_top = counts.flip(0).cumsum(0)
        place = int((from_the_top < left).sum())
        digit = (1 << DIGIT) - 1 - place
        left -= int(from_the_top[place] - counts[digit])
        prefix = digit - (1 << DIGIT - 1) if first else prefix << DIGIT | digit
    return prefix, left


def _bits(scores: Sequence[Tensor]) -> int:
    return 64 if any(each.dtype == torch.float64 for each in scores) else 32


def _ordered(scores: Tensor, bits: int) -> Tensor:
    """Integers in the same order as the floating numbers. (n,) -> (n,) int64"""
    wide, whole = (torch.float64, torch.int64) if bits == 64 else (torch.float32, torch.int32)
    pattern = (scores.to(wide) + 0.0).view(whole)  # + 0.0: -0.0 is 0.0
    return torch.where(pattern < 0, pattern ^ torch.iinfo(whole).max, pattern).to(torch.int64)
