"""The report before a merge: closed forms, the dense matrices as the oracle of every kind of edit, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rich.console import Console
from torch import Tensor, nn

from intarsia.analyze import awom, awor, input_norms, interference, interference_picture, product
from intarsia.analyze import reduced as reductions
from intarsia.analyze.interference import Interference
from intarsia.analyze.pair import Pair
from intarsia.edits import (
    BlockAffine,
    Blocks,
    Combined,
    Dense,
    Edit,
    Kronecker,
    LowRank,
    Multiplied,
    Rescaled,
    Scaled,
    Sparse,
    Sum,
    Tiled,
    Transformed,
    elements,
    to_dense,
)
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter, Base
from intarsia.support import named_granularity

O, I = 12, 16
NAME = "model.layers.3.mlp.up_proj.weight"


def adapter(name: str, edits: dict[str, Edit] | Edit, base: str = "0" * 64) -> Adapter:
    edits = {NAME: edits} if isinstance(edits, Edit) else edits
    return Adapter(name, edits, Base(base, "float32"), {"name": "shira"})


def near(*numbers: float | None) -> Any:
    """A tuple of about these numbers."""
    return tuple(map(pytest.approx, numbers))


def compare(one: Edit, other: Edit, **given: Any) -> Pair:
    found = interference([adapter("one", one), adapter("other", other)], **given)
    return found.pairs[0]


def of(rows: list[list[float]]) -> Sparse:
    """The nonzero entries of a matrix."""
    D = torch.tensor(rows, dtype=torch.float64)
    index = D.reshape(-1).nonzero().squeeze(1)
    return elements((len(rows), len(rows[0])), index, D.reshape(-1)[index])


# ------------------------------------------------------------------ closed forms
def test_a_pair_of_two_by_three():
    one = of([[1, 0, 2], [0, -3, 0]])
    other = of([[4, 0, -1], [0, 0, 5]])
    pair = compare(one, other, spectral=True)
    assert pair.touched == (3, 3)
    assert (pair.shared, pair.conflicts) == (2, 1)
    assert pair.overlap == pytest.approx(2 / 3)
    assert pair.jaccard == pytest.approx(2 / 4)
    assert pair.conflict_share == 1 / 2
    assert pair.squares == (14, 42)
    assert pair.shared_squares == (5, 17)
    assert pair.conflict_norm == pytest.approx(2 / math.sqrt(14)), "of the one that changes less"
    assert pair.inner == 1 * 4 - 2 * 1
    assert pair.cosine == pytest.approx(2 / math.sqrt(14 * 42))
    # D1^T D2 = [[4, 0, -1], [0, 0, -15], [8, 0, -2]]: five entries of nine are not 0.
    assert pair.awom == pytest.approx(math.sqrt(16 + 1 + 225 + 64 + 4))
    assert pair.awor == pytest.approx(4 / 9)
    # D1 D2^T = [[2, 10], [0, 0]], D1 D1^T = [[5, 0], [0, 9]], D2 D2^T = [[17, -5], [-5, 25]].
    expected = math.sqrt(104) / math.sqrt(25 + 81), math.sqrt(104) / math.sqrt(289 + 25 + 25 + 625)
    assert pair.interference == near(*expected)


def test_an_entry_at_zero_is_of_neither_sign():
    one = elements((1, 3), torch.arange(3), torch.tensor([0.0, -1e-30, 2.0]))
    other = elements((1, 3), torch.arange(3), torch.tensor([5.0, 1e-30, 2.0]))
    pair = compare(one, other)
    assert (pair.shared, pair.conflicts) == (3, 1), "the second one's product is no number of float32"


def test_two_struct_adapters_on_disjoint_rows_are_as_orthogonal_as_the_paper_says():
    m, rows = 64, 4

    def struct(offset: int) -> Sparse:
        mask = torch.eye(m, dtype=torch.bool)
        mask[offset :: m // rows] = True
        index = mask.reshape(-1).nonzero().squeeze(1)
        return elements((m, m), index, torch.randn(len(index)))

    one, other = struct(0), struct(5)
    assert len(one.index) == rows * m + m - rows
    nonzero = round((1 - awor(one, other)) * m**2)
    assert nonzero == 552 <= m + 2 * rows * (m - 1)
    # 4 rows and 4 columns of the product are full and cross in 16 places; elsewhere only the diagonals meet, in 56.
    assert nonzero == 8 * m + (m - 8) - 16


def test_dense_low_rank_changes_are_not_orthogonal_at_all():
    one, other = (LowRank((O, I), torch.randn(O, 2), torch.randn(2, I), 1.0) for _ in range(2))
    assert awor(one, other) == 0


def test_one_hot_factors_have_the_zeros_of_the_columns_that_they_are():
    chosen = torch.eye(I)[[2, 7, 11]]
    one = LowRank((O, I), torch.randn(O, 3), chosen, 1.0)
    other = LowRank((O, I), torch.randn(O, 3), torch.eye(I)[[0, 7, 5]], 1.0)
    assert awor(one, other) == 1 - 9 / I**2
    assert awor(one, elements((O, I), torch.tensor([4, I + 4]), torch.ones(2))) == 1 - 3 / I**2


def test_an_adapter_beside_its_copy_interferes_by_one_and_beside_nothing_it_reads_by_none():
    one = LowRank((O, I), torch.randn(O, 2), torch.randn(2, I), 0.7)
    pair = compare(one, one)
    assert pair.interference == near(1, 1)
    assert pair.cosine == pytest.approx(1)
    assert pair.conflict_share == 0
    reads = elements((O, I), torch.arange(4) * I, torch.ones(4))  # column 0 only
    elsewhere = elements((O, I), torch.arange(4) * I + 5, torch.ones(4))  # column 5 only
    assert compare(reads, elsewhere).interference == (0, 0)
    assert compare(reads, elsewhere).awom == pytest.approx(4), "they write into the same outputs all the same"


def test_where_the_inputs_are_known_the_interference_is_that_of_their_norms():
    one, other = of([[1, 0, 2], [0, -3, 0]]), of([[4, 0, -1], [0, 0, 5]])
    inputs = {"one": {NAME: torch.tensor([1.0, 2.0, 0.0])}, "other": {NAME: torch.tensor([0.0, 1.0, 3.0])}}
    pair = compare(one, other, inputs=inputs)
    # On the first one's inputs: it moves outputs by sqrt(1 + 36), the other by sqrt(16). On the other's: 2 * 3 and -3; -1 * 3 and 5 * 3.
    known, other_known = math.sqrt(16 / 37), math.sqrt((36 + 9) / (9 + 225))
    assert pair.interference == near(known, other_known)
    half = compare(one, other, inputs={"one": inputs["one"]})
    assert half.interference == near(known, compare(one, other).interference[1])


def test_the_alignment_is_the_cosine_of_the_leading_directions_alone(monkeypatch: pytest.MonkeyPatch):
    # Both have a large direction in common, and small ones that cancel each other.
    u, v = torch.eye(O, dtype=torch.float64), torch.eye(I, dtype=torch.float64)
    large, small = 10 * torch.outer(u[0], v[0]), torch.outer(u[1], v[1])
    pair = compare(Dense((O, I), large + small), Dense((O, I), large - small), spectral=True)
    assert [pair.cosine, pair.alignment] == pytest.approx([99 / 101, 1])
    monkeypatch.setattr(product, "THRESHOLD", 0)
    pair = compare(Dense((O, I), large + small), Dense((O, I), large - small), spectral=True)
    assert pair.alignment == pytest.approx(99 / 101), "over all directions it is the cosine"


# ------------------------------------------------------------------ against the dense matrices, over the kinds
def _some(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _sparse(name: str, width: int | None) -> Callable[[torch.Generator], Edit]:
    def made(g: torch.Generator) -> Edit:
        unit = named_granularity(name, width)
        units = unit.units((O, I))
        k = int(torch.randint(1, max(2, units // 2), (), generator=g))
        index = torch.randperm(units, generator=g)[:k].sort().values
        return Sparse((O, I), unit, index, _some(g, *unit.values_shape((O, I), k)))

    return made


def _low_rank(rank: int) -> Callable[[torch.Generator], Edit]:
    return lambda g: LowRank((O, I), _some(g, O, rank), _some(g, rank, I), -0.3)


KINDS: dict[str, Callable[[torch.Generator], Edit]] = {
    "elements": _sparse("element", None),
    "lines": _sparse("line", 4),
    "tiles": _sparse("tile", 4),
    "rows": _sparse("row", 1),
    "columns": _sparse("column", 1),
    "low rank": _low_rank(2),
    "full rank": _low_rank(O),
    "dense": lambda g: Dense((O, I), _some(g, O, I)),
    "kronecker": lambda g: Kronecker((O, I), _some(g, 3, 4), _some(g, 4, 4), 0.5),
    "blocks": lambda g: Blocks((O, I), _some(g, 4, O // 4, 1), _some(g, 4, 1, I // 4), -0.3),
    "combined": lambda g: Combined((O, I), _some(g, 5), _some(g, 7), 2, 3, 0.5),
    "scaled": lambda g: Scaled((O, I), _some(g, 3, 4), _some(g, 4, min(O, I)), 3, "dense", "paper", 0.1),
    "tiled": lambda g: Tiled((O, I), _some(g, 2, O)),
    "block affine": lambda g: BlockAffine((O, I), _some(g, O // 4, 4, 4)),
    "multiplied": lambda g: Multiplied((O, I), _low_rank(2)(g)),
    "transformed": lambda g: Transformed((O, I), _low_rank(2)(g), (("haar", "hadamard"),)),
    "rescaled": lambda g: Rescaled((O, I), _low_rank(2)(g), _some(g, O).abs() + 0.5),
    "sparse sum": lambda g: Sum((O, I), (_sparse("element", None)(g), _sparse("row", 1)(g)), (0.5, -2.0)),
    "low rank sum": lambda g: Sum((O, I), (_low_rank(1)(g), _low_rank(2)(g)), (0.5, -2.0)),
    "mixed sum": lambda g: Sum((O, I), (_sparse("column", 1)(g), _low_rank(2)(g))),
}
PLAIN = ("elements", "rows", "columns", "low rank", "dense", "rescaled", "mixed sum")


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS)), st.integers(0, 2**31), st.booleans())
def test_every_kind_says_what_the_dense_matrices_say(one: str, other: str, seed: int, entry_by_entry: bool):
    g = torch.Generator().manual_seed(seed)
    first, second = KINDS[one](g), KINDS[other](g)
    W = _some(g, O, I)
    D1, D2 = 0.5 * first.delta(W), -2 * second.delta(W)
    inputs = {"one": {NAME: _some(g, I).abs()}}
    given: dict[str, Any] = {"shares": {"one": 0.5, "other": -2.0}, "weights": {NAME: W}, "spectral": True}
    with pytest.MonkeyPatch.context() as patch:
        if entry_by_entry:  # small matrices would always be multiplied whole
            patch.setattr(product, "DENSE_GAIN", 0)
            patch.setattr(product, "WORK", 40)
        pair, weighted = compare(first, second, **given), compare(first, second, inputs=inputs, **given)

    def share(part: Tensor, whole: Tensor) -> Any:
        return pytest.approx(float(part) / float(whole), rel=1e-9, abs=1e-12) if whole > 0 else 0

    S1, S2 = (
        torch.ones(O * I).bool() if p is None else torch.zeros(O * I).bool().index_fill(0, p, True)
        for p in (_positions(first), _positions(second))
    )
    both, against = (S1 & S2).view(O, I), D1 * D2 < 0
    assert pair.touched == (int(S1.sum()), int(S2.sum()))
    assert pair.shared == int(both.sum())
    assert pair.overlap == share(both.sum(), torch.minimum(S1.sum(), S2.sum()))
    assert pair.jaccard == share(both.sum(), (S1 | S2).sum())
    assert pair.conflicts == int(against.sum())
    smaller = D1 if D1.norm() <= D2.norm() else D2
    assert pair.conflict_norm == share((smaller * against).norm(), smaller.norm())
    assert pair.cosine == share((D1 * D2).sum().abs() * (D1 * D2).sum().sign(), D1.norm() * D2.norm())
    assert pair.norms == near(float(D1.norm()), float(D2.norm()))
    P = D1.T @ D2
    assert pair.awom == pytest.approx(float(P.norm()), abs=1e-9)
    assert pair.leading is not None
    assert pair.leading.awom == pytest.approx(float(torch.linalg.matrix_norm(P, 2)), abs=1e-9)
    assert pair.alignment == pytest.approx(_aligned(D1, D2), abs=1e-9)
    assert pair.awor == pytest.approx(1 - float((P.abs() > 1e-12).sum()) / I**2)
    for found, mine, its in ((pair.interference[0], D1, D2), (pair.interference[1], D2, D1)):
        assert found == share((its @ mine.T).norm(), (mine @ mine.T).norm())
    X = inputs["one"][NAME]
    assert weighted.interference[0] == share((D2 * X).norm(), (D1 * X).norm())
    assert weighted.interference[1] == pytest.approx(pair.interference[1]), "the other's inputs are not known"


def _positions(edit: Edit) -> Tensor | None:
    parts = edit.sparse_parts()
    return None if parts is None else torch.cat([p.granularity.flat((O, I), p.index).reshape(-1) for p in parts])


def _aligned(D1: Tensor, D2: Tensor) -> float:
    """The paper's sum, written as it stands there."""
    (U, s, Vt), (X, t, Yt) = torch.linalg.svd(D1), torch.linalg.svd(D2)
    kept = [(i, j) for i in range(O) for j in range(O) if s[i] > 0.3 * s[0] and t[j] > 0.3 * t[0]]
    total = sum(float(s[i] * t[j] * (U[:, i] @ X[:, j]) * (Vt[i] @ Yt[j])) for i, j in kept)
    return total / float(s[s > 0.3 * s[0]].norm() * t[t > 0.3 * t[0]].norm())


@pytest.mark.parametrize("one", PLAIN)
@pytest.mark.parametrize("other", PLAIN)
def test_shares_only_turn_signs_and_the_order_only_the_sides(one: str, other: str):
    g = torch.Generator().manual_seed(3)
    first, second, weights = KINDS[one](g), KINDS[other](g), {NAME: _some(g, O, I)}
    pair = compare(first, second, weights=weights)
    turned = compare(first, second, weights=weights, shares={"one": 3.0, "other": -0.25})
    assert turned.cosine == pytest.approx(-pair.cosine)
    assert turned.awor == pair.awor
    assert turned.interference[0] == pytest.approx((pair.interference[0] or 0) * 0.25 / 3)
    back = compare(second, first, weights=weights)
    assert (back.shared, back.conflicts) == (pair.shared, pair.conflicts)
    assert back.awor == pytest.approx(pair.awor)
    assert back.interference == near(pair.interference[1], pair.interference[0])


def test_overlap_of_sparse_changes_builds_no_matrix(monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a dense matrix was built")

    for place in (reductions, product):
        monkeypatch.setattr(place, "rows_of", never)
    monkeypatch.setattr(product, "_matrix", never)
    huge = (2**20, 2**20)  # 4 TiB in float32
    index = torch.arange(0, 2**40, 2**30)
    one, other = elements(huge, index, torch.ones(len(index))), elements(huge, index[::2].clone(), -torch.ones(512))
    pair = compare(one, other, products=False)
    assert (pair.shared, pair.conflict_share, pair.awom, pair.worst) == (512, 1, None, None)


def test_a_product_too_large_for_memory_is_made_in_pieces(monkeypatch: pytest.MonkeyPatch):
    g = torch.Generator().manual_seed(0)
    one, pairs = KINDS["elements"](g), [KINDS["dense"](g), KINDS["elements"](g)]
    whole = [compare(one, other) for other in pairs]
    for gain in (0, 10**9):
        monkeypatch.setattr(product, "BLOCK", 3 * I)
        monkeypatch.setattr(product, "DENSE_GAIN", gain)
        for other, expected in zip(pairs, whole, strict=True):
            assert compare(one, other).awom == pytest.approx(expected.awom)
            assert compare(one, other).awor == expected.awor


# ------------------------------------------------------------------ whole adapters
def three() -> Interference:
    g = torch.Generator().manual_seed(0)
    names = [
        "model.layers.0.q_proj.weight",
        "model.layers.0.up_proj.weight",
        "model.layers.1.q_proj.weight",
        "head.weight",
    ]
    edits = [{name: KINDS["elements"](g) for name in names[:3]}, {name: KINDS["low rank"](g) for name in names[1:]}]
    return interference(
        [adapter("one", edits[0]), adapter("two", edits[1]), adapter("three", {names[3]: KINDS["rows"](g)})]
    )


def test_weights_add_up_to_layers_modules_and_the_whole():
    found = three()
    assert {pair.where for pair in found.layers} == {"0", "1"}
    assert {pair.where for pair in found.modules} == {"q_proj", "up_proj", "head"}
    for groups in (found.totals, found.modules):
        for first, second in (("one", "two"), ("one", "three"), ("two", "three")):
            parts = [pair for pair in found.pairs if (pair.first, pair.second) == (first, second)]
            mine = [pair for pair in groups if (pair.first, pair.second) == (first, second)]
            assert sum(p.shared for p in mine) == sum(p.shared for p in parts)
            assert sum(p.inner for p in mine) == pytest.approx(sum(p.inner for p in parts))
            assert sum((p.awom or 0) ** 2 for p in mine) == pytest.approx(sum((p.awom or 0) ** 2 for p in parts))
    whole = found.totals[0]
    rows = [p for p in found.pairs if (p.first, p.second) == ("one", "two")]
    assert whole.weights == 2
    assert whole.touched[0] == found.summands[0].touched
    own = sum(p.products.own[0] for p in rows if p.products)
    foreign = sum(p.products.foreign[0] for p in rows if p.products)
    assert whole.interference[0] == pytest.approx(math.sqrt(foreign / own)), (
        "a weight that the other leaves alone counts too"
    )
    squares = [s.norm**2 for s in found.summands]
    assert [s.norm_share for s in found.summands] == pytest.approx([square / sum(squares) for square in squares])


def test_of_several_weights_the_spectral_norm_is_the_largest_and_alignments_add_up():
    g = torch.Generator().manual_seed(0)
    edits: list[dict[str, Edit]] = [{f"layers.{i}.up.weight": KINDS["dense"](g) for i in range(3)} for _ in range(2)]
    found = interference([adapter("one", edits[0]), adapter("two", edits[1])], spectral=True)
    block = [torch.block_diag(*(to_dense(edit, dtype=torch.float64) for edit in one.values())) for one in edits]
    assert found.totals[0].leading is not None
    assert found.totals[0].leading.awom == pytest.approx(float(torch.linalg.matrix_norm(block[0].T @ block[1], 2)))
    rows = [pair.leading for pair in found.pairs if pair.leading is not None]
    lengths = [sum(row.squares[i] for row in rows) for i in (0, 1)]
    assert found.totals[0].alignment == pytest.approx(
        sum(row.inner for row in rows) / math.sqrt(lengths[0] * lengths[1])
    )


def test_adapters_with_no_weight_in_common_are_said_to_be_apart():
    found = three()
    assert found.apart() == [("one", "three")]
    pair = found.totals[1]
    assert (pair.weights, pair.overlap, pair.cosine, pair.awor, pair.interference) == (0, 0, 0, 1, (0, 0))


def test_the_worst_weight_is_where_interference_is_largest():
    one: dict[str, Edit] = {f"layers.{i}.up.weight": of([[1, 0, 2], [0, -3, 0]]) for i in range(3)}
    other: dict[str, Edit] = {f"layers.{i}.up.weight": of([[0, 0, 0.1], [0, 0, 0]]) for i in (0, 2)}
    other["layers.1.up.weight"] = of([[0, 0, 4], [0, 0, 0]])
    worst = interference([adapter("one", one), adapter("two", other)]).worst(2)
    assert worst[0].where == "layers.1.up.weight"
    assert len(worst) == 2
    large, small = ([value or 0.0 for value in pair.interference] for pair in worst)
    assert large[0] > small[0]
    assert large[1] < small[1], "where the second one does next to nothing, nothing is lost"


def test_the_report_is_json_and_tables_and_a_picture(tmp_path: Path):
    found = three()
    plain = json.loads(json.dumps(found.to_dict()))
    assert [len(plain[key]) for key in ("adapters", "pairs", "layers", "modules")] == [3, 3, 6, 9]
    console = Console(width=200, record=True)
    for table in found.tables():
        console.print(table)
    lines = [line.split() for line in console.export_text().splitlines()]
    whole, worst = found.totals[0], found.worst(1)[0]
    on_first, on_second = (f"{value or 0:.1%}" for value in whole.interference)
    rows = [line for line in lines if line[:3] == ["one", "->", "two"]]
    assert rows[0][3:] == [
        "2", f"{whole.overlap:.1%}", f"{whole.conflict_share:.1%}", f"{whole.cosine:+.3f}",
        f"{whole.awom:.3g}", f"{whole.awor:.1%}", on_second, on_first,
    ]  # fmt: skip
    assert any(line[:1] == [worst.where.removeprefix("model.").removesuffix(".weight")] for line in lines)
    assert all(part in found.legend() for part in ("overlap", "opposite", "->"))
    file = interference_picture(found, tmp_path / "new" / "report.png", "three")
    assert file.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(IntarsiaError, match="should end in"):
        interference_picture(found, tmp_path / "report.txt")
    apart = interference([adapter("a", {"x.weight": of([[1.0]])}), adapter("b", {"y.weight": of([[1.0]])})])
    with pytest.raises(IntarsiaError, match="nothing to draw"):
        interference_picture(apart, tmp_path / "none.png")


def test_input_norms_are_those_of_what_comes_in():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    batches = [torch.randn(5, 3), torch.randn(2, 3)]
    found = input_norms(model, ["0.weight", "1.weight"], batches, loss=lambda model, batch: model(batch).sum())
    x = torch.cat(batches)
    torch.testing.assert_close(found["0.weight"], x.norm(dim=0))
    torch.testing.assert_close(found["1.weight"], model[0](x).norm(dim=0).detach())


# ------------------------------------------------------------------ bad input
def test_bad_input_is_one_clear_error():
    plain, other = of([[1.0, 2.0]]), of([[3.0, 0.0]])
    with pytest.raises(IntarsiaError, match="different bases.*\n  one: a model, 000000000000\n  two: a model, 111"):
        interference([adapter("one", plain), adapter("two", other, base="1" * 64)])
    with pytest.raises(IntarsiaError, match="found 1 adapter; interference needs at least two"):
        interference([adapter("one", plain)])
    with pytest.raises(IntarsiaError, match="several adapters are named one"):
        interference([adapter("one", plain), adapter("one", other)])
    with pytest.raises(IntarsiaError, match=r"two edits a weight \(2, 1\), one one \(1, 2\)"):
        interference([adapter("one", plain), adapter("two", of([[1.0], [2.0]]))])
    rescaled = Rescaled((1, 2), plain, torch.ones(1))
    with pytest.raises(IntarsiaError, match="two: .*rescaled edit changes depends on the base's weight"):
        interference([adapter("one", plain), adapter("two", rescaled)])
    with pytest.raises(IntarsiaError, match="inputs are given for 'tow', which is none of one, two"):
        interference([adapter("one", plain), adapter("two", other)], inputs={"tow": {}})
    with pytest.raises(IntarsiaError, match=r"inputs are \(3,\); expected \(2,\)"):
        interference([adapter("one", plain), adapter("two", other)], inputs={"two": {NAME: torch.ones(3)}})
    with pytest.raises(IntarsiaError, match="are not of one weight"):
        awom(plain, of([[1.0], [2.0]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_found_and_named(bad: float):
    broken = replace(of([[1.0, 2.0]]), values=torch.tensor([1.0, bad]))
    with pytest.raises(IntarsiaError, match=rf"two: {NAME}: values has 1 numbers that are not finite"):
        interference([adapter("one", of([[1.0, 2.0]])), adapter("two", broken)])
