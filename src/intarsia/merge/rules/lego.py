"""LoRA-LEGO: clusters of single ranks.    m_j = (a_j, b_j),  D = lambda sqrt(r / k) sum_c b_c a_c,  (a_c, b_c) = mu_c mean |m| / |mu_c|

Zhao et al. 2024, "Merging LoRAs like Playing LEGO", arXiv:2409.16167. Every rank of every adapter is a unit m = (row of A, column
of B); all units of a weight are clustered (k-means, k-means++ starts from the seed and the weight's name), and each cluster
becomes one rank: its mean mu_c, at the mean length of its members (parameter reweighting), the whole times sqrt(r / k) (output
reweighting; r is the rank of the adapters, their mean where it differs). Takes adapters of different ranks; shrinks one alone.

An adapter's scale and weight go into its units, sqrt(|w s|) on both sides and the sign to B, so that a and b stay balanced. The
unit (c a, b / c) is the same rank at another point: ``balance`` makes |a| = |b| first. Opposite units leave a cluster at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.edits import LowRank
from intarsia.interop.views import as_low_rank
from intarsia.merge.clusters import clusters, means
from intarsia.merge.rule import KINDS, Merged, Rule, Term, Where, register
from intarsia.method import option


@register
@dataclass(frozen=True)
class Lego(Rule):
    rank: int | None = option(
        None, "rank k of what is made; none: that of the adapters, their rounded mean where it differs"
    )
    balance: bool = option(False, "give the two halves of every unit one length before clustering")
    output_scale: bool = option(
        True, "multiply by sqrt(r / k), which keeps the output's variance where the rank changes"
    )

    name, id, title, paper = "lego", "lora-lego", "LoRA-LEGO", "arXiv:2409.16167"
    draws = True
    formula = "lambda sqrt(r / k) sum b_c a_c, of k clusters of ranks"
    takes = frozenset({KINDS[1]})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rank is None or self.rank >= 1, "rank", "1 or more")

    def merge(self, terms: Sequence[Term], where: Where) -> Merged:
        views = [as_low_rank(term.edit) for term in terms]
        low = [view for view in views if isinstance(view, LowRank)]  # all of them: it takes no other
        units = torch.cat([_units(view, term.weight, self.balance) for view, term in zip(low, terms, strict=True)])
        mean_rank = sum(view.A.shape[0] for view in low) / len(low)
        k = min(self.rank or max(1, round(mean_rank)), len(units))
        made = centres(units, clusters(units, k, where.key()), k)
        shape, dtype = low[0].shape, torch.promote_types(low[0].A.dtype, torch.float32)
        A, B = made[:, : shape[1]].to(dtype), made[:, shape[1] :].mT.to(dtype)
        return Merged(
            LowRank(shape, B.contiguous(), A.contiguous(), math.sqrt(mean_rank / k) if self.output_scale else 1.0)
        )


def _units(edit: LowRank, weight: float, balance: bool) -> Tensor:
    """The ranks of an edit, one a row, its scale and weight in them. -> (r, I + O) float64."""
    factor = weight * edit.scale
    a, b = edit.A.double(), edit.B.double().mT
    if balance:
        long, high = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
        even = torch.where((long > 0) & (high > 0), (high / long).sqrt(), 1.0)
        a, b = a * even, b / even
    root = math.sqrt(abs(factor))
    return torch.cat([root * a, math.copysign(root, factor) * b], dim=1)


def centres(units: Tensor, labels: Tensor, k: int) -> Tensor:
    """The mean of each cluster at the mean length of its members; 0 where the members cancel. (n, d), (n,) -> (k, d)."""
    mean = means(units, labels, k)
    length = means(units.norm(dim=1, keepdim=True), labels, k)
    norm = mean.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, mean * (length / norm), 0.0)
