"""Notes from a forward travel on the gradient of a parameter of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from intarsia.forms import carried, carry
from intarsia.forms.carry import TINY


@pytest.mark.parametrize("again", [None, False, True], ids=["plain", "checkpoint", "checkpoint, reentrant"])
def test_notes_add_up_and_change_nothing(again):
    x, note = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), nn.Parameter(torch.zeros(2))

    def forward(x):
        return carry(x * x, note, lambda gy: torch.stack([gy.sum(), torch.tensor(7.0, dtype=gy.dtype)]))

    for _ in range(2):
        y = forward(x) if again is None else checkpoint(forward, x, use_reentrant=again, preserve_rng_state=False)
        (3 * y).sum().backward()
    torch.testing.assert_close(x.grad, 12 * x.detach())
    found = carried(note)
    assert found is not None
    assert torch.equal(found, torch.tensor([90.0, 14.0]))
    assert float(TINY * found.norm()) < 1e-15  # clipping does not feel it


def test_nothing_is_carried_where_nobody_asks():
    note = nn.Parameter(torch.zeros(1))
    x = torch.ones(3)
    with torch.no_grad():
        assert carry(x, note, torch.sum) is x
    note.requires_grad_(False)
    assert carry(x, note, torch.sum) is x
    assert carried(note) is None
