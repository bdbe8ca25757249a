"""What is written for PEFT is loaded by PEFT, and its merged weights and outputs are ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import intarsia as ia
from intarsia.edits import Blocks, Combined, Edit, Kernel, LowRank, Rescaled, Sparse, Sum, columns, elements
from intarsia.interop import peft_lora, peft_shira, read_peft
from intarsia.interop.approximation import best, losses
from intarsia.interop.peft_folder import BASE_DIGEST, CONFIG, TENSORS
from intarsia.model import base_of
from intarsia.support import Column, Diagonal, Line, Row, Shape, Tile
from interop.peft_oracle import convolutions, gpt2, llama, loaded, merged, plain_net, quietly
from small import some_input

CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sparse(unit: Any, shape: Shape, index: list[int], dtype: torch.dtype = torch.float32) -> Sparse:
    values = numbers(*unit.values_shape(shape, len(index)), dtype=dtype)
    return Sparse.of(unit, shape, {"indices": torch.tensor(index, dtype=torch.int64), "values": values})


def low_rank(shape: Shape, rank: int = 2, scale: float = 0.75, dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank(shape, numbers(shape[0], rank, dtype=dtype), numbers(rank, shape[1], seed=1, dtype=dtype), scale)


def rescaled(inner: Edit, dtype: torch.dtype = torch.float32) -> Rescaled:
    return Rescaled(inner.shape, inner, 1 + numbers(inner.shape[0], seed=2, dtype=dtype).abs())


def adapter_of(model: nn.Module, edits: Mapping[str, Edit]) -> ia.Adapter:
    base, layouts = base_of(model, edits)
    return ia.Adapter("ours", edits, base, {"name": "hand-made"}, layouts)


def set_in(model: nn.Module, adapter: ia.Adapter) -> nn.Module:
    model = copy.deepcopy(model)
    deck = ia.Deck(model)
    deck.add(adapter)
    deck.use("ours")
    return model


def same_weights(theirs: dict[str, Tensor], ours: nn.Module, dtype: torch.dtype) -> None:
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(theirs[name], weight.detach(), rtol=CLOSE[dtype], atol=CLOSE[dtype])


UP, DOWN = (24, 16), (16, 24)
Make = Callable[[torch.dtype], Edit]

EXACT: dict[str, dict[str, Make]] = {
    "rows": {"up": lambda d: sparse(Row(1), UP, [1, 5, 23], d)},
    "columns": {"up": lambda d: sparse(Column(1), UP, [0, 15], d), "down": lambda d: sparse(Column(1), DOWN, [3], d)},
    "wide rows": {"up": lambda d: sparse(Row(4), UP, [0, 5], d)},
    "wide columns": {"down": lambda d: sparse(Column(3), DOWN, [2, 7], d)},
    "low rank": {"up": lambda d: low_rank(UP, 2, 0.75, d), "down": lambda d: low_rank(DOWN, 2, 0.75, d)},
    "an odd scale": {"up": lambda d: low_rank(UP, 3, 0.1 + 0.2, d)},
    "ranks and scales": {"up": lambda d: low_rank(UP, 2, 2.0, d), "down": lambda d: low_rank(DOWN, 5, 0.3, d)},
    "blocks": {"up": lambda d: Blocks(UP, numbers(4, 6, 2, dtype=d), numbers(4, 2, 4, dtype=d), 0.75)},
    "combined": {"up": lambda d: Combined(UP, numbers(5, dtype=d), numbers(7, dtype=d), 3, 11, 0.75)},
    "sum": {"up": lambda d: Sum(UP, (sparse(Row(1), UP, [2], d), low_rank(UP, 2, 0.3, d), sparse(Column(1), UP, [1, 9], d)))},
    "weighted sum": {"up": lambda d: Sum(UP, (sparse(Row(1), UP, [2], d), low_rank(UP, 2, 0.5, d)), (0.5, -2.0))},
    "one empty": {"up": lambda d: sparse(Row(1), UP, [], d), "down": lambda d: low_rank(DOWN, 2, 1.0, d)},
    "dora": {"up": lambda d: rescaled(low_rank(UP, 2, 0.5, d), d), "down": lambda d: rescaled(low_rank(DOWN, 2, 0.5, d), d)},
    "dora of columns": {"up": lambda d: rescaled(sparse(Column(2), UP, [1, 3], d), d)},
    "dora beside none": {"up": lambda d: rescaled(low_rank(UP, 2, 0.5, d), d), "down": lambda d: low_rank(DOWN, 2, 0.5, d)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", EXACT)
def test_lora_in_peft_has_our_merged_weights_and_output(kind, dtype, tmp_path):
    model = plain_net(dtype)
    adapter = adapter_of(model, {f"{name}.weight": make(dtype) for name, make in EXACT[kind].items()})
    written = peft_lora.write(adapter, model, tmp_path / "theirs")
    assert written.loss == 0.0
    ours, theirs = set_in(model, adapter), loaded(model, tmp_path / "theirs")
    x = some_input(dtype)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)
    same_weights(merged(theirs), ours, dtype)


def test_lora_on_conv1d_and_embedding(tmp_path):
    model = gpt2()
    attention, tokens = "transformer.h.1.attn.c_attn.weight", "transformer.wte.weight"
    edits = {attention: rescaled(low_rank((48, 16))), tokens: rescaled(sparse(Column(1), (16, 40), [3, 17]))}
    adapter = adapter_of(model, edits)
    peft_lora.write(adapter, model, tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / CONFIG).read_text())["fan_in_fan_out"] is True
    same_weights(merged(loaded(model, tmp_path / "theirs")), set_in(model, adapter), torch.float32)


def test_lora_on_convolutions(tmp_path):
    model = convolutions()
    edits = {"one.weight": rescaled(low_rank((6, 12))), "two.weight": rescaled(sparse(Row(1), (6, 24), [1, 4]))}
    adapter = adapter_of(model, edits)
    peft_lora.write(adapter, model, tmp_path / "theirs")
    same_weights(merged(loaded(model, tmp_path / "theirs")), set_in(model, adapter), torch.float32)
    grouped = {"grouped.weight": low_rank((6, 18))}
    with pytest.raises(ia.IntarsiaError, match="grouped.weight: it is a grouped convolution"):
        peft_lora.write(adapter_of(model, grouped), model, tmp_path / "more")


def test_lora_on_an_embedding_that_is_tied(tmp_path):
    model: Any = llama()
    ids = torch.arange(12).view(2, 6)
    adapter = adapter_of(model, {"model.embed_tokens.weight": sparse(Column(1), (16, 40), [3, 4, 5])})
    peft_lora.write(adapter, model, tmp_path / "theirs")
    ours, theirs = set_in(model, adapter), loaded(model, tmp_path / "theirs")
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs(ids).logits, model(ids).logits, atol=1e-3)
    assert read_peft(tmp_path / "theirs", model).edits.keys() == adapter.edits.keys()
    dora = adapter_of(model, {"model.embed_tokens.weight": rescaled(low_rank((16, 40)))})
    with pytest.raises(ia.IntarsiaError, match="no DoRA on a weight that is shared with lm_head"):
        peft_lora.write(dora, model, tmp_path / "more")


@pytest.mark.parametrize("kind", EXACT)
def test_what_was_written_is_read_again(kind, tmp_path):
    model = plain_net()
    adapter = adapter_of(model, {f"{name}.weight": make(torch.float32) for name, make in EXACT[kind].items()})
    peft_lora.write(adapter, model, tmp_path / "theirs")
    again = read_peft(tmp_path / "theirs", model)
    for name, edit in again.edits.items():
        W = model.get_parameter(name).detach()
        expected = adapter.edits[name].fold(W) if name in adapter.edits else W
        torch.testing.assert_close(edit.fold(W), expected, rtol=1e-6, atol=1e-6)


def test_readers_without_patterns_get_the_right_scale(tmp_path):
    """alpha / r is 1 at every weight where ranks differ: so it is with the wrong rank in both places."""
    model = plain_net()
    adapter = adapter_of(model, {"up.weight": low_rank(UP, 2, 2.0), "down.weight": low_rank(DOWN, 5, 0.5)})
    peft_lora.write(adapter, model, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) | {config["r"]} == {2, 5}
    tensors = load_file(tmp_path / "theirs" / TENSORS)
    assert torch.equal(tensors["base_model.model.up.lora_B.weight"], 2 * numbers(24, 2))


def test_one_rank_and_scale_need_no_patterns(tmp_path):
    model = plain_net()
    adapter = adapter_of(model, {"up.weight": low_rank(UP, 2, 0.3), "down.weight": low_rank(DOWN, 2, 0.3)})
    peft_lora.write(adapter, model, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {}, {})
    assert config["lora_alpha"] / 2 == 0.3
    assert torch.equal(load_file(tmp_path / "theirs" / TENSORS)["base_model.model.up.lora_B.weight"], numbers(24, 2))


def test_targets_name_the_edited_layers_and_no_others():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.a, self.b = nn.Linear(2, 2), nn.Module(), nn.Module()
            self.a.up, self.b.down = nn.Linear(2, 2), nn.Linear(2, 2)

    from intarsia.interop.peft_folder import pattern_value, patterns, targets

    model = Nested()
    assert targets(model, ["up", "a.up"]) == ["up"]
    assert targets(model, ["a.up"]) == ["a.up"]
    assert targets(model, ["up", "b.down"]) == r"b\.down|up"
    assert targets(model, ["b.down"]) == ["down"]
    assert pattern_value({"up": 1}, "a.up", 0) == 1
    assert pattern_value({"up": 1}, "a.warmup", 0) == 0, "names end at a dot"
    values = {"up": 3, "a.up": 4, "b.down": 5}
    written = patterns(values, 5)
    assert {name: pattern_value(written, name, 5) for name in values} == values


# ------------------------------------------------------------------ what is no low rank
ROUGH: dict[str, Edit] = {
    "elements": elements(UP, torch.arange(0, 384, 7), numbers(55)),
    "lines": sparse(Line(4), UP, list(range(0, 96, 5))),
    "tiles": sparse(Tile(4), UP, [0, 5, 10, 15, 20]),
    "diagonals": sparse(Diagonal(), UP, [0, 3]),
    "kernel": Kernel(UP, numbers(2, 16, 2), numbers(2, 24, 2, seed=1), None, 300, "soft"),
    "rescaled elements": rescaled(elements(UP, torch.arange(0, 384, 7), numbers(55))),
    "sum": Sum(UP, (low_rank(UP), elements(UP, torch.arange(0, 384, 7), numbers(55)))),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROUGH)
def test_the_rest_is_refused_with_the_loss_that_it_would_have(kind, tmp_path):
    model = plain_net()
    adapter = adapter_of(model, {"up.weight": ROUGH[kind]})
    with pytest.raises(
        ia.IntarsiaError, match=r"ours is not exactly a LoRA: 1 weights: .* (\S+%) at rank 8"
    ) as refused:
        peft_lora.write(adapter, model, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    W = model.get_parameter("up.weight").detach()
    D = ROUGH[kind].delta(W).double()
    singular = torch.linalg.svdvals(D)
    loss = float(singular[8:].norm() / singular.norm())
    assert f"{loss:.1%} at rank 8" in str(refused.value)
    written = peft_lora.write(adapter, model, tmp_path / "theirs", rank=8)
    assert written.loss == pytest.approx(loss, rel=1e-4)
    weight = merged(loaded(model, tmp_path / "theirs"))["up.weight"]
    assert float((weight - W - D).norm() / D.norm()) == pytest.approx(loss, rel=1e-3)
    assert f"{loss:.1%} of the change" in (tmp_path / "theirs" / "README.md").read_text()


def test_a_rank_leaves_alone_what_is_exact(tmp_path):
    model = plain_net()
    adapter = adapter_of(model, {"up.weight": ROUGH["elements"], "down.weight": low_rank(DOWN, 5)})
    written = peft_lora.write(adapter, model, tmp_path / "theirs", rank=1)
    assert written.facts["approximated"] == 1
    weight = merged(loaded(model, tmp_path / "theirs"))["down.weight"]
    torch.testing.assert_close(
        weight, set_in(model, adapter).get_parameter("down.weight").detach(), rtol=1e-6, atol=1e-6
    )
    with pytest.raises(ia.IntarsiaError, match="rank=0 must be 1 or more"):
        peft_lora.write(adapter, model, tmp_path / "more", rank=0)


def test_a_large_weight_is_approximated_nearly_as_well(monkeypatch):
    D = numbers(60, 50) * torch.logspace(0, -2, 50)
    exact = float(torch.linalg.svdvals(D)[4:].norm())
    assert best(D, 4)[2] == pytest.approx(exact, rel=1e-5)
    monkeypatch.setattr("intarsia.interop.approximation.SIDE", 10)
    before = torch.random.get_rng_state()
    B, A, lost = best(D, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (B.shape, A.shape) == ((60, 4), (4, 50))
    assert lost == pytest.approx(exact, rel=1e-3)
    assert lost == pytest.approx(float((D - B @ A).norm()), rel=1e-5)


def test_losses_of_an_exact_low_rank_are_nothing():
    D = low_rank(UP, 2).delta(torch.zeros(UP))
    assert losses([D, torch.zeros(3, 2)], [1, 2]) == {
        1: pytest.approx(losses([D], [1])[1]),
        2: pytest.approx(0, abs=1e-6),
    }


# ------------------------------------------------------------------ SHiRA
@pytest.mark.parametrize(
    "kind", ["elements", "lines", "tiles", "diagonals", "kernel", "rows", "columns", "sum of elements"]
)
def test_shira_in_peft_has_our_merged_weights_and_output(kind, tmp_path):
    model = plain_net()
    more = {
        "rows": sparse(Row(1), UP, [2, 3]),
        "columns": sparse(Column(2), UP, [2, 3]),
        "sum of elements": Sum(UP, (sparse(Row(1), UP, [2]), elements(UP, torch.arange(0, 384, 7), numbers(55)))),
    }
    edit = (ROUGH | more)[kind]
    adapter = adapter_of(model, {"up.weight": edit, "down.weight": elements(DOWN, torch.arange(3), numbers(3))})
    written = peft_shira.write(adapter, model, tmp_path / "theirs")
    ours, theirs = set_in(model, adapter), loaded(model, tmp_path / "theirs")
    x = some_input()
    with torch.sparse.check_sparse_tensor_invariants(True):
        torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    same_weights(merged(theirs), ours, torch.float32)
    entries = load_file(tmp_path / "theirs" / TENSORS)
    for name in ("up", "down"):
        where = entries[f"base_model.model.{name}.shira_indices"]
        assert where.shape == (2, 40 * written.facts["r"])
        assert len(where.unique(dim=1).T) == where.shape[1], "no place twice"
    again = set_in(model, ia.Adapter("ours", read_peft(tmp_path / "theirs", model).edits, adapter.base, {}))
    assert torch.equal(again.get_parameter("up.weight"), ours.get_parameter("up.weight"))


def test_shira_takes_the_least_count_that_holds_all(tmp_path):
    model = plain_net()
    found = {}
    for count in (1, 40, 41, 360):
        adapter = adapter_of(model, {"up.weight": elements(UP, torch.arange(count), numbers(count))})
        written = peft_shira.write(adapter, model, tmp_path / str(count))
        found[count] = (written.facts["r"], written.facts["filled"])
    assert found == {1: (1, 39), 40: (1, 0), 41: (2, 39), 360: (9, 0)}
    full = adapter_of(model, {"up.weight": elements(UP, torch.arange(361), numbers(361))})
    with pytest.raises(
        ia.IntarsiaError, match="up: PEFT has one r for all weights .* r=10, which is more than the 384"
    ):
        peft_shira.write(full, model, tmp_path / "full")


def test_shira_refuses_what_it_cannot_hold(tmp_path):
    model = plain_net()
    adapter = adapter_of(
        model, {"up.weight": low_rank(UP), "down.weight": rescaled(columns(DOWN, torch.tensor([1]), numbers(16, 1)))}
    )
    with pytest.raises(
        ia.IntarsiaError, match=r"(?s)up.weight: low_rank edits change every entry.*down.weight: rescaled edits"
    ):
        peft_shira.write(adapter, model, tmp_path / "theirs")
    other = adapter_of(gpt2(), {"transformer.wte.weight": elements((16, 40), torch.arange(3), numbers(3))})
    with pytest.raises(ia.IntarsiaError, match="sits on Linear layers alone"):
        peft_shira.write(other, gpt2(), tmp_path / "theirs")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ the folder
@pytest.mark.parametrize("write", [peft_lora.write, peft_shira.write], ids=["lora", "shira"])
def test_the_base_and_the_place_are_checked_before_anything_is_written(write, tmp_path):
    model = plain_net()
    adapter = adapter_of(model, {"up.weight": sparse(Row(1), UP, [1])})
    other = plain_net()
    with torch.no_grad():
        other.get_parameter("down.weight")[0, 0] += 1
    with pytest.raises(ia.IntarsiaError, match="ours belongs to another base"):
        write(adapter, other, tmp_path / "theirs")
    assert list(tmp_path.iterdir()) == []
    write(adapter, model, tmp_path / "theirs")
    with pytest.raises(ia.IntarsiaError, match="exists already"):
        write(adapter, model, tmp_path / "theirs")
    (tmp_path / "theirs" / TENSORS).write_text("old")
    write(adapter, model, tmp_path / "theirs", overwrite=True)
    assert read_peft(tmp_path / "theirs", model).edits.keys() == adapter.edits.keys()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ia.IntarsiaError, match="is not a PEFT adapter, so it is not overwritten"):
        write(adapter, model, tmp_path / "mine", overwrite=True)
    with pytest.raises(ia.IntarsiaError, match="named like a file"):
        write(adapter, model, tmp_path / "one.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "theirs"]
    with safe_open(tmp_path / "theirs" / TENSORS, "pt") as file:
        assert file.metadata()[BASE_DIGEST] == adapter.base.digest
    with pytest.raises(ia.IntarsiaError, match="belongs to another base: it was written for weights with digest"):
        read_peft(tmp_path / "theirs", other)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    model = plain_net()
    adapter = adapter_of(model, {"up.weight": sparse(Row(1), UP, [1])})
    peft_lora.write(adapter, model, tmp_path / "theirs")
    before = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("intarsia.interop.peft_folder.save_file", full)
    with pytest.raises(
        ia.IntarsiaError, match=r"could not write .*theirs: No space left on device; nothing there was changed"
    ):
        peft_lora.write(adapter, model, tmp_path / "theirs", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    model = plain_net()
    adapter = adapter_of(model, {"up.weight": sparse(Row(1), UP, [1])})
    peft_lora.write(adapter, model, tmp_path / "theirs")
    before = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ia.IntarsiaError, match="Input/output error; nothing there was changed"):
        peft_lora.write(adapter, model, tmp_path / "theirs", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_methods_that_train_rows_and_columns_are_lora(tmp_path):
    """PaCA and S2FT, which no engine serves, as the LoRA that every engine does."""
    model = plain_net()
    ia.attach(model, ia.Paca(rank=3))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(numbers(*parameter.shape, seed=4))
    ia.sync(model)
    adapter = ia.export(model, called="ours")
    x = some_input()
    expected = model(x).detach()
    ia.detach(model, "default")
    peft_lora.write(adapter, model, tmp_path / "theirs")
    theirs = loaded(model, tmp_path / "theirs")
    torch.testing.assert_close(quietly(theirs, x), expected, rtol=1e-5, atol=1e-5)
