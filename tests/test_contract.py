"""Every law over every registered method, and the contract's own promises."""

from __future__ import annotations

import pytest

from intarsia import contract, registry

CASES = [
    pytest.param(law, method, id=f"{law.replace(' ', '-')}-{name}{number}")
    for name, cls in registry.methods().items()
    for number, method in enumerate(contract.settings(cls))
    for law in contract.LAWS
]


@pytest.mark.parametrize(("law", "method"), CASES)
def test_law_holds(law, method):
    result = contract.judge(law, method)
    assert result.state in ("holds", "expected"), result.note
