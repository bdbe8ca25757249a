"""Merging: one adapter of several, by a rule, on their edits."""

from intarsia.merge import rules  # registers them
from intarsia.merge.making import check_kinds, made, merge, named, reweighted
from intarsia.merge.plan import Plan, Share, Wanted, settle
from intarsia.merge.recipe import Part, Recipe, load_recipe, make_recipe, schema
from intarsia.merge.retained import FUSED, Retained, check_names, concept_loss, forgetting, measure, retained_share
from intarsia.merge.retained_picture import retained_picture
from intarsia.merge.rule import (
    KINDS,
    VARIANTS,
    Merged,
    Rule,
    Term,
    Where,
    build,
    changed,
    each,
    fields_of,
    find,
    known_rules,
    register,
    systems,
)

__all__ = [
    "FUSED", "KINDS", "Merged", "Part", "Plan", "Recipe", "Retained", "Rule", "Share", "Term", "VARIANTS", "Wanted",
    "Where", "build", "changed", "check_kinds", "check_names", "concept_loss", "each", "fields_of", "find", "forgetting", "known_rules",
    "load_recipe", "made", "make_recipe", "measure", "merge", "named", "register", "retained_picture",
    "retained_share", "reweighted", "rules", "schema", "settle", "systems",
]  # fmt: skip
