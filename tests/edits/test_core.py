"""The core edit: what is read of a file, rounding, and its factors."""

from __future__ import annotations

import pytest
import torch

import intarsia as ia
from intarsia.edits import Core, LowRank, Sum, build_edit, joined

O, I, R = 6, 5, 2


def _n(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FACTORS = {"A": _n(R, I), "B": _n(O, R)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"A": _n(R, I)}, "found the tensors A; expected A, B"),
        (FACTORS | {"D": _n(2)}, "found the tensors A, B, D; expected A, B"),
        (FACTORS | {"A": _n(R, O)}, r"A is \(2, 6\); B C A is to be \(6, 5\)"),
        (FACTORS | {"B": _n(O, 3)}, r"B is \(6, 3\)"),
        (FACTORS | {"C": _n(3, 3)}, r"C is \(3, 3\)"),
        (FACTORS | {"B0": _n(O, 3)}, r"B is \(6, 3\)"),
        (FACTORS | {"C": _n(R), "C0": _n(R, R)}, r"C is \(2, 2\)"),
        (FACTORS | {"C": torch.tensor([1.0, float("nan")])}, "C has 1 numbers that are not finite"),
        (FACTORS | {"C": torch.tensor([1, 2])}, "C is torch.int64; expected floating-point numbers"),
    ],
)
def test_what_is_no_core_edit(tensors, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        build_edit("core", (O, I), tensors, {"scale": 1.0})


def test_a_start_of_a_core_that_is_not_there():
    with pytest.raises(ia.IntarsiaError, match="found the tensor C0 without C"):
        build_edit("core", (O, I), FACTORS | {"C0": _n(R)}, {"scale": 1.0})


@pytest.mark.parametrize(("rows", "columns"), [(6, 5), (5, 6), (4, 4)])
@pytest.mark.parametrize("core", [(), (R,), (R, R)], ids=str)
def test_a_core_goes_into_the_thinner_factor(rows, columns, core):
    now = {"A": _n(R, columns), "B": _n(rows, R)} | ({"C": _n(*core, seed=2)} if core else {})
    C = now.get("C", torch.ones(R))
    edit = Core((rows, columns), now, {}, 0.5)
    expected = 0.5 * now["B"] @ (torch.diag(C) if C.ndim == 1 else C) @ now["A"]
    torch.testing.assert_close(edit.delta(torch.zeros(rows, columns)), expected)
    assert edit.low_rank().A.shape == (R, columns)


def test_what_is_subtracted_is_not_rounded():
    """A change of a thousandth would be lost in bfloat16; a core edit without a start is rounded as any."""
    start = {name: tensor + 1e-3 for name, tensor in FACTORS.items()}
    assert Core((O, I), FACTORS, start, 1.0).rounded(torch.bfloat16).tensors()["A"].dtype == torch.float32
    assert {t.dtype for t in Core((O, I), FACTORS, {}, 1.0).rounded(torch.bfloat16).tensors().values()} == {
        torch.bfloat16
    }


def test_low_ranks_of_opposite_signs_keep_their_scale():
    """As PEFT converts a PiSSA: the ranks side by side, the sign in B, to the bit."""
    one, other = LowRank((O, I), _n(O, R), _n(R, I), 2.0), LowRank((O, I), _n(O, R, seed=1), _n(R, I, seed=1), -2.0)
    both = joined([one, other])
    assert both.scale == 2.0
    assert torch.equal(both.B, torch.cat([one.B, -other.B], 1))
    zero = torch.zeros(O, I)
    torch.testing.assert_close(both.delta(zero), one.delta(zero) + other.delta(zero))
    total = Sum((O, I), (one, Core((O, I), FACTORS, {}, 0.5)), (1.0, -3.0))
    low = total.low_rank()
    assert low is not None
    torch.testing.assert_close(low.delta(zero), total.delta(zero))
