"""Merging: one adapter of several, by a rule, on their edits."""

from intarsia.merge import rules  # registers them
from intarsia.merge.making import made, merge, named, reweighted
from intarsia.merge.plan import Plan, Share, Wanted, settle
from intarsia.merge.recipe import Part, Recipe, load_recipe, make_recipe, schema
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
    "KINDS", "VARIANTS", "Merged", "Part", "Plan", "Recipe", "Rule", "Share", "Term", "Wanted", "Where", "build", "changed", "each",
    "fields_of", "find", "known_rules", "load_recipe", "made", "make_recipe", "merge", "named", "register", "reweighted", "rules", "schema",
    "settle", "systems",
]  # fmt: skip
