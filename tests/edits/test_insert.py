"""Inserts: scaled, added, stored and refused as edits are; what they do is a function of x and y, in any order."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import intarsia as ia
from intarsia import store
from intarsia.edits import (
    ACTIVATIONS,
    PLACES,
    Bottleneck,
    Edit,
    Insert,
    LowRank,
    Rescaled,
    Sum,
    add,
    build_edit,
    elements,
    overlap,
    place,
    positions,
    scale,
    sizes,
    to_dense,
)
from intarsia.store.writing import checksum

O, I = 12, 16


def _some(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _insert(
    where: str = "parallel", activation: str = "tanh", size: float = 1.0, seed: int = 0, gain: bool = False
) -> Insert:
    inputs, outputs = sizes(where, (O, I))
    down, up = _some(seed, 3, inputs), _some(seed + 1, outputs, 3)
    return Insert((O, I), Bottleneck(down, up, activation, _some(seed, 1)[0] if gain else None), where, size)


def _elements(seed: int = 0) -> Edit:
    return elements((O, I), torch.tensor([3, 50, 190]), _some(seed, 3))


@st.composite
def inserts(draw: st.DrawFn) -> Insert:
    """Any insert beside a weight (O, I) in float64."""
    return _insert(
        draw(st.sampled_from(PLACES)),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
        draw(st.floats(-2, 2)),
        draw(st.integers(0, 2**20)),
        draw(st.booleans()),
    )


W, x = _some(7, O, I), _some(8, 5, I)
y = F.linear(x, W)
quick = settings(max_examples=60, deadline=None)


def _added(edit: Edit) -> Tensor:
    """What an edit's inserts add to the layer's output."""
    total = torch.zeros(5, O, dtype=torch.float64)
    for factor, insert in edit.inserts():
        total = total + factor * insert.change(x, y, W)
    return total


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)  # float64, added up in another order


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_added_is_written_down(where, activation):
    """scale * gain * up phi(down v), v by the place; before the layer its weight comes after all that."""
    insert = _insert(where, activation, -1.5, gain=True)
    g: Any = insert.inserted
    phi: Any = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "identity": lambda v: v}[activation]
    v = y if where == "after" else x
    expected = -1.5 * g.gain * (phi(v @ g.down.T) @ g.up.T)
    _close(insert.change(x, y, W), expected @ W.T if where == "before" else expected)


@quick
@given(inserts(), st.floats(-3, 3))
def test_scaling_scales_what_is_added(insert, factor):
    _close(_added(scale(insert, factor)), factor * _added(insert))
    _close(_added(scale(Sum((O, I), (insert, _elements())), factor)), factor * _added(insert))


@quick
@given(st.lists(inserts(), min_size=1, max_size=4))
def test_sums_add_up_in_any_order(many):
    expected = sum((_added(one) for one in many), torch.zeros(()))
    for order in itertools.islice(itertools.permutations(many), 6):
        total = add(*order)
        _close(_added(total), expected)
        assert total.in_weight() is None


@quick
@given(inserts(), st.floats(-2, 2))
def test_a_sum_with_a_change_of_the_weight_has_both_parts(insert, factor):
    change = _elements()
    total = scale(add(insert, change), factor)
    within = total.in_weight()
    assert within is not None
    assert within.inserts() == []
    _close(within.delta(W), factor * change.delta(W))
    _close(_added(total), factor * _added(insert))
    standing = W.clone()
    place("w", standing, [(1.0, within)]).write(standing)
    _close(standing, W + factor * change.delta(W))


@quick
@given(inserts(), st.floats(-2, 2))
def test_what_is_ready_needs_no_weight_and_is_the_same(insert, factor):
    """Also before the layer, whose weight is multiplied in once."""
    asked: list[int] = []

    def base() -> Tensor:
        asked.append(1)
        return W

    ready = insert.ready(factor, base, torch.float64)
    _close(ready.change(x, y), factor * insert.change(x, y, W))
    assert (len(asked), ready.scale) == (int(insert.place == "before"), 1.0)
    assert ready.place != "before"


def test_what_is_ready_is_rounded_once():
    """In bfloat16 the factors are multiplied in before the rounding, not after each other."""
    insert = replace_dtype(_insert("before", size=1 / 3), torch.float32)
    ready = insert.ready(1 / 7, lambda: W.bfloat16(), torch.bfloat16)
    expected = (W.bfloat16().double() @ (insert.inserted.up.double() / 21)).float()  # type: ignore[attr-defined]
    assert {t.dtype for t in ready.tensors().values()} == {torch.bfloat16}
    error = (ready.inserted.up.float() - expected).abs() / expected.abs()  # type: ignore[attr-defined]
    assert float(error.max()) <= 2**-8  # of three roundings one after the other it would be up to three times that


def replace_dtype(insert: Insert, dtype: torch.dtype) -> Insert:
    return insert.made_of({name: tensor.to(dtype) for name, tensor in insert.tensors().items()})


def test_it_folds_into_no_weight():
    for edit in (
        _insert(),
        Sum((O, I), (_elements(), _insert())),
        add(_insert(), LowRank((O, I), _some(0, O, 1), _some(0, 1, I), 1.0)),
    ):
        for call in (
            lambda e=edit: e.fold(W), lambda e=edit: e.delta(W), lambda e=edit: to_dense(e), lambda e=edit: to_dense(e, W),
            lambda e=edit: place("w", W, [(1.0, e)]),
        ):  # fmt: skip
            with pytest.raises(ia.IntarsiaError, match=r"an insert \(bottleneck\).*folds into no weight"):
                call()
    with pytest.raises(ia.IntarsiaError, match="lengths of a rescaled edit"):
        Rescaled.build(
            (O, I),
            _insert().tensors() | {"magnitude": torch.ones(O)},
            {"inner": {"type": "insert"} | _insert().facts()},
        )


def test_it_touches_no_entry():
    insert, change = _insert(), _elements()
    assert (insert.touched, positions(insert).tolist(), overlap(insert, change)) == (0, [], 0)  # type: ignore[union-attr]
    both = add(change, insert)
    assert positions(both).tolist() == [3, 50, 190]  # type: ignore[union-attr]
    assert overlap(both, change) == both.touched == 3


def test_multiplications_are_counted_for_a_token():
    assert _insert("parallel").inserted.multiplications == 3 * (I + O)
    assert _insert("after").inserted.multiplications == 6 * O
    assert _insert("before", gain=True).inserted.multiplications == 6 * I + I
    assert _insert("before").ready(1.0, lambda: W, torch.float64).inserted.multiplications == 3 * (I + O)


# ------------------------------------------------------------------ files
def _adapter(**edits: Edit) -> ia.Adapter:
    named = {f"{name}.weight": edit for name, edit in edits.items()}
    return ia.Adapter("a", named, store.Base("0" * 64, "float32"), {"name": "bottleneck"})


@pytest.mark.parametrize("where", PLACES)
def test_a_file_holds_it_exactly(where, tmp_path):
    one, two = _insert(where, "gelu", 0.1, gain=True), add(_elements(), _insert(where, seed=3))
    adapter = _adapter(one=one, two=two)
    store.write(adapter, tmp_path / "a")
    opened = store.open(tmp_path / "a")
    assert opened.digest == adapter.digest == store.read(tmp_path / "a").digest
    assert opened.edits.made == ()  # type: ignore[attr-defined]
    assert list(opened.inserts) == ["one.weight", "two.weight"]  # said by the head alone
    assert opened.multiplications == adapter.multiplications > 0
    assert opened.outlines["one.weight"].in_weight() is None
    assert opened.touched == 3
    for name, edit in adapter.edits.items():
        found = opened.edits[name]
        assert found.facts() == edit.facts()
        for part, tensor in edit.tensors().items():
            assert torch.equal(found.tensors()[part], tensor)
    assert "acts beside 2 layers (bottleneck)" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert store.edit_digest(one) != store.edit_digest(scale(one, 2.0))


def test_values_may_be_rounded_but_a_number_alone_is_not(tmp_path):
    store.write(_adapter(one=_insert(gain=True)), tmp_path / "a", values="bfloat16")
    found = store.read(tmp_path / "a").edits["one.weight"].tensors()
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "down": torch.bfloat16, "up": torch.bfloat16, "gain": torch.float64,
    }  # fmt: skip


GOOD = _insert(gain=True)
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another function": ({"what": "bottle"}, {}, "unknown insert 'bottle'; did you mean 'bottleneck'"),
    "no function": ({"what": None}, {}, "unknown insert None"),
    "another place": ({"place": "above"}, {}, "place is 'above'; expected one of after, parallel, before"),
    "a place that does not fit": ({"place": "after"}, {}, r"no bottleneck of 12 inputs and 12 outputs"),
    "another activation": ({"activation": "swish"}, {}, "activation is 'swish'"),
    "no scale": ({"scale": None}, {}, "scale is None"),
    "a scale that is infinite": ({"scale": float("inf")}, {}, "finite number"),
    "NaN": ({}, {"up": torch.full((O, 3), float("nan"))}, "up has 36 numbers that are not finite"),
    "whole numbers": ({}, {"down": torch.ones(3, I, dtype=torch.int64)}, "floating-point"),
    "widths that differ": ({}, {"down": torch.ones(4, I)}, r"down \(4, 16\) and up \(12, 3\) are no bottleneck"),
    "no width": ({}, {"down": torch.ones(0, I), "up": torch.ones(O, 0)}, "no bottleneck"),
    "three dimensions": ({}, {"up": torch.ones(O, 3, 1)}, "no bottleneck"),
    "gains": ({}, {"gain": torch.ones(O)}, "gain is .* a single number"),
    "a tensor too many": ({}, {"more": torch.ones(1)}, "found the tensors.*more"),
    "a tensor missing": ({}, {"down": None}, "expected down, up|expected down, gain, up"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_no_insert_is_refused(fault):
    facts, tensors, message = BROKEN[fault]
    given = {name: tensor for name, tensor in (GOOD.tensors() | tensors).items() if tensor is not None}
    with pytest.raises(ia.IntarsiaError, match=message):
        build_edit("insert", (O, I), given, GOOD.facts() | facts)


def test_a_file_that_says_otherwise_is_refused(tmp_path):
    store.write(_adapter(one=GOOD), tmp_path / "a")
    file = tmp_path / "a" / "adapter.json"
    head = json.loads(file.read_text())
    for place_, what in (("after", "no bottleneck"), ([1], "place is"), ({}, "place is")):
        head["edits"]["one.weight"]["place"] = place_
        head["digest"] = store.adapter.edits_digest(head["edits"], head["tensors"], head["base"]["digest"])
        head["checksum"] = checksum(head)
        file.write_text(json.dumps(head))
        with pytest.raises(ia.IntarsiaError, match=what):
            store.open(tmp_path / "a")
