"""Importing this package registers every merge rule: one file, one rule."""

from intarsia.merge.rules.sum import Sum
from intarsia.merge.rules.ties import Ties

__all__ = ["Sum", "Ties"]
