"""What an adapter changes: norms, what rounding loses, and sums over modules and layers."""

from __future__ import annotations

import pytest
import torch

from intarsia.analyze import change_norm, group, invisible_share, rounding, spectra, weight_changes
from intarsia.edits import Edit, LowRank, Rescaled, columns, elements
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter, Base

O, I = 6, 4


def low_rank(scale: float = 0.5) -> LowRank:
    return LowRank((O, I), torch.randn(O, 2), torch.randn(2, I), scale)


def all_kinds() -> list[Edit]:
    return [
        elements((O, I), torch.tensor([0, 5, 23]), torch.randn(3)),
        columns((O, I), torch.tensor([1, 3]), torch.randn(O, 2)),
        low_rank(),
        Rescaled((O, I), low_rank(), torch.rand(O) + 0.5),
    ]


def adapter(edits: dict[str, Edit]) -> Adapter:
    return Adapter("one", edits, Base("0" * 64, "bfloat16"), {"name": "shira"})


@pytest.mark.parametrize("edit", all_kinds(), ids=lambda edit: edit.kind)
def test_norms_are_those_of_the_dense_change(edit):
    weight = torch.randn(O, I)
    dense = edit.fold(weight.double()) - weight.double()
    assert change_norm(edit, weight) == pytest.approx(float(dense.norm()), rel=1e-5)


def test_an_update_below_an_eighth_bit_is_invisible_in_bfloat16():
    # Around 1, bfloat16 has steps of 1/128 above and 1/256 below: a change of less than half a step leaves 1 as it is.
    weight = torch.ones(1, 4, dtype=torch.bfloat16)
    values = torch.tensor([1 / 512, -1 / 1024, 1 / 64, 0.0])
    edit = elements((1, 4), torch.arange(4), values)
    found = rounding(edit, weight)
    assert (found.changed, found.invisible) == (3, 2), "an entry whose value is zero is not changed"
    assert found.invisible_share == invisible_share(edit, weight) == pytest.approx(2 / 3)
    lost = torch.tensor([1 / 512, 1 / 1024]).norm() / values.norm()
    assert found.error == pytest.approx(float(lost))
    assert weight.eq(1).all(), "nothing is written"


@pytest.mark.parametrize("edit", all_kinds(), ids=lambda edit: edit.kind)
def test_rounding_is_that_of_setting_in(edit):
    parameter = torch.nn.Parameter(torch.randn(O, I).to(torch.bfloat16))
    weight = parameter.detach()
    exact = edit.fold(weight.float())
    after = exact.to(torch.bfloat16)
    changed = exact != weight.float()
    found = rounding(edit, parameter)
    assert found.changed == int(changed.sum())
    assert found.invisible == int((changed & (after == weight)).sum())
    lost = (after.float() - exact).norm() / (exact - weight.float()).norm()
    assert found.error == pytest.approx(float(lost), rel=1e-4)
    assert rounding(edit, weight.double()).error < 1e-6, "a wide base loses nothing"


def test_no_change_loses_nothing():
    found = rounding(elements((2, 2), torch.tensor([1]), torch.zeros(1)), torch.ones(2, 2))
    assert (found.changed, found.invisible_share, found.error) == (0, 0.0, 0.0)


def edits_of_two_layers() -> dict[str, Edit]:
    first, second, third, _ = all_kinds()
    return {"model.layers.0.q.weight": first, "model.layers.11.q.weight": second, "head.weight": third}


def test_every_weight_has_a_row():
    edits = edits_of_two_layers()
    rows = weight_changes(adapter(edits))
    assert [(row.name, row.module, row.layer) for row in rows] == [
        ("model.layers.0.q.weight", "q", 0), ("model.layers.11.q.weight", "q", 11), ("head.weight", "head", None)
    ]  # fmt: skip
    assert [row.edit for row in rows] == ["elements", "columns", "low_rank"]
    assert all((row.weight_norm, row.relative, row.rounding) == (None, None, None) for row in rows)


def test_groups_add_up():
    edits = edits_of_two_layers()
    weights = {name: torch.randn(O, I).to(torch.bfloat16) for name in edits}
    rows = weight_changes(adapter(edits), weights)
    modules = group(rows, lambda row: row.module)
    assert [g.name for g in modules] == ["q", "head"]
    q = modules[0]
    assert (q.weights, q.edits, q.shapes, q.size) == (2, ("elements", "columns"), ((O, I),), 2 * O * I)
    assert q.touched == 3 + 2 * O
    changes = [edits[name].delta(weights[name].float()) for name in list(edits)[:2]]
    size = torch.cat([weights[name].float() for name in list(edits)[:2]]).norm()
    assert q.norm == pytest.approx(float(torch.cat(changes).norm()), rel=1e-5)
    assert q.relative == pytest.approx(float(torch.cat(changes).norm() / size), rel=1e-4)
    lost = [(weights[name].float() + change).bfloat16() - (weights[name].float() + change)
            for name, change in zip(edits, changes, strict=False)]  # fmt: skip
    assert q.rounding_error == pytest.approx(float(torch.cat(lost).norm() / torch.cat(changes).norm()), rel=1e-3)
    found = [rounding(edits[name], weights[name]) for name in list(edits)[:2]]
    assert q.invisible_share == sum(r.invisible for r in found) / sum(r.changed for r in found)


def test_a_group_with_an_unknown_norm_has_none():
    edits: dict[str, Edit] = {"a.weight": all_kinds()[3], "b.weight": all_kinds()[0]}
    whole = group(weight_changes(adapter(edits)), lambda row: "all")[0]
    assert (whole.norm, whole.relative, whole.invisible_share, whole.rounding_error) == (None, None, None, None)


def test_weights_that_do_not_fit():
    edits: dict[str, Edit] = {"a.weight": all_kinds()[0]}
    with pytest.raises(IntarsiaError, match=r"a.weight: the adapter edits a weight \(6, 4\).*it is \(2, 2\)"):
        weight_changes(adapter(edits), {"a.weight": torch.zeros(2, 2)})
    with pytest.raises(IntarsiaError, match="it has none of that name"):
        spectra(adapter(edits), ["a.weight"], {})


def test_spectra_say_what_they_are_of():
    edits = edits_of_two_layers()
    found = spectra(adapter(edits), ["head.weight"])[0]
    assert found.name == "head.weight"
    assert found.effective_rank <= 2 + 1e-5, "it is a product of rank 2"
    assert set(found.top_shares) == {1, 4}
    assert found.top_shares[4] == pytest.approx(1.0)
    assert found.to_dict()["of"] == 4
