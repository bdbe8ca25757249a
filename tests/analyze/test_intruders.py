"""Intruder dimensions: planted ones are found, nothing else is; and HF PEFT finds the same."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor

from intarsia.analyze import SVD, adapter_intruders, intruders, repaired, truncated
from intarsia.edits import Dense, Edit, LowRank, Rescaled, elements, row_norms
from intarsia.errors import IntarsiaError
from intarsia.store import Adapter, Base
from planted import N, base_of_distinct_values, planted


def random_pair(seed: int = 0, shape: tuple[int, int] = (24, 16), size: float = 0.5) -> tuple[Tensor, Edit]:
    dice = torch.Generator().manual_seed(seed)
    O, I = shape
    made = LowRank(shape, torch.randn(O, 2, generator=dice), torch.randn(2, I, generator=dice), size)
    return torch.randn(shape, generator=dice), made


@pytest.mark.parametrize("size", [10.0, 30.0, 100.0])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_planted_direction_is_the_one_intruder(size, side):
    weight = base_of_distinct_values()
    looked = intruders(weight, planted(size), side=side)
    (found,) = looked.found
    assert found.j == 0, "it is the largest"
    values = torch.linalg.svdvals(planted(size).fold(weight))
    assert found.value == pytest.approx(float(values[0]), rel=1e-5)
    assert looked.energy_share == pytest.approx(float(values[0] ** 2 / values.square().sum()), rel=1e-5)
    # Its likeness to any one axis is that of ones / 8, 1/8, and a little more for what the base adds.
    assert 1 / 8 < found.similarity < 0.14


@pytest.mark.parametrize(
    "edit",
    [Dense((N, N), torch.zeros(N, N)), Dense((N, N), 2.5 * base_of_distinct_values()), planted(0.0)],
    ids=["nothing", "a multiple of the base", "a scale of 0"],
)
def test_what_brings_in_no_direction_has_no_intruders(edit):
    looked = intruders(base_of_distinct_values(), edit)
    assert looked.found == ()
    assert [d.similarity for d in looked.directions] == pytest.approx([1.0] * 10)


def test_a_tall_or_wide_weight_has_as_many_directions_as_its_smaller_side():
    for shape in ((12, 5), (5, 12)):
        weight, edit = random_pair(shape=shape)
        assert len(intruders(weight, edit, top=50).directions) == 5


def test_sides():
    # Inputs of the base, outputs of its own: a new u, an old v.
    weight = base_of_distinct_values()
    axis = torch.zeros(1, N)
    axis[0, 0] = 1
    edit = LowRank((N, N), torch.ones(N, 1) / 8, axis, 30.0)
    assert [len(intruders(weight, edit, side=side).found) for side in ("left", "right", "both")] == [1, 0, 0]


@given(st.integers(0, 200), st.floats(0, 1), st.floats(0, 1), st.integers(1, 16), st.integers(1, 16))
def test_counts_never_fall_with_the_threshold_or_the_number_of_directions(seed, one, other, few, many):
    weight, edit = random_pair(seed)
    (low, high), (few, many) = sorted([one, other]), sorted([few, many])

    def count(epsilon: float, top: int) -> int:
        return len(intruders(weight, edit, epsilon=epsilon, top=top).found)

    assert count(low, many) <= count(high, many)
    assert count(high, few) <= count(high, many)


def test_turning_within_equal_singular_values_is_no_intruder():
    values = torch.linspace(3, 1, 8)
    values[2:6] = 2.0
    weight = torch.diag(values)
    dice = torch.Generator().manual_seed(0)
    turn = torch.eye(8)
    turn[2:6, 2:6] = torch.linalg.qr(torch.randn(4, 4, generator=dice)).Q
    # Hardly a change at all, but one that decides which of the equal directions the decomposition picks.
    edit = Dense((8, 8), turn @ torch.diag(1e-5 * torch.arange(8.0)) @ turn.mT)
    by_name = {d.j: d for d in intruders(weight, edit, epsilon=0.9, top=8).directions}
    assert min(d.similarity for d in by_name.values()) < 0.9, "the paper's rule is fooled"
    assert not any(d.intruder for d in by_name.values())
    assert all(d.within == pytest.approx(1.0, abs=1e-3) for d in by_name.values())
    assert any(d.intruder for d in intruders(weight, edit, epsilon=0.9, top=8, degenerate=0).directions)


def test_nearly_equal_values_are_not_joined_to_chains():
    # 1200 values, each within a thousandth of its neighbour: joined they would be one space that holds every direction.
    n = 1200
    values = 3 * (1 - 0.0008) ** torch.arange(n, dtype=torch.float32)
    base = SVD(torch.eye(n), values, torch.eye(n))
    edit = LowRank((n, n), torch.ones(n, 1) / n**0.5, torch.ones(1, n) / n**0.5, 100.0)
    looked = intruders(torch.diag(values), edit, base=base, top=1)
    assert [d.j for d in looked.found] == [0]


def test_a_weight_of_no_full_rank_has_no_intruders_without_energy():
    weight = torch.zeros(12, 12)
    weight[0, 0], weight[1, 1] = 2.0, 1.0
    edit = Dense((12, 12), torch.zeros(12, 12))
    assert intruders(weight, edit).found == ()
    outside = torch.zeros(12, 12)
    outside[5, 5] = 3.0  # where the base does nothing at all
    # The base's own vectors of value 0 are any that are left, the axes here; half-way between two of them is like neither.
    u = torch.zeros(12, 1)
    u[5:9] = 0.5
    (found,) = intruders(weight, LowRank((12, 12), u, u.mT.contiguous(), 3.0), epsilon=0.6).found
    assert found.j == 0


def test_a_direction_without_energy_is_none():
    weight = base_of_distinct_values()
    Q = torch.linalg.qr(torch.randn(N, 2, generator=torch.Generator().manual_seed(0))).Q
    # All that the change leaves is of rank 2, in new directions.
    left_over = Q @ torch.diag(torch.tensor([3.0, 2.0])) @ Q.mT
    looked = intruders(weight, Dense((N, N), left_over - weight))
    assert [d.j for d in looked.found] == [0, 1]
    assert any(d.within < 0.5 for d in looked.directions[2:]), "the others are no directions of the base either"


def test_the_weight_is_not_written_and_a_narrow_one_is_widened():
    weight = base_of_distinct_values().bfloat16()
    before = weight.clone()
    wide = intruders(weight.float(), planted(10.0))
    assert intruders(weight, planted(10.0)).directions == wide.directions
    assert torch.equal(weight, before)


def test_an_edit_that_depends_on_the_weight():
    weight = base_of_distinct_values()
    inner = planted(10.0)
    edit = Rescaled((N, N), inner, row_norms(inner.fold(weight)))  # lengths as they are: the same change
    assert len(intruders(weight, edit).found) == 1


def test_a_known_decomposition_of_the_base_gives_the_same():
    weight, edit = random_pair()
    given_ = intruders(weight, edit, base=SVD.of(weight))
    assert given_.directions == intruders(weight, edit).directions


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"top": 0}, "top=0; expected a whole number of directions, 1 or more"),
        ({"epsilon": 1.5}, "epsilon=1.5; expected a likeness from 0 to 1"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"side": "up"}, "side='up'; expected one of left, right, both"),
        ({"degenerate": 1.0}, "degenerate=1.0"),
    ],
)
def test_settings_that_mean_nothing(setting, said):
    weight, edit = random_pair()
    with pytest.raises(IntarsiaError, match=said):
        intruders(weight, edit, **setting)


def test_numbers_that_are_not_finite():
    weight, edit = random_pair()
    weight[0, 0] = torch.nan
    with pytest.raises(IntarsiaError, match="up: the changed weight has numbers that are not finite"):
        intruders(weight, edit, name="up")


def test_a_whole_adapter():
    weight = base_of_distinct_values()
    quiet = elements((N, N), torch.tensor([0, 5]), torch.tensor([0.01, 0.02]))
    adapter = Adapter("a", {"up.weight": planted(10.0), "down.weight": quiet}, Base("0" * 64, "float32"), {})
    told = []
    looked = adapter_intruders(
        adapter, {"up.weight": weight, "down.weight": weight}, progress=lambda *said: told.append(said)
    )
    assert [(one.name, len(one.found)) for one in looked] == [("up.weight", 1), ("down.weight", 0)]
    assert [said[:2] for said in told] == [(1, 2), (2, 2)]
    assert looked[0].to_dict()["intruders"] == 1
    with pytest.raises(IntarsiaError, match="down.weight: the adapter edits a weight"):
        adapter_intruders(adapter, {"up.weight": weight})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_finds_the_same_and_repairs_alike(tiny_llama, dtype):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(tiny_llama(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))).to(
                parameter.dtype
            ) * (0.05 if "layers.0" in name else 0.2)
    said: list[str] = []
    reduce_intruder_dimension(model, mitigation_lambda=0.6, top_k=8, threshold_epsilon=0.5, logging_sink=said.append)
    theirs = dict(line.split(": ", 1) for line in said if line.startswith("base_model"))
    counts = []
    for name, layer in model.named_modules():
        if name not in theirs:
            continue
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        weight = layer.get_base_layer().weight.detach()
        # PEFT adds the change in the weight's own dtype: the very edit that is looked at here.
        edit = Dense(tuple(weight.shape), (weight + layer.get_delta_weight("default")).float() - weight.float())
        looked = intruders(weight.float(), edit, top=8, degenerate=0)
        counts.append(len(looked.found))
        assert theirs[name] == (f"Intruders: {counts[-1]}" if counts[-1] else "No intruders")
        if dtype == torch.float32 and looked.found:
            scale = layer.scaling["default"]
            mine, _ = truncated(repaired(LowRank(edit.shape, B, A, scale), looked, 0.6), 3, scale=scale)
            torch.testing.assert_close(
                mine.delta(weight), layer.get_delta_weight("intruder_reduced"), atol=2e-5, rtol=1e-4
            )
            assert mine.scale == scale
    assert len(counts) == 4
    assert max(counts) > 0
    assert sum(counts) < 8 * len(counts), "some directions are intruders and some are not"
