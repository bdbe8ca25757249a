"""What is claimed of a system, looked at: the table and the file. The looks themselves are no tests; they take minutes."""

from __future__ import annotations

import pytest

from intarsia import registry
from intarsia.bench.behaviours import Seen, behaviours
from intarsia.errors import IntarsiaError


def test_every_behaviour_is_of_a_system_that_works_here():
    known = {*registry.methods(), *registry.variants(), *registry.systems()}
    assert {one.system for one in behaviours()} <= known
    assert all(one.claim and not one.claim.endswith(".") for one in behaviours())


@pytest.mark.parametrize(("value", "better", "shows"), [(1, "lower", True), (3, "lower", False), (3, "higher", True)])
def test_a_claim_shows_on_its_own_side(value, better, shows):
    assert Seen("loss", "ours", value, "theirs", 2, better).shows is shows


def test_a_misspelt_system_is_told_the_nearest():
    with pytest.raises(IntarsiaError, match="did you mean 'lora'"):
        behaviours("lra")
