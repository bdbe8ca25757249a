"""Trained numbers on real shapes, as the cards give them."""

from __future__ import annotations

import pytest

import intarsia as ia
from intarsia.forms.sparse import auto_scale
from intarsia.support import Column, Element, Row, Tile

# out, in of the seven linear layers of a block (q, k, v, o, gate, up, down), and the number of blocks
LLAMA2_7B = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 32)
LLAMA2_13B = ([(5120, 5120)] * 4 + [(13824, 5120)] * 2 + [(5120, 13824)], 40)
LLAMA3_8B = ([(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)], 32)


def _count(method, model):
    shapes, blocks = model
    return blocks * sum(method.trained_count(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("method", "model", "count"),
    [
        (ia.Paca(8), LLAMA2_7B, 10_878_976),
        (ia.Paca(16), LLAMA2_7B, 21_757_952),
        (ia.Lora(8), LLAMA2_7B, 19_988_480),
        (ia.Paca(8), LLAMA2_13B, 17_039_360),
        (ia.Lora(8), LLAMA2_13B, 31_293_440),
        (ia.Paca(8), LLAMA3_8B, 11_010_048),
        (ia.Paca(16), LLAMA3_8B, 22_020_096),
        (ia.Lora(8), LLAMA3_8B, 20_971_520),
        (ia.Lora(8, scaling="rslora"), LLAMA3_8B, 20_971_520),
        (ia.Dora(ia.Lora(8)), LLAMA2_7B, 19_988_480 + 32 * (4 * 4096 + 2 * 11008 + 4096)),
        (ia.Dora(ia.Paca(8)), LLAMA2_7B, 10_878_976 + 32 * (4 * 4096 + 2 * 11008 + 4096)),
    ],
    ids=str,
)
def test_counts_of_the_cards(method, model, count):
    assert _count(method, model) == count


def test_shira_trains_its_share():
    shapes, blocks = LLAMA2_7B
    assert _count(ia.Shira(density=0.01), LLAMA2_7B) == blocks * sum(round(0.01 * O * I) for O, I in shapes)
    assert _count(ia.Shira(density=0.01, granularity="column"), LLAMA2_7B) == blocks * sum(
        round(0.01 * I) * O for O, I in shapes
    )


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (4096, 4096), (576, 192), (49152, 576)], ids=str)
@pytest.mark.parametrize("density", [1e-6, 0.001, 0.01, 0.02, 0.1, 1.0])
@pytest.mark.parametrize(("unit", "constant", "power"), [(Element(), 3, 7 / 8), (Tile(), 3, 7 / 8), (Row(), 4.28, 3 / 4), (Column(), 4.28, 3 / 4)])  # fmt: skip
def test_auto_scale_is_short_and_near_its_formula(shape, density, unit, constant, power):
    O, I = shape
    count = max(1, round(density * O * I))
    exact = min(32, constant / ((count / (O * I)) ** power * (O**0.5 + I**0.5) / 2))
    scale = auto_scale(shape, count, unit)
    assert max(scale / exact, exact / scale) <= 1.5**0.5 * 1.0001
    assert scale.hex().startswith(("0x1.0000000000000p", "0x1.8000000000000p"))
    assert scale <= 32


def test_auto_scale_of_usual_adapters():
    """What docs/learning-rate.md says."""
    scales = [auto_scale((576, 576), round(p * 576 * 576), Element()) for p in (0.003, 0.01, 0.05)]
    assert scales == [24, 8, 1.5]
    assert [auto_scale((576, 576), round(p * 576 * 576), Column()) for p in (0.003, 0.01, 0.05)] == [16, 6, 1.5]
