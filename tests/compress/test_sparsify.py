"""ComPEFT, STC and pruning: what the papers say, number by number, and on adapters of every kind of edit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import intarsia as ia
from intarsia import compress, store
from intarsia.edits import Dense, Kernel, LowRank, Rescaled, Sparse, elements, to_dense
from intarsia.store.tensorfile import TensorFile
from intarsia.support import Column, Line, Row, Tile, sample
from some_edits import adapter_of, every_kind, low_ranks, normal


def compeft_by_hand(adapter: store.Adapter, density: float, alpha: float | None) -> dict[str, np.ndarray]:
    """Their code's steps on numpy arrays: flatten by sorted keys, threshold, sign * alpha * std; alpha None: the mean of what is kept."""
    state = {name: t.double().numpy() for name, t in sorted(adapter.tensors().items()) if not name.endswith("indices")}
    tau = np.concatenate([array.ravel() for array in state.values()])
    k = round(density * len(tau))
    threshold = np.sort(np.abs(tau))[len(tau) - k]
    mask = np.abs(tau) >= threshold
    size = alpha * tau.std(ddof=1) if alpha is not None else np.abs(tau[mask]).mean()
    changed, at = size * np.sign(tau) * mask, 0
    found = {}
    for name, array in state.items():
        found[name] = changed[at : at + array.size].reshape(array.shape)
        at += array.size
    return found


@pytest.mark.parametrize("density", [0.2, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 4.0, None])
def test_it_is_the_authors(density, alpha):
    before = low_ranks()
    after = compress.ternary(before, density, alpha) if alpha is not None else compress.stc(before, density)
    expected = compeft_by_hand(before, density, alpha)
    kept = {name.rpartition(".")[0] for name in after.tensors()}
    for name, array in expected.items():
        if name.rpartition(".")[0] in kept:
            assert np.allclose(after.tensors()[name].double().numpy(), array, rtol=1e-6, atol=0), name
        else:  # dropped: a factor of zeros changes nothing
            weight = name.rpartition(".")[0]
            assert not expected[f"{weight}.A"].any() or not expected[f"{weight}.B"].any()


def test_three_values_of_the_original_standard_deviation_and_the_signs_of_the_largest():
    before = adapter_of({"a.weight": elements((100, 100), torch.arange(4000) * 2, normal(4000))})
    after = compress.ternary(before, 0.1, 3.0).edits["a.weight"]
    assert isinstance(after, Sparse)
    tau = before.edits["a.weight"].tensors()["values"]
    largest = tau.abs().sort(descending=True).indices[:400].sort().values
    assert torch.equal(after.index, largest * 2)
    assert torch.equal(after.values.sign(), tau[largest].sign())
    assert after.values.abs().unique().tolist() == pytest.approx([3 * float(tau.std())], rel=1e-6)


def test_exactly_round_k_d_are_kept_ties_by_their_order():
    values = torch.tensor([1.0, -1, 1, 1, -1, 1, 0.5, 0.5, 1, 1])
    before = adapter_of({"a.weight": elements((5, 5), torch.arange(10), values)})
    after = compress.stc(before, 0.45).edits["a.weight"]  # round(4.5) = 4, as Python rounds
    assert after.tensors()["indices"].tolist() == [0, 1, 2, 3]
    assert after.tensors()["values"].tolist() == [1, -1, 1, 1]


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), density=st.floats(0.05, 1), other=st.floats(0.01, 3))
def test_the_mean_of_what_is_kept_is_the_nearest_scalar(seed, density, other):
    before = adapter_of({"a.weight": Dense((20, 20), normal(20, 20, seed=seed))})
    best = compress.change_error(before, compress.stc(before, density))
    assert best is not None
    assert best <= (compress.change_error(before, compress.ternary(before, density, other)) or 0) + 1e-7


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), density=st.floats(0.02, 1), factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_a_scaled_adapter_compresses_to_the_scaled_one(seed, density, factor):
    values = normal(300, seed=seed)
    one = adapter_of({"a.weight": elements((30, 30), torch.arange(300) * 3, values)})
    scaled = adapter_of({"a.weight": elements((30, 30), torch.arange(300) * 3, factor * values)})
    for rule in (
        lambda a: compress.ternary(a, density, 2.0),
        lambda a: compress.stc(a, density),
        lambda a: compress.prune(a, density),
    ):
        assert torch.equal(to_dense(rule(scaled).edits["a.weight"]), factor * to_dense(rule(one).edits["a.weight"]))


def test_pruned_numbers_are_the_largest_to_the_bit():
    before = low_ranks()
    after = compress.prune(before, 0.3)
    tau = torch.cat([t.reshape(-1) for _, t in sorted(before.tensors().items())])
    threshold = tau.abs().sort(descending=True).values[round(0.3 * len(tau)) - 1]
    for name, tensor in after.tensors().items():
        original = before.tensors()[name]
        expected = torch.where(original.abs() >= threshold, original, torch.zeros(()))
        assert tensor.numpy().tobytes() == expected.numpy().tobytes(), (
            "zeros are +0.0: a file holds the signs of zeros too"
        )


UNITS = [Line(width=5), Row(width=2), Column(width=1), Column(width=3), Tile(width=4)]


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_units_are_pruned_as_a_whole_by_the_root_of_their_mean_square(unit):
    shape = (40, 60)
    index = sample(unit.units(shape), 8, 3)
    values = normal(*unit.values_shape(shape, 8))
    edit = Sparse(shape, unit, index, values)
    after = compress.prune(adapter_of({"a.weight": edit}), 0.4).edits["a.weight"]
    assert isinstance(after, Sparse)
    assert after.granularity == unit
    sizes = [float(to_dense(Sparse.of(unit, shape, _one(edit, i))).square().sum()) for i in range(8)]
    largest = sorted(sorted(range(8), key=lambda i: -sizes[i])[:3])  # 3 of 8 are within 40 %
    assert torch.equal(after.index, index[largest])
    whole = to_dense(edit)
    kept = to_dense(after) != 0
    assert torch.equal(to_dense(after)[kept], whole[kept])


def _one(edit: Sparse, number: int) -> dict[str, Tensor]:
    places = edit.granularity.spread(torch.tensor([number]))
    return {
        "indices": edit.index[number : number + 1],
        "values": edit.values.index_select(edit.granularity.axis, places),
    }


def test_norms_of_inputs_weigh_the_entries():
    index = torch.arange(40) * 5
    before = adapter_of({"a.weight": elements((20, 10), index, torch.ones(40))})
    norms = torch.zeros(10)
    norms[5] = 2.0
    after = compress.prune(before, 0.5, {"a.weight": norms}).edits["a.weight"]
    assert set((after.tensors()["indices"] % 10).tolist()) == {5}
    assert after.touched == 20
    with pytest.raises(ia.IntarsiaError, match=r"its norms are \(9,\); expected \(10,\)"):
        compress.prune(before, 0.5, {"a.weight": torch.ones(9)})
    with pytest.raises(ia.IntarsiaError, match="its norms are none"):
        compress.prune(before, 0.5, {})
    with pytest.raises(ia.IntarsiaError, match="a low_rank edit has none"):
        compress.prune(low_ranks(), 0.5, {"up.weight": torch.ones(20)})


@pytest.mark.parametrize("kind", every_kind())
@pytest.mark.parametrize(
    "rule",
    [
        lambda a: compress.ternary(a, 0.5, 1.0),
        lambda a: compress.stc(a, 0.5),
        lambda a: compress.prune(a, 0.5),
        lambda a: compress.in_bits(a, 2),
    ],
    ids=["ternary", "stc", "prune", "bits"],
)
def test_every_kind_that_is_declared_is_compressed_and_comes_back(kind, rule, tmp_path):
    before = adapter_of({"a.weight": every_kind()[kind]})
    after = rule(before)
    W = normal(12, 10, seed=9)
    assert not torch.equal(after.edits["a.weight"].fold(W), before.edits["a.weight"].fold(W))
    assert torch.isfinite(after.edits["a.weight"].fold(W)).all()
    back = store.read(store.write(after, tmp_path / "a"))
    assert back.digest == after.digest
    assert torch.equal(back.edits["a.weight"].fold(W), after.edits["a.weight"].fold(W))
    (step,) = back.about["compressed"]
    assert step["from"] == before.digest


def test_the_lengths_of_a_rescaled_edit_stay():
    before = adapter_of(
        {"a.weight": Rescaled((12, 10), LowRank((12, 10), normal(12, 3), normal(3, 10), 1.0), 3 * torch.ones(12))}
    )
    assert torch.equal(compress.ternary(before, 0.2).tensors()["a.weight.magnitude"], 3 * torch.ones(12))
    assert compress.change_error(before, compress.ternary(before, 0.2)) is None


def test_what_cannot_be_compressed_is_refused_in_a_sentence():
    kernel = Kernel((6, 5), normal(2, 5, 3), normal(2, 6, 3), None, 3, "soft")
    with pytest.raises(
        ia.IntarsiaError, match=r"one, two: kernel edits cannot be compressed; it is for .*Blocks, Combined, "
    ):
        compress.stc(adapter_of({"one": kernel, "two": kernel, "three": every_kind()["dense"]}), 0.5)
    with pytest.raises(ia.IntarsiaError, match="no numbers to compress"):
        compress.stc(adapter_of({}), 0.5)
    with pytest.raises(ia.IntarsiaError, match="are all alike"):
        compress.ternary(adapter_of({"a": Dense((4, 4), torch.zeros(4, 4))}), 0.5)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), True, "x"])
def test_a_share_that_makes_no_sense_is_refused(density):
    for rule in (compress.ternary, compress.stc, compress.prune, compress.to_sparse):
        with pytest.raises(ia.IntarsiaError, match="expected a share above 0, up to 1"):
            rule(low_ranks(), density)


@pytest.mark.parametrize("alpha", [0, -1, float("inf"), float("nan"), "1"])
def test_a_factor_that_makes_no_sense_is_refused(alpha):
    with pytest.raises(ia.IntarsiaError, match="expected a number above 0"):
        compress.ternary(low_ranks(), 0.5, alpha)


def test_all_of_a_matrix_is_its_signs_in_one_bit(tmp_path):
    """k = 100 % with the mean: the 1-bit delta of BitDelta."""
    W = normal(64, 64)
    before = adapter_of({"a.weight": Dense((64, 64), W)})
    after = compress.stc(before, 1.0)
    assert torch.allclose(after.tensors()["a.weight.values"], W.abs().double().mean().float() * W.sign(), rtol=1e-6)
    folder = store.write(after, tmp_path / "a")
    assert TensorFile.open(folder / store.TENSORS).entries["a.weight.values"].shape == (4 + 64 * 64 // 8,)


def test_units_that_keep_nothing_are_dropped_and_weights_that_change_nothing_too():
    large = Sparse((12, 10), Column(), torch.tensor([1, 4, 7]), torch.tensor([[9.0, 0.1, 0.1]]).repeat(12, 1))
    before = adapter_of({"large": large, "small": Dense((4, 4), 0.01 * normal(4, 4))})
    after = compress.stc(before, 12 / 52)
    assert list(after.edits) == ["large"]
    assert after.tensors()["large.indices"].tolist() == [1]


def test_a_dense_edit_that_is_mostly_zeros_becomes_elements():
    before = adapter_of({"a.weight": Dense((20, 20), normal(20, 20))})
    assert [compress.prune(before, share).edits["a.weight"].kind for share in (0.4, 0.6)] == ["elements", "dense"]


def test_remarks_are_those_of_the_adapter_before_and_the_steps_are_kept():
    before = replace(low_ranks(), note={"held-out loss": 1.5})
    first = compress.prune(before, 0.9)
    second = compress.stc(first, 0.5)
    assert second.note == first.note == {"before compression": {"held-out loss": 1.5}}
    assert [(step["to"], step["from"]) for step in second.about["compressed"]] == [
        ("prune", before.digest),
        ("stc", first.digest),
    ]
