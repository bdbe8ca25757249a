"""Allocators: who gets how much of a budget, while training runs."""

from intarsia.allocators.competition import budget, compete, score

__all__ = ["budget", "compete", "score"]
