"""What shrinks a base, by the names of the papers: what ``intarsia methods`` tells of it."""

from __future__ import annotations

from intarsia.registry import System


def systems() -> list[System]:
    """As rows; ``facts`` name the function to call and say in a sentence what it does."""
    return [
        System(
            id="lord",
            kind="shrinking",
            role="base-compression",
            title="LoRD",
            formula="y ~ Q Q^T (W x + b - mu) + mu",
            paper="arXiv:2309.14021",
            about="intarsia.shrink.factors",
            facts={
                "function": "intarsia.shrink.factorize",
                "command": "intarsia shrink MODEL OUT --data FILE --rank 0.7",
                "tells": "A linear layer becomes two thin ones that keep the directions in which its outputs vary.",
            },
        )
    ]
