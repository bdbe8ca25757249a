"""The compressions by the names of their papers: what ``intarsia methods`` tells of them."""

from __future__ import annotations

from intarsia.registry import System


def systems() -> list[System]:
    """The compressions of papers, as rows; ``facts`` name the function to call and say in a sentence what it does."""
    return [
        System(
            id="compeft",
            kind="compression",
            role="serving",
            title="ComPEFT",
            formula="alpha std(t) sign(t) on the top share of |t|",
            paper="arXiv:2311.13171",
            about="intarsia.compress.sparsify",
            mergeable=True,
            facts={
                "function": "intarsia.compress.ternary",
                "command": "intarsia compress ADAPTER OUT --to ternary",
                "tells": "Signs of the largest numbers and one size for all of them: files 8 to 50 times smaller.",
            },
        ),
        System(
            id="binary-adapter",
            kind="compression",
            role="quantization",
            title="Binary and low-bit adapters, after training",
            formula="mu + sd q, q of 2^b medians of a normal",
            paper="arXiv:2307.16867",
            about="intarsia.compress.bits",
            mergeable=True,
            facts={
                "function": "intarsia.compress.in_bits",
                "command": "intarsia compress ADAPTER OUT --to bits --bits 2",
                "tells": "Every learned number in 1, 2, 4 or 8 bits; the training with rounding in it is not part of this.",
            },
        ),
    ]
