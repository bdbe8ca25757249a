"""``intarsia bench train``: who is measured, what is counted, and that the base is left as it was."""

from __future__ import annotations

import io
import statistics
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import intarsia as ia
from intarsia.bench import contenders, memory, models, others, train
from intarsia.bench.budget import Scale, fitted
from intarsia.bench.contenders import Base
from intarsia.bench.costs import Cost, Costs
from intarsia.bench.wanted import label, method_config
from intarsia.train.progress import Progress

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def costs() -> Costs:
    """Every contender on a tiny model, two rounds."""
    torch.set_num_threads(1)
    return train.run(
        train.Setup(size="tiny", dtype="float32", device="cpu", length=16, rounds=2, steps=1, threads=1,
                    attach_rounds=2, methods=["shira density=0.05"])
    )  # fmt: skip


def base(size: str = "tiny") -> Base:
    return Base(models.random_llama(models.size_of(size), torch.float32, CPU), torch.arange(24).view(2, 12))


def test_everybody_is_measured(costs: Costs) -> None:
    found = {row.subject for row in costs.rows}
    left_out = {one["subject"] for one in costs.skipped}  # too few tiles in so small a weight
    assert found | left_out == {c.name for c in train.known()} | {"shira density=0.05"}
    assert {"floor", "full", "column@equal", "element@1%", "paca@equal", "peft-lora@r16", "peft-miss@equal"} <= found
    assert all(len(row.times) == 2 and min(map(min, row.times.values())) >= 0 for row in costs.rows)
    assert all(row.kept_bytes for row in costs.rows)


def test_counts_are_equal_where_they_are_said_to_be(costs: Costs) -> None:
    equal = {row.subject: row.trained for row in costs.rows if row.subject.endswith(("@equal", "lora@r16"))}
    assert equal["lora@r16"] == equal["peft-lora@r16"] == base().count
    del equal["s2ft@equal"]  # heads and channels of so small a model are fewer than that
    assert all(abs(count / equal["lora@r16"] - 1) < 0.1 for count in equal.values()), equal


def test_the_optimizer_keeps_two_numbers_for_each_trained_one(costs: Costs) -> None:
    for row in costs.rows:
        assert row.optimizer_bytes == 8 * row.trained


def test_the_floor_keeps_least_and_trains_nothing(costs: Costs) -> None:
    floor = costs.find("floor", "float32")
    assert floor is not None
    assert floor.trained == 0
    kept = {row.subject: row.kept_bytes or 0 for row in costs.rows}
    del kept["s2ft@equal"]  # trains nothing below the first block's output projection, so its gradient stops there
    assert all(size >= kept["floor"] > 0 for size in kept.values()), kept


def test_the_result_is_plain_and_the_table_names_everybody(costs: Costs, tmp_path: Any) -> None:
    plain = costs.to_dict()
    assert plain["versions"]["torch"] == torch.__version__
    row = next(row for row in plain["rows"] if row["subject"] == "column@equal")
    assert row["against"] == "peft-lora@r16"
    assert row["setting"]["granularity"] == "column"
    assert set(row["ratios"]) == {"floor", "full", "peft-lora@r16", "peft-shira@r16"}
    assert row["ratios"]["peft-shira@r16"]["attach"] > 0
    assert [table.row_count for table in costs.tables("float32")] == [len(costs.rows)]
    narrow = Console(width=80, file=io.StringIO())
    for table in costs.tables("float32", 80):
        narrow.print(table)
    shown = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert all(shown.count(f"{row.subject} ") >= 2 for row in costs.rows)
    assert costs.picture(tmp_path / "costs.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of PEFT's SHiRA
def test_no_weight_moves() -> None:
    """All stand on one base, so a contender that changed it would change everybody's measurement."""
    shared = base()
    before = ia.digest(shared.model)
    run = train._Run(train.Setup(attach_rounds=1, rounds=1, steps=1), train.known(), "float32", CPU,
                     Costs({}, [], [], ()), Progress())  # fmt: skip
    run.base = shared
    run._attach()
    ours = {n: p for n, p in shared.ours.named_parameters() if ".adapters." not in n}
    assert [id(p) for p in ours.values()] == [id(p) for p in shared.model.parameters()]
    for name, subject in run.subjects.items():
        run._visit(subject)
        assert ia.digest(shared.model) == before, name
        assert not any(p.grad is not None for p in shared.model.parameters()), name
        assert not any(p.requires_grad for p in shared.model.parameters()), name


def test_ratios_are_taken_within_rounds() -> None:
    def cost(times: list[float]) -> Cost:
        return Cost("x", "", "float32", 1, 0.0, {}, times={n: (t, 0.5) for n, t in enumerate(times)})

    slow, quick = cost([2.0, 40.0, 6.0]), cost([1.0, 10.0, 3.0, 99.0])
    assert slow.ratio(quick, "forward_backward") == 2.0  # of 2, 4 and 2
    assert slow.ratio(quick, "step") == statistics.median([2.5 / 1.5, 40.5 / 10.5, 6.5 / 3.5])
    assert slow.ratio(cost([]), "step") is None
    assert slow.ratio(quick, "kept") is None
    assert (slow.forward_backward_s, slow.optimizer_s, slow.step_s) == (6.0, 0.5, 6.5)


# ------------------------------------------------------------------ bytes
class Squares(nn.Module):
    """y = (x W)^2: keeps x, W and x W."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.constant = (torch.randn(16),)  # a plain attribute, resident all the same

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.weight * self.constant[0]) ** 2).sum()


def test_kept_bytes_are_those_of_a_hand_count() -> None:
    model, x = Squares(), torch.randn(4, 8)
    # x for dW, x W for the square; W and the constant are resident. The product with the constant needs no x W.
    assert memory.kept_bytes(model, lambda: model(x)) == 4 * (4 * 8 + 4 * 16)
    assert model.weight.grad is not None


def test_a_peak_counts_what_a_block_holds_at_most() -> None:
    with memory.Peak(CPU) as peak:
        torch.ones(2**24)  # 64 MiB
    if peak.bytes is None:
        pytest.skip("this system does not tell a process its highest resident size")
    assert 60 * 2**20 < peak.bytes < 100 * 2**20


def test_a_twin_has_modules_of_its_own_on_the_same_weights() -> None:
    model = base().model
    twin = models.twin(model)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}


# ------------------------------------------------------------------ who takes part
def test_names_are_globs_over_names_and_stems() -> None:
    everybody = train.known()
    assert [c.name for c in contenders.chosen(everybody, ["floor,peft-*a"])] == [
        "floor", "peft-lora@r16", "peft-dora@r16", "peft-shira@r16"
    ]  # fmt: skip
    assert {c.name for c in contenders.chosen(everybody, ["element"])} == {"element@1%", "element@equal"}
    with pytest.raises(ia.IntarsiaError, match=r"no contender 'colum'; did you mean 'column'\?"):
        contenders.chosen(everybody, ["colum", "floor"])


def test_without_peft_its_methods_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    found = train.run(train.Setup(size="tiny", dtype="float32", device="cpu", length=8, rounds=1, steps=1, threads=1,
                                  attach_rounds=1, only=["floor", "peft-lora"]))  # fmt: skip
    assert [row.subject for row in found.rows] == ["floor"]
    assert "peft is not installed" in found.skipped[0]["why"]


def test_an_older_peft_lacks_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.delattr(peft, "SupertuningConfig", raising=False)
    maker = next(c for c in others.contenders() if c.stem == "peft-supertuning")
    with pytest.raises(contenders.Unavailable, match="has no SupertuningConfig"):
        maker.make(base())


def test_whoever_needs_too_much_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = memory.kept_bytes

    def short(model: nn.Module, loss: Any) -> int:
        if any(p.requires_grad and p.numel() > 1000 for p in model.parameters()):
            raise torch.OutOfMemoryError("no")
        return real(model, loss)

    monkeypatch.setattr(train, "kept_bytes", short)
    found = train.run(train.Setup(size="tiny", dtype="float32", device="cpu", length=8, rounds=1, steps=1, threads=1,
                                  attach_rounds=1, only=["floor", "full"]))  # fmt: skip
    assert [row.subject for row in found.rows] == ["floor"]
    assert found.skipped == [{"subject": "full", "dtype": "float32", "why": "does not fit into memory"}]


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    visit, visits = train._Run._visit, []

    def third(self: Any, subject: Any) -> tuple[float, float]:
        visits.append(subject)
        if len(visits) == 4:
            raise KeyboardInterrupt
        return visit(self, subject)

    monkeypatch.setattr(train._Run, "_visit", third)
    found = train.run(train.Setup(size="tiny", device="cpu", length=8, rounds=3, steps=1, threads=1,
                                  attach_rounds=1, only=["floor", "lora"]))  # fmt: skip
    assert found.interrupted
    assert sum(len(row.times) for row in found.rows) == 3
    assert found.dtypes() == ["float32"]
    assert found.to_dict()["interrupted"] is True


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ({"size": "48m"}, "no size '48m'; did you mean '47m'"),
        ({"dtype": "float23"}, "no dtype 'float23'; did you mean 'float32'"),
        ({"device": "cpuu"}, "no device 'cpuu'; did you mean 'cpu'"),
        ({"methods": ["shirra"]}, "unknown method 'shirra'; did you mean 'shira'"),
        ({"methods": ["shira densty=1"]}, "shira has no field 'densty'; did you mean 'density'"),
        ({"longest": True, "device": "cpu"}, "on a GPU only"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_loaded(setup: dict[str, Any], said: str) -> None:
    with pytest.raises(ia.IntarsiaError, match=said):
        train.run(train.Setup(**setup))


@pytest.mark.parametrize(
    ("most", "found"), [(100, 0), (256, 256), (511, 256), (512, 512), (1300, 1280), (5000, 4864), (10**9, 8192)]
)
def test_the_longest_that_fits(most: int, found: int) -> None:
    assert train.longest(lambda length: length <= most, 256, 8192) == found


# ------------------------------------------------------------------ methods in words, and counts
@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("shira", {"name": "shira"}),
        ("shira scorer=snip density=1e-2", {"name": "shira", "scorer": "snip", "density": 0.01}),
        ("dora 'inner={name: lora, rank: 2}'", {"name": "dora", "inner": {"name": "lora", "rank": 2}}),
        ("{name: paca, rank: 3}", {"name": "paca", "rank": 3}),
        ({"name": "lora"}, {"name": "lora"}),
    ],
)
def test_methods_are_written_in_words(text: Any, config: dict[str, Any]) -> None:
    assert method_config(text) == config
    assert (
        method_config(label(config).replace("inner={name: lora, rank: 2}", "'inner={name: lora, rank: 2}'")) == config
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a name and its fields"),
        ("shira snip", "'snip' is no FIELD=VALUE"),
        ("shira density=1 density=2", "density is given twice"),
        ("shira 'density=1", "expected a name and its fields"),
        ("{shira}", "a method is given as"),
        ("shira density=[", "method 'shira density=\\[', density, line 1"),
    ],
)
def test_words_that_name_no_method(text: str, said: str) -> None:
    with pytest.raises(ia.IntarsiaError, match=said):
        method_config(text)


@pytest.mark.parametrize(
    "config",
    [{"name": "shira"}, {"name": "shira", "granularity": "column"}, {"name": "paca"}, {"name": "lora"},
     {"name": "dora"}, {"name": "dora", "inner": "shira"}, {"name": "s2ft"}],
    ids=str,
)  # fmt: skip
def test_counts_are_fitted(config: dict[str, Any]) -> None:
    wanted, scale = 8000, Scale(base().model)
    found = scale.trained(ia.registry.build(fitted(config, scale, wanted)))
    assert abs(found - wanted) <= 1024, found  # half a rank of LoRA, half a column each, a head: the coarsest steps
    if config == {"name": "shira"}:
        assert abs(found - wanted) <= 14, "half an entry of each weight"


@pytest.mark.parametrize(
    "given", [{"name": "dora", "inner": {"name": "lora", "rank": 7}}, {"name": "shira", "density": 0.1},
              {"name": "s2ft", "down": 0.5}], ids=str,
)  # fmt: skip
def test_a_knob_that_is_given_stays(given: dict[str, Any]) -> None:
    assert fitted(given, Scale(base().model), 100) == given
