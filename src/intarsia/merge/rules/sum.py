"""Weighted sum, exact on the edits.    W' = W + lambda sum_i w_i (fold_i(W) - W)

Task arithmetic (Ilharco et al. 2022, arXiv:2212.04089) on adapters. Sparse edits are summed on the union of their supports,
low ranks are put side by side, and what is neither stays a sum of its parts, DoRA too: nothing is approximated. It is what
``Deck.fuse`` sets in. ``normalize`` makes an average of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intarsia.edits import add, scale
from intarsia.merge.elementwise import total_weight
from intarsia.merge.rule import KINDS, Merged, Rule, Term, Where, register
from intarsia.method import option


@register
@dataclass(frozen=True)
class Sum(Rule):
    normalize: bool = option(False, "divide by the sum of the weights")

    name, title, paper = "sum", "Weighted sum", "arXiv:2212.04089"
    formula = "lambda sum w_i D_i"
    takes = frozenset(KINDS)

    def merge(self, terms: Sequence[Term], where: Where) -> Merged:
        by = total_weight(where) if self.normalize else 1.0
        return Merged(add(*(scale(term.edit, term.weight / by) for term in terms)))
