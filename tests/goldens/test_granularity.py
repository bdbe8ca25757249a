"""Every granularity against the definition of its units, written out here as sets of (row, column)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intarsia as ia
from intarsia.errors import IntarsiaError
from intarsia.support import GRANULARITIES, Column, Element, Granularity, Line, Row, Tile, named_granularity
from intarsia.support.granularity import Diagonal, Shape

SHAPES = [(12, 8), (8, 12), (7, 11), (16, 16)]
KINDS: list[Granularity] = [
    Element(), Line(width=4), Line(width=3), Tile(width=4), Tile(width=3), Row(), Row(width=3), Column(), Column(width=4), Diagonal(),
]  # fmt: skip


def entries(unit: Granularity, shape: Shape) -> list[list[tuple[int, int]]]:
    """The (row, column) of each unit's entries, in the order of the values."""
    (O, I), w = shape, getattr(unit, "width", 1)
    if isinstance(unit, Element):
        return [[(r, c)] for r in range(O) for c in range(I)]
    if isinstance(unit, Line):
        return [[(r, b * w + j) for j in range(w)] for r in range(O) for b in range(I // w)]
    if isinstance(unit, Tile):
        return [
            [(r * w + i, c * w + j) for i in range(w) for j in range(w)] for r in range(O // w) for c in range(I // w)
        ]
    if isinstance(unit, Row):
        return [[(u * w + i, c) for i in range(w) for c in range(I)] for u in range(O // w)]
    if isinstance(unit, Column):
        return [[(r, u * w + j) for j in range(w) for r in range(O)] for u in range(I // w)]
    return [[(r, (r + d) % I) for r in range(O)] for d in range(I)]


def mask(unit: Granularity, shape: Shape, index: Tensor) -> Tensor:
    chosen = [place for u in index.tolist() for place in entries(unit, shape)[u]]
    out = torch.zeros(shape, dtype=torch.bool)
    for r, c in chosen:
        out[r, c] = True
    assert int(out.sum()) == len(chosen)  # no entry is in two units
    return out


def supports(unit: Granularity, shape: Shape) -> list[Tensor]:
    n = unit.units(shape)
    return [torch.tensor([n - 1]), torch.randperm(n)[: max(1, n // 3)].sort().values, torch.arange(n)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unit", KINDS, ids=repr)
def test_reading_writing_and_scores(unit: Granularity, shape: Shape) -> None:
    places = entries(unit, shape)
    assert unit.units(shape) == len(places)
    assert {unit.size(shape)} == {len(p) for p in places}
    W = torch.randn(shape, dtype=torch.float64)
    norms = torch.stack([torch.stack([W[r, c] for r, c in p]).norm() for p in places])
    assert torch.allclose(unit.reduce(W).abs(), norms)
    for index in supports(unit, shape):
        here = mask(unit, shape, index)
        values = unit.gather(W, index)
        assert tuple(values.shape) == unit.values_shape(shape, len(index))
        assert torch.equal(unit.scatter(shape, index, values), torch.where(here, W, 0))
        written = torch.zeros_like(W)
        unit.put(written, index, values)
        assert torch.equal(written, torch.where(here, W, 0))
        assert torch.equal(W.reshape(-1)[unit.flat(shape, index)], values)
        one = unit.gather(W, index[:1])
        assert torch.equal(values.index_select(unit.axis, unit.spread(torch.tensor([0]))), one)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unit", KINDS, ids=repr)
def test_the_gradient_is_the_dense_one_on_the_support(unit: Granularity, shape: Shape) -> None:
    gy, x = torch.randn(2, 5, shape[0], dtype=torch.float64), torch.randn(2, 5, shape[1], dtype=torch.float64)
    dense = torch.einsum("bto,bti->oi", gy, x)
    for index in supports(unit, shape):
        plan = unit.plan(shape, index)
        found = unit.gradient(gy, unit.keep(x, index, plan), index, plan, shape)
        assert torch.allclose(found, unit.gather(dense, index), rtol=1e-12, atol=1e-12)


def test_elements_of_a_large_weight_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    gy, x = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    index = torch.tensor([0, 6, 7, 20, 21, 41, 42, 69])
    whole = (gy.mT @ x).view(-1)[index]
    for at_once in (1, 7, 14, 21, 69):
        monkeypatch.setattr("intarsia.support.granularity.AT_ONCE", at_once)
        assert torch.allclose(Element().gradient(gy, x, index, (), (10, 7)), whole, rtol=1e-12)


def test_lines_tiles_and_columns_keep_only_the_columns_they_need() -> None:
    x, shape = torch.randn(3, 16), (8, 16)
    for unit, index, kept in (
        (Line(width=4), torch.tensor([1, 5, 7]), 8),
        (Line(width=4), torch.arange(32), 16),
        (Line(width=4), torch.tensor([0, 1, 2]), 16),  # three of four blocks: x itself, which others may keep too
        (Tile(width=3), torch.tensor([0, 5]), 3),
        (Tile(width=4), torch.tensor([2, 6]), 4),
        (Column(width=4), torch.tensor([0, 3]), 8),
    ):
        assert unit.keep(x, index, unit.plan(shape, index)).shape == (3, kept)


def test_a_granularity_by_name() -> None:
    assert named_granularity("line") == Line(width=32)
    assert named_granularity("tile", 16) == Tile(width=16)
    assert set(GRANULARITIES) == {"element", "line", "tile", "row", "column", "diagonal"}
    for name, width, message in (("lines", None, "did you mean"), ("element", 4, "no width"), ("row", 0, "1 or more")):
        with pytest.raises(IntarsiaError, match=message):
            named_granularity(name, width)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_few_entries_are_sampled(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intarsia.support.granularity.SMALL", 1)
    shape, index = (
        (10, 71),
        torch.tensor([0, 2, 71, 300, 301, 399, 640, 709]),
    )  # two rows of one, some of none, the last entry
    plan = Element().plan(shape, index)
    assert len(plan) == 2
    gy, x = torch.randn(2, 3, 10).to(dtype), torch.randn(2, 3, 71).to(dtype)
    found = Element().gradient(gy, x, index, plan, shape)
    expected = torch.einsum("bto,bti->oi", gy.double(), x.double()).view(-1)[index]
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * expected.abs().max(), "summed in float32 or wider, rounded once"


def test_many_entries_and_small_weights_are_not_sampled() -> None:
    assert len(Element().plan((1024, 1024), torch.arange(20000))) == 2
    assert Element().plan((1024, 1024), torch.arange(21000)) == ()
    assert Element().plan((512, 1024), torch.arange(8)) == ()


@pytest.mark.parametrize("unit", KINDS, ids=repr)
def test_a_cpu_without_bfloat16_gives_the_same_gradient(unit: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[0]
    index = supports(unit, shape)[-1]
    plan = unit.plan(shape, index)
    gy, x = torch.randn(33, shape[0]).bfloat16(), torch.randn(33, shape[1]).bfloat16()
    found = []
    for emulates in (True, False):
        monkeypatch.setattr("intarsia.precision.EMULATES_BFLOAT16", emulates)
        found.append(unit.gradient(gy, unit.keep(x, index, plan), index, plan, shape))
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert torch.allclose(found[0].float(), found[1].float(), rtol=2**-7, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing, torch 2.13
def test_a_sampled_gradient_is_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intarsia.support.granularity.SMALL", 1)
    net = nn.Sequential(nn.Linear(71, 40, bias=False))
    ia.attach(net, ia.Shira(density=0.01), "0")
    state: Any = net.get_submodule("0.adapters.default")
    x = torch.randn(5, 71)
    gradients = []
    for model in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        model(x).square().sum().backward()
        gradients.append(state.values.grad.clone())
    assert state.plan_length == 2, "the support is sampled at all"
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5)
