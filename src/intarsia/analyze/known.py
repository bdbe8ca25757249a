"""The analyses by the names of their papers: what ``intarsia methods`` lists beside the methods."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Analysis:
    """One row: ``function`` is the dotted name to call."""

    id: str
    title: str
    formula: str
    paper: str
    function: str
    sentence: str


ANALYSES = {
    row.id: row
    for row in (
        Analysis(
            "intruder-dimensions",
            "Intruder dimensions",
            "max_i |u1_j . u0_i| < eps",
            "arXiv:2410.21228",
            "intarsia.analyze.adapter_intruders",
            "Leading singular vectors of the changed weight that the base's weight has no counterpart of, and their repair.",
        ),
        Analysis(
            "rankme",
            "RankMe",
            "exp(-sum p log p), p = s / sum(s) + eps",
            "arXiv:2210.02885",
            "intarsia.analyze.rankme_of",
            "Effective rank of embeddings or of a change of a weight, without labels.",
        ),
        Analysis(
            "matrix-nuclear-norm",
            "Matrix Nuclear-Norm",
            "sum of the largest ||H[:, j]|| / L",
            "arXiv:2410.10672",
            "intarsia.analyze.matrix_nuclear_norm",
            "How spread out the hidden states of a text are, without a decomposition.",
        ),
        Analysis(
            "lora-complexity-bounds",
            "LoRA complexity bounds",
            "max(|x W|, |x dW|) / sqrt(ln L)",
            "arXiv:2406.03136",
            "intarsia.analyze.norm_report",
            "Whether the norms of queries and keys are below the threshold for a gradient in almost linear time.",
        ),
        Analysis(
            "wm-lmc-analysis",
            "Weight matching and subspace alignment",
            "max_P <A, P B P'>; R(A, B)",
            "arXiv:2402.04051",
            "intarsia.analyze.subspace_alignment",
            "The order of units in which two MLPs lie closest, and how far two changes share their leading directions.",
        ),
    )
}
