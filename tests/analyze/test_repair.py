"""Repair: what was found is scaled, nothing else is; the result is an adapter that saves, loads and is set in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import intarsia as ia
from intarsia import store
from intarsia.analyze import adapter_intruders, intruders, repair, repaired, truncated
from intarsia.edits import Dense, Edit, LowRank, Rescaled, Sum, elements, row_norms
from intarsia.errors import IntarsiaError
from planted import N, base_of_distinct_values, planted
from small import SITES, layer_of, small_net, some_input

FACTORS = [0.0, 0.5, 0.75, 1.0, 1.5]


def test_removing_the_planted_direction_removes_its_singular_value():
    weight, edit = base_of_distinct_values(), planted(10.0)
    looked = intruders(weight, edit)
    (found,) = looked.found
    W1, new = edit.fold(weight), repaired(edit, looked, 0.0)
    assert float((new.fold(weight) - W1).norm()) == pytest.approx(found.value, rel=1e-5)
    assert intruders(weight, new).found == ()


def kinds(weight: torch.Tensor) -> list[Edit]:
    """The planted change beside others: as thin factors, dense, with elements, with lengths."""
    inner = planted(10.0)
    few = elements((N, N), torch.tensor([3, 70]), torch.tensor([0.1, -0.1]))
    return [
        inner,
        Dense((N, N), inner.delta(weight)),
        Sum((N, N), (few, inner), (1.0, 1.0)),
        Rescaled((N, N), inner, 1.01 * row_norms(inner.fold(weight))),
    ]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("kind", range(4), ids=["low rank", "dense", "sum", "rescaled"])
def test_the_formula_of_the_paper(kind, factor):
    weight = base_of_distinct_values()
    edit = kinds(weight)[kind]
    W1 = edit.fold(weight)
    U, S, Vh = torch.linalg.svd(W1)
    chosen = [d.j for d in intruders(weight, edit).found]
    assert chosen == [0]
    expected = W1 + (factor - 1) * sum(S[j] * torch.outer(U[:, j], Vh[j]) for j in chosen)
    new = repaired(edit, intruders(weight, edit), factor)
    torch.testing.assert_close(new.fold(weight), expected, atol=3e-5, rtol=1e-5)
    if factor == 1:
        assert new is edit


def test_a_low_rank_edit_stays_one_of_higher_rank():
    weight, edit = base_of_distinct_values(), planted(10.0)
    new = repaired(edit, intruders(weight, edit))
    assert isinstance(new, LowRank)
    assert new.A.shape == (2, N)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("thin", [True, False], ids=["factors", "dense"])
def test_cutting_to_a_rank_is_the_best_there_is_and_says_what_it_loses(rank, thin):
    dice = torch.Generator().manual_seed(0)
    made = LowRank((20, 14), torch.randn(20, 4, generator=dice), torch.randn(4, 14, generator=dice), -1.5)
    edit: Edit = made if thin else Dense((20, 14), made.delta(torch.zeros(20, 14)))
    D = made.delta(torch.zeros(20, 14, dtype=torch.float64))
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    new, lost = truncated(edit, rank)
    torch.testing.assert_close(new.delta(torch.zeros(20, 14)).double(), best, atol=2e-5, rtol=1e-4)
    assert lost == pytest.approx(float((D - best).norm() / D.norm()), abs=1e-6)
    assert new.scale == (-1.5 if thin else 1.0), "whoever restores the adapter knows the scale"
    lengths = new.B.norm(dim=0), new.A.norm(dim=1)
    torch.testing.assert_close(*lengths)


def test_thin_factors_are_never_multiplied_out(monkeypatch):
    monkeypatch.setattr(LowRank, "delta", lambda self, W: pytest.fail("built an O x I matrix"))
    edit = LowRank((30, 20), torch.randn(30, 2), torch.randn(2, 20), 1.0)
    assert truncated(edit, 1)[0].A.shape == (1, 20)


def test_mistakes():
    weight, edit = base_of_distinct_values(), planted(10.0)
    looked = intruders(weight, edit)
    with pytest.raises(IntarsiaError, match="lambda=nan"):
        repaired(edit, looked, float("nan"))
    with pytest.raises(IntarsiaError, match=r"these intruders are of a weight \(64, 64\); the edit is of \(2, 2\)"):
        repaired(Dense((2, 2), torch.zeros(2, 2)), looked)
    with pytest.raises(IntarsiaError, match="rank=0"):
        truncated(edit, 0)
    with pytest.raises(IntarsiaError, match="scale 0 changes nothing"):
        truncated(edit, 1, scale=0.0)
    adapter = store.Adapter("a", {"up.weight": edit}, store.Base("0" * 64, "float32"), {})
    with pytest.raises(IntarsiaError, match="does not edit weight, whose intruders were given"):
        repair(adapter, [looked], {"up.weight": weight})
    with pytest.raises(IntarsiaError, match="rank=-1"):
        repair(adapter, [], {"up.weight": weight}, rank=-1)


def trained() -> tuple[torch.nn.Module, store.Adapter, dict[str, torch.Tensor]]:
    """A small net with a LoRA whose change is large in one layer, and hardly there in the others."""
    model = small_net()
    ia.attach(model, ia.Lora(rank=2), targets="re:.*", name="one")
    with torch.no_grad():
        for site in SITES:
            size = 2.0 if site == "up" else 1e-4
            layer_of(model, site).adapters["one"].B.copy_(
                size * some_input(torch.float32, len(layer_of(model, site).weight), 2)
            )
    ia.sync(model)
    adapter = dataclasses.replace(ia.export(model, "one"), note={"loss": 1.0})
    ia.detach(model, "one")
    return model, adapter, {f"{site}.weight": layer_of(model, site).weight.detach().clone() for site in SITES}


def test_an_adapter_is_repaired_saved_and_set_in(tmp_path):
    model, adapter, weights = trained()
    looked = adapter_intruders(adapter, weights)
    before = adapter.digest
    made = repair(adapter, looked, weights, factor=0.0, name="mended")
    assert (made.intruders, made.weights, made.loss) == (len(looked[0].found), 1, 0.0)
    assert made.intruders > 0
    assert made.adapter.edits["down.weight"] is adapter.edits["down.weight"]
    assert adapter.digest == before
    assert made.adapter.about["repaired"] == {"of": before, "intruders": made.intruders, "lambda": 0.0}
    assert made.adapter.note == {}, "losses that were measured before are none of its own"
    folder = store.write(made.adapter, tmp_path / "mended")
    deck = ia.Deck(model)
    deck.add(folder)
    deck.use("mended")
    for name, weight in weights.items():
        expected = made.adapter.edits[name].fold(weight)
        torch.testing.assert_close(layer_of(model, name.removesuffix(".weight")).weight.detach(), expected)
    deck.off()
    assert all(torch.equal(layer_of(model, n.removesuffix(".weight")).weight, w) for n, w in weights.items())


def test_cut_to_its_rank_it_trains_on(tmp_path):
    model, adapter, weights = trained()
    looked = adapter_intruders(adapter, weights)
    made = repair(adapter, looked, weights, factor=0.5, rank=2)
    new, old = (made.adapter.edits["up.weight"], repaired(adapter.edits["up.weight"], looked[0], 0.5))
    lost = (new.fold(weights["up.weight"]) - old.fold(weights["up.weight"])).norm()
    assert made.loss == pytest.approx(float(lost / old.delta(weights["up.weight"]).norm()), rel=1e-3)
    assert 0 < made.loss < 1
    assert ia.load(model, store.write(made.adapter, tmp_path / "mended")) == "mended"
    assert any(parameter.requires_grad for parameter in model.parameters())
