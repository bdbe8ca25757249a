"""All that a method's own tests need: the contract, and numbers of its own."""

import lora_fa
import pytest

from intarsia import contract


@pytest.mark.parametrize("law", contract.LAWS)
def test_law(law):
    for result in contract.check(lora_fa.LoraFa, [law]):
        assert result.state != "broken", str(result)
