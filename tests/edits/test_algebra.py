"""The laws of edits, over every kind: each is set in as its dense change says, is scaled, added and taken out exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import intarsia as ia
from intarsia import store
from intarsia.edits import (
    KINDS,
    BlockAffine,
    Blocks,
    Combined,
    Core,
    Dense,
    Edit,
    Kernel,
    Kronecker,
    LowRank,
    Multiplied,
    Rescaled,
    Scaled,
    Sequential,
    Sparse,
    Sum,
    Tiled,
    Transformed,
    add,
    build_edit,
    elements,
    overlap,
    place,
    positions,
    scale,
    to_dense,
)
from intarsia.support import GRANULARITIES, named_granularity

O, I = 12, 16


def _close(found: Tensor, expected: Any) -> None:
    # Of float64, for sums that are added up in another order
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


quick = settings(max_examples=60, deadline=None)


def _touched(edit: Edit) -> Tensor:
    found = positions(edit)
    return torch.arange(O * I) if found is None else found


def _some(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _sparse(name: str, width: int | None, g: torch.Generator) -> Sparse:
    unit = named_granularity(name, width)
    units = unit.units((O, I))
    k = int(torch.randint(1, max(2, units // 2), (), generator=g))
    index = torch.randperm(units, generator=g)[:k].sort().values
    return Sparse((O, I), unit, index, _some(g, *unit.values_shape((O, I), k)))


WIDTHS: dict[str, list[int | None]] = {
    "line": [4, 8, 3],
    "tile": [4, 2, 3],
    "row": [1, 2],
    "column": [1, 4],
    "element": [None],
    "diagonal": [None],
}
assert WIDTHS.keys() == GRANULARITIES.keys(), "a granularity without a test"


def _core(g: torch.Generator, more: str) -> Core:
    sizes = {"A": (2, I), "B": (O, 2), "C": (2, 2), "c": (2,)}
    names = ["A", "B", *more.split()]
    made = {name: _some(g, *sizes[name[0]]) for name in names}
    now = {name.upper(): tensor for name, tensor in made.items() if len(name) == 1}
    return Core((O, I), now, {name[0].upper(): tensor for name, tensor in made.items() if len(name) == 2}, -0.5)


MAKERS: dict[str, Callable[[torch.Generator], Edit]] = {
    **{
        f"{name} {width}": lambda g, name=name, width=width: _sparse(name, width, g)  # type: ignore[misc]
        for name, widths in WIDTHS.items()
        for width in widths
    },
    "low_rank": lambda g: LowRank((O, I), _some(g, O, 2), _some(g, 2, I), 0.5),
    "kronecker": lambda g: Kronecker((O, I), _some(g, 3, 8), _some(g, 4, 2), -1.5),
    "blocks": lambda g: Blocks((O, I), _some(g, 4, 3, 2), _some(g, 4, 2, 4), 0.5),
    "combined": lambda g: Combined((O, I), _some(g, 5), _some(g, 7), 3, 11, -0.5),
    "scaled": lambda g: Scaled((O, I), _some(g, 5, 3), _some(g, 3, O), 7, "dense", "peft", 0.5),
    "summed": lambda g: Scaled((O, I), _some(g, 2, 6), _some(g, 6, O), 7, "sparse", "summed", 2.0),
    "core": lambda g: _core(g, "C"),
    "diagonal core": lambda g: _core(g, "c"),
    "moved factors": lambda g: _core(g, "A0 B0"),
    "moved core": lambda g: _core(g, "C C0 A0"),
    "moved diagonal": lambda g: _core(g, "c c0 B0 A0"),
    "dense": lambda g: Dense((O, I), _some(g, O, I)),
    "kernel": lambda g: Kernel((O, I), _some(g, 2, I, 3), _some(g, 2, O, 3), None, 150, "soft"),
    "full kernel": lambda g: Kernel((O, I), _some(g, 2, I, 3), _some(g, 2, O, 3), None, 0, "none", "linear", 2.0),
    "sum": lambda g: Sum(
        (O, I), (_sparse("line", 4, g), LowRank((O, I), _some(g, O, 1), _some(g, 1, I), 1.0)), (0.5, 2.0)
    ),
    "sparse sum": lambda g: Sum((O, I), (_sparse("tile", 2, g), _sparse("element", None, g)), (-1.0, 0.5)),
    "sequential": lambda g: Sequential((O, I), _some(g, O, 2), _some(g, 2, O), -0.5),
    "tiled": lambda g: Tiled((O, I), _some(g, 3, 4)),
    "block affine": lambda g: BlockAffine((O, I), _some(g, O // 4, 4, 4)),
    "multiplied": lambda g: Multiplied((O, I), LowRank((O, I), _some(g, O, 2), _some(g, 2, I), 0.5)),
    "multiplied whole": lambda g: Multiplied((O, I), LowRank((O, I), _some(g, O, 2), _some(g, 2, I), 0.5), 0.0),
    "bands": lambda g: Transformed(
        (O, I),
        LowRank((O // 2, I // 2), _some(g, O // 2, 2), _some(g, 2, I // 2), 0.5),
        (("haar-low", "haar-low"), ("haar-high", "haar-low")),
    ),
    "coefficients": lambda g: Transformed((O, I), _sparse("element", None, g), (("identity", "hadamard"),), 2.0),
    "rescaled": lambda g: Rescaled((O, I), _sparse("element", None, g), _some(g, O).abs() + 0.5),
}


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """Any edit of a weight (O, I) in float64."""
    maker = MAKERS[draw(st.sampled_from(sorted(MAKERS)))]
    return maker(torch.Generator().manual_seed(draw(st.integers(0, 2**20))))


def _weight(seed: int = 0, dtype: torch.dtype = torch.float64, transposed: bool = False) -> Tensor:
    W = _some(torch.Generator().manual_seed(seed), O, I).to(dtype)
    return W.mT.contiguous().mT if transposed else W


def test_every_kind_is_tried():
    tried = {maker(torch.Generator().manual_seed(0)).kind for maker in MAKERS.values()}
    assert tried | {"insert"} == set(KINDS)  # which folds into no weight: test_insert.py


@quick
@given(edits())
def test_a_fold_is_the_weight_and_the_dense_change(edit):
    W = _weight()
    _close(edit.fold(W), W + to_dense(edit, W, torch.float64))


@quick
@given(edits(), st.floats(-3, 3))
def test_scaling_scales_the_change(edit, factor):
    W = _weight()
    _close(scale(edit, factor).delta(W), factor * edit.delta(W))


@quick
@given(st.lists(edits(), min_size=1, max_size=4))
def test_sums_are_the_sum_of_the_changes(many):
    W = _weight()
    expected = sum(edit.delta(W) for edit in many)
    _close(add(*many).delta(W), expected)
    _close(add(*reversed(many)).delta(W), expected)


@quick
@given(st.lists(edits(), min_size=2, max_size=4))
def test_sums_of_sparse_edits_are_exact_on_the_union(many):
    sparse = [edit for edit in many if isinstance(edit, Sparse)]
    if len(sparse) < 2:
        return
    total = add(*sparse)
    assert isinstance(total, Sparse)
    expected = torch.zeros(O, I, dtype=torch.float64)
    for edit in sparse:
        expected += edit.delta(expected)
    assert torch.equal(total.delta(expected), expected)
    assert _touched(total).equal(torch.cat([_touched(edit) for edit in sparse]).unique())


@quick
@given(edits(), edits())
def test_overlap_is_symmetric_and_counts_the_shared_entries(one, other):
    shared = torch.ones(O, I, dtype=torch.bool)
    for edit in (one, other):
        touched = positions(edit)
        if touched is not None:
            shared &= torch.zeros(O * I, dtype=torch.bool).index_fill(0, touched, True).view(O, I)
    assert overlap(one, other) == overlap(other, one) == int(shared.sum())


@quick
@given(edits())
def test_no_entry_outside_of_the_positions_is_changed(edit):
    touched = positions(edit)
    if touched is not None:
        outside = torch.ones(O * I, dtype=torch.bool).index_fill(0, touched, False)
        assert not edit.delta(_weight()).view(-1)[outside].any()


@quick
@given(
    st.lists(st.tuples(st.floats(-2, 2), edits()), min_size=1, max_size=3),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_setting_in_rounds_the_sum_once_and_taking_out_gives_the_bits(terms, dtype, transposed):
    W = _weight(1, dtype, transposed)
    before = W.clone()
    placement = place("W", W, terms)
    kept = placement.read(W)
    placement.write(W)
    wide = torch.promote_types(dtype, torch.float32)
    expected = before.to(wide) + sum(weight * edit.delta(before.to(wide)) for weight, edit in terms)
    torch.testing.assert_close(
        W,
        expected.to(dtype),
        rtol=2 * torch.finfo(dtype).eps,
        atol=1e-5 if wide != dtype or dtype == torch.float32 else 1e-12,
    )
    kept.write(W)
    assert W.equal(before)


@quick
@given(st.lists(st.tuples(st.floats(-2, 2), edits()), min_size=1, max_size=4))
def test_sparse_parts_of_any_granularity_are_placed_on_their_union_alone(terms):
    W = _weight(2)
    placement = place("W", W, terms)
    if any(positions(edit) is None for _, edit in terms):
        assert placement.index is None
    else:
        assert placement.index is not None
        entries = placement.index[:, None] * placement.run + torch.arange(placement.run)
        assert entries.reshape(-1).equal(torch.cat([_touched(edit) for _, edit in terms]).unique())


@quick
@given(edits())
def test_tensors_and_facts_make_the_same_edit(edit):
    made = build_edit(edit.kind, (O, I), edit.tensors(), {"type": edit.kind} | edit.facts())
    assert store.edit_digest(made) == store.edit_digest(edit)
    assert made.bytes == edit.bytes == sum(t.numel() * t.element_size() for t in edit.tensors().values())
    assert made.delta(_weight()).equal(edit.delta(_weight()))


def test_digests_tell_edits_apart():
    made = [MAKERS[name](torch.Generator().manual_seed(seed)) for name in sorted(MAKERS) for seed in (0, 1)]
    digests = sorted(store.edit_digest(edit) for edit in made)
    assert all(a != b for a, b in pairwise(digests))
    one = elements((O, I), torch.tensor([1]), torch.ones(1))
    assert store.edit_digest(one) != store.edit_digest(elements((I, O), torch.tensor([1]), torch.ones(1)))


# ------------------------------------------------------------------ refusals
def test_factors_that_are_no_numbers_are_refused():
    edit = MAKERS["dense"](torch.Generator())
    factors: list[Any] = [float("nan"), float("inf"), True, "2", None]
    for factor in factors:
        with pytest.raises(ia.IntarsiaError, match="finite number"):
            scale(edit, factor)


def test_sums_of_nothing_and_of_other_shapes_are_refused():
    with pytest.raises(ia.IntarsiaError, match="nothing to add"):
        add()
    other = elements((3, 3), torch.tensor([1]), torch.ones(1))
    for call in (add, overlap):
        with pytest.raises(ia.IntarsiaError, match=r"\(3, 3\)"):
            call(other, MAKERS["dense"](torch.Generator()))


def test_a_change_that_depends_on_the_weight_needs_it():
    edit = MAKERS["rescaled"](torch.Generator().manual_seed(0))
    with pytest.raises(ia.IntarsiaError, match="depends on the weight"):
        to_dense(edit)
    with pytest.raises(ia.IntarsiaError, match=r"the weight is \(3, 3\)"):
        to_dense(edit, torch.zeros(3, 3))


ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("kind", "tensors", "facts", "match"),
    [
        ("dense", {"values": torch.ones(3, 2)}, {}, r"values are \(3, 2\); expected \(2, 3\)"),
        ("dense", {"values": torch.full((2, 3), float("nan"))}, {}, "not finite"),
        ("dense", {"A": ONE}, {}, "expected values"),
        ("kronecker", {"A": torch.ones(2, 1), "B": torch.ones(2, 3)}, {"scale": 1.0}, "do not multiply"),
        ("kronecker", {"A": torch.ones(2, 1), "B": torch.ones(1, 3)}, {"scale": None}, "scale is None"),
        ("kronecker", {"A": torch.ones(2, 1), "B": torch.full((1, 3), float("inf"))}, {"scale": 1.0}, "not finite"),
        (
            "sum",
            {"0_values": torch.ones(2, 3)},
            {"parts": [{"type": "dense"}], "factors": [1.0, 2.0]},
            "as many factors",
        ),
        ("sum", {"0_values": torch.ones(2, 3)}, {"parts": [{"type": "dense"}], "factors": [float("nan")]}, "finite"),
    ],
)
def test_files_that_make_no_edit_are_refused(kind, tensors, facts, match):
    with pytest.raises(ia.IntarsiaError, match=match):
        build_edit(kind, (2, 3), tensors, {"type": kind} | facts)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_each_kind_alone_and_twice(name):
    edit, W = MAKERS[name](torch.Generator().manual_seed(5)), _weight(3)
    _close(add(edit, edit).delta(W), 2 * edit.delta(W))
    for terms in ([(0.5, edit)], [(0.5, edit), (0.25, edit)]):
        set_in = W.clone()
        place("W", set_in, terms).write(set_in)
        _close(set_in, W + sum(weight for weight, _ in terms) * edit.delta(W))


def test_the_product_of_kronecker_by_hand():
    """Block (i, j) is A_ij B, as in LoKr (arXiv 2309.14859)."""
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    expected = torch.tensor([[1.0, 10.0, 2.0, 20.0], [100.0, 1000.0, 200.0, 2000.0]])
    assert Kronecker((2, 4), A, B, 3.0).delta(torch.zeros(2, 4)).equal(3 * expected)


@quick
@given(
    st.sampled_from(
        ["C", "c", "A0", "B0", "A0 B0", "C C0", "C A0", "C C0 A0", "C C0 B0", "c c0 A0 B0", "C C0 A0 B0", "c c0"]
    ),
    st.integers(0, 999),
)
def test_a_core_edit_is_its_formula(more, seed):
    """W' = W + s (B C A - B0 C0 A0), where what did not move is as it is now; and as two factors the same."""
    edit = _core(torch.Generator().manual_seed(seed), more)
    square = {k: torch.diag(t) if t.ndim == 1 else t for k, t in edit.tensors().items()}
    B, A, C = square["B"], square["A"], square.get("C", torch.eye(2, dtype=torch.float64))
    D = B @ C @ A
    if "0" in more:
        D = D - square.get("B0", B) @ square.get("C0", C) @ square.get("A0", A)
    W = _weight()
    _close(edit.fold(W), W - 0.5 * D)
    _close(edit.low_rank().delta(W), -0.5 * D)
    still = Core(edit.shape, edit.now, {k: edit.now[k] for k in edit.start}, 3.0)
    if edit.start:
        assert not still.delta(W).any()  # at the start it is nothing, to the bit
