"""What is routed, and what is activated by tokens, as edits: scaled, added, rounded, stored, fused, analysed and refused like other inserts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import intarsia as ia
from intarsia import store
from intarsia.edits import Activated, Insert, LowRank, Routed, add, build_edit, overlap, positions, scale, to_dense
from some_edits import adapter_of

O, I = 12, 10


def _some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _insert(kind: str, seed: int = 0) -> Insert:
    A, B = _some(4, I, seed=seed), _some(O, 4, seed=seed + 1)
    function: Any = {
        "routed": lambda: Routed(A, B, _some(4, I, seed=seed + 2), _some(4, seed=seed + 3), 2, "softmax"),
        "blocks": lambda: Routed(A, B, _some(2, I, seed=seed + 2), _some(2, seed=seed + 3), 1, "sigmoid"),
        "activated": lambda: Activated(A, B, (3, 5), 1),
    }[kind]()
    return Insert((O, I), function, "parallel", 1.5)


KINDS = ("routed", "blocks", "activated")
x = _some(5, I, seed=9)
y = x @ _some(O, I, seed=8).T


def _added(edit: Any) -> Tensor:
    return sum((factor * insert.change(x, y) for factor, insert in edit.inserts()), torch.zeros(5, O))


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_and_added(kind):
    one, other = _insert(kind), _insert(kind, seed=20)
    low = LowRank((O, I), _some(O, 2), _some(2, I), 1.0)
    torch.testing.assert_close(_added(scale(one, -0.5)), -0.5 * _added(one))
    torch.testing.assert_close(_added(add(one, other, low)), _added(one) + _added(other))
    within = add(one, low).in_weight()
    assert within is not None
    torch.testing.assert_close(within.delta(torch.zeros(O, I)), low.delta(torch.zeros(O, I)))


@pytest.mark.parametrize("kind", KINDS)
def test_stored_and_rounded(kind, tmp_path):
    edit = _insert(kind)
    again = build_edit("insert", edit.shape, edit.tensors(), {"type": "insert"} | edit.facts())
    assert torch.equal(_added(again), _added(edit))
    store.write(adapter_of({"w.weight": edit}), tmp_path / "a")
    read: Any = store.read(tmp_path / "a").edits["w.weight"]
    assert read.facts() == edit.facts()
    assert torch.equal(_added(read), _added(edit))
    rounded: Any = edit.rounded(torch.bfloat16)
    for name, tensor in rounded.tensors().items():
        assert tensor.dtype == (torch.float32 if name == "b" else torch.bfloat16), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_asks_for_a_weight_is_refused(kind):
    edit, W = _insert(kind), torch.zeros(O, I)
    for ask in (edit.fold, edit.delta, lambda W: to_dense(edit, W)):
        with pytest.raises(ia.IntarsiaError, match="folds into no weight"):
            ask(W)
    assert positions(edit) is not None
    assert edit.touched == 0
    assert overlap(edit, edit) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_reports_say_what_it_costs(kind):
    edit = _insert(kind)
    adapter = adapter_of({"w.weight": edit})
    expected = {"routed": 4 * (2 * I + O) + 4, "blocks": 4 * (I + O) + 2 * I + 2, "activated": 4 * (I + O)}[kind]
    assert edit.inserted.multiplications == expected
    assert adapter.multiplications == expected
