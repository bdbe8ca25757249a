"""Importing this package registers every merge rule: one file, one rule."""

from intarsia.merge.rules.breadcrumbs import Breadcrumbs
from intarsia.merge.rules.dare import Dare
from intarsia.merge.rules.della import Della
from intarsia.merge.rules.lego import Lego
from intarsia.merge.rules.magnitude import Magnitude
from intarsia.merge.rules.mwa import Mwa
from intarsia.merge.rules.sum import Sum
from intarsia.merge.rules.svd import Svd
from intarsia.merge.rules.ties import Ties

__all__ = ["Breadcrumbs", "Dare", "Della", "Lego", "Magnitude", "Mwa", "Sum", "Svd", "Ties"]
