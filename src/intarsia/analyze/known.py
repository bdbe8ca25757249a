"""The analyses by the names of their papers: what ``intarsia methods`` tells of them."""

from __future__ import annotations

from intarsia.registry import System


def systems() -> list[System]:
    """The analyses of papers, as rows; ``facts`` name the function to call and say in a sentence what it tells."""
    return [
        _analysis(
            "intruder-dimensions",
            "Intruder dimensions",
            "max_i |u1_j . u0_i| < eps",
            "arXiv:2410.21228",
            "intruders",
            "intarsia.analyze.adapter_intruders",
            "Leading singular vectors of the changed weight that the base's weight has no counterpart of, and their repair.",
        ),
        _analysis(
            "rankme",
            "RankMe",
            "exp(-sum p log p), p = s / sum(s) + eps",
            "arXiv:2210.02885",
            "rankme",
            "intarsia.analyze.rankme_of",
            "Effective rank of embeddings or of a change of a weight, without labels.",
        ),
        _analysis(
            "matrix-nuclear-norm",
            "Matrix Nuclear-Norm",
            "sum of the largest ||H[:, j]|| / L",
            "arXiv:2410.10672",
            "nuclear_norm",
            "intarsia.analyze.matrix_nuclear_norm",
            "How spread out the hidden states of a text are, without a decomposition.",
        ),
        _analysis(
            "lora-complexity-bounds",
            "LoRA complexity bounds",
            "max(|x W|, |x dW|) / sqrt(ln L)",
            "arXiv:2406.03136",
            "norms",
            "intarsia.analyze.norm_report",
            "Whether the norms of queries and keys are below the threshold for a gradient in almost linear time.",
        ),
        _analysis(
            "wm-lmc-analysis",
            "Weight matching and subspace alignment",
            "max_P <A, P B P'>; R(A, B)",
            "arXiv:2402.04051",
            "matching",
            "intarsia.analyze.subspace_alignment",
            "The order of units in which two MLPs lie closest, and how far two changes share their leading directions.",
        ),
    ]


def _analysis(id: str, title: str, formula: str, paper: str, file: str, function: str, sentence: str) -> System:
    facts = {"function": function, "tells": sentence}
    return System(id, "analysis", "analysis", title, formula, paper, f"intarsia.analyze.{file}", facts=facts)
