"""EVA against the plain SVD of all inputs at once and against HF PEFT; ranks by explained variance; observers by themselves."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import Tensor, nn

import intarsia as ia
from intarsia import contract, observe
from intarsia import model as models
from intarsia.inits import spectrum
from intarsia.inits.spectrum import Spectrum
from intarsia.methods import Eva
from small import small_net, some_input

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
RANK = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run(model, batch):
    return model(batch).sum()


def inputs(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Float64 rows whose directions differ in size, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -spread, shape[-1], dtype=torch.float64)
    mixing = torch.linalg.qr(
        torch.randn(shape[-1], shape[-1], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    )[0]
    rows: Tensor = torch.randn(*shape, generator=generator, dtype=torch.float64) * scales @ mixing + 0.3
    return rows


def cosines(A: Tensor, B: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(A.double(), B.double()).abs()


def states(model, name="default"):
    return models.states(model, name)


# ------------------------------------------------------------------ the incremental SVD
@pytest.mark.parametrize("center", [False, True])
def test_batches_give_what_all_rows_together_give(center):
    batches = [inputs(40, 12, seed=seed) for seed in range(4)]
    seen = Spectrum(12, center=center)  # all directions are kept, so nothing is cut off between batches
    for batch in batches:
        seen.see(batch)
    X = torch.cat(batches)
    X = X - X.mean(0) if center else X
    _, s, V = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(seen.s, s, rtol=1e-9, atol=1e-9)
    assert seen.V is not None
    assert (cosines(seen.V, V) > 1 - 1e-9).all()
    torch.testing.assert_close(seen.explained, s.square() / X.square().sum(), rtol=1e-9, atol=1e-12)


def test_the_mean_of_batches_that_differ_is_carried_along():
    batches = [inputs(30, 8, seed=seed) + 5 * seed for seed in range(3)]
    seen = Spectrum(8, center=True)
    for batch in batches:
        seen.see(batch)
    X = torch.cat(batches)
    torch.testing.assert_close(seen.mean, X.mean(0))
    torch.testing.assert_close(seen.s, torch.linalg.svdvals(X - X.mean(0)), rtol=1e-9, atol=1e-9)


def test_large_batches_are_iterated_to_the_same(monkeypatch):
    X = inputs(300, 280, spread=3.0)
    _, s, V = torch.linalg.svd(X, full_matrices=False)
    found = spectrum.leading(X, 5)
    torch.testing.assert_close(found[0], s[:5], rtol=1e-6, atol=0)
    assert (cosines(found[1], V[:5]) > 1 - 1e-6).all()


def test_it_is_satisfied_when_what_is_needed_stands_still():
    seen = Spectrum(3, tau=0.999)
    X = inputs(50, 8)
    assert not seen.satisfied
    seen.see(X)
    assert not seen.satisfied  # nothing to compare with
    seen.see(torch.flip(X, [1]))
    assert not seen.satisfied
    for _ in range(20):
        seen.see(X)
    assert seen.satisfied
    seen.still[2] = False
    assert not seen.satisfied
    seen.needed = 2
    assert seen.satisfied


def test_batches_with_too_few_rows_are_left_out():
    seen = Spectrum(4)
    seen.see(inputs(3, 8))
    assert (seen.s, seen.count, seen.skipped) == (None, 0, 1)
    with pytest.raises(ia.IntarsiaError, match=r"up: none of \d+ batches has 4 tokens that count"):
        ia.attach(small_net(), Eva(rank=2), "up", data=[some_input(torch.float32, 3, 16)], loss=run)


# ------------------------------------------------------------------ observers
def test_layers_that_are_given_the_same_tensor_share(tiny_llama):
    model = tiny_llama()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    leaders = observe.same_inputs(model, names, lambda: model(input_ids=torch.arange(8).view(1, 8)))
    for layer in range(2):
        block = f"model.layers.{layer}"
        assert {leaders[f"{block}.self_attn.{x}_proj"] for x in "qkv"} == {f"{block}.self_attn.q_proj"}
        assert leaders[f"{block}.self_attn.o_proj"] == f"{block}.self_attn.o_proj"
        assert {leaders[f"{block}.mlp.{x}_proj"] for x in ("gate", "up")} == {f"{block}.mlp.gate_proj"}
        assert leaders[f"{block}.mlp.down_proj"] == f"{block}.mlp.down_proj"


class Twice(nn.Module):
    """The first two layers share their first input only; the last two a tensor that is written to between them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        y = self.a(x) + self.b(x)
        y = y + self.b(y)
        self.c(y)
        return self.d(y.add_(1))


def test_layers_share_only_what_is_always_the_same():
    model = Twice().requires_grad_(False)
    leaders = observe.same_inputs(model, list("abcd"), lambda: model(torch.ones(2, 4)))
    assert leaders == dict(zip("abcd", "abcd", strict=True))


class Counts:
    """An observer that is satisfied after some calls."""

    def __init__(self, enough):
        self.enough, self.rows = enough, []

    @property
    def satisfied(self):
        return len(self.rows) >= self.enough

    def see(self, x):
        self.rows.append(x)


def test_observers_see_the_tokens_that_count_until_they_are_satisfied(tiny_llama):
    model, told = tiny_llama(), []
    batches, conferred = [], list[Any]()
    for seed in (0, 1):
        ids = torch.randint(1, 300, (2, 6), generator=torch.Generator().manual_seed(seed))
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool(), -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    few, many = Counts(1), Counts(5)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    found = observe.observe(
        model, dict(zip(names, (few, many), strict=True)), batches, lambda batch: model(**batch), conferred.append,
        lambda done, of, what: told.append((done, of)),
    )  # fmt: skip
    assert [len(rows) for rows in few.rows] == [4 + 3]
    assert [len(rows) for rows in many.rows] == [7] * 5
    assert torch.equal(many.rows[0], many.rows[2])  # the first batch again
    assert found == dict(zip(names, (few, many), strict=True)) == conferred[0]
    assert told == [(1, 2)] * 4 + [(2, 2)]


# ------------------------------------------------------------------ where A begins
@pytest.mark.parametrize("whiten", [False, True])
def test_a_is_the_svd_of_what_the_layer_is_given(whiten):
    model, X = small_net(torch.float64), inputs(60, 16)
    ia.attach(model, Eva(rank=3, rho=1, whiten=whiten), "up", data=[X], loss=run)
    state = states(model)["up"]
    _, s, V = torch.linalg.svd(X, full_matrices=False)
    if whiten:  # the batch was seen twice, until the directions stood still
        V = V / (2**0.5 * s).sqrt()[:, None]
    else:
        torch.testing.assert_close(state.A @ state.A.T, torch.eye(3, dtype=torch.float64))
        lost = (X - X @ state.A.T @ state.A).norm()  # no other three directions lose less
        torch.testing.assert_close(lost, s[3:].square().sum().sqrt())
    signs = (state.A * V[:3]).sum(1, keepdim=True).sign()
    torch.testing.assert_close(state.A.detach(), V[:3] * signs, rtol=1e-7, atol=1e-9)
    assert not state.B.any()


def test_it_starts_as_the_base():
    model, x = small_net(), some_input()
    before = model(x)
    ia.attach(model, Eva(rank=2), data=[some_input(torch.float32, 64, 16)], loss=run)
    assert torch.equal(model(x), before)


# ------------------------------------------------------------------ ranks
def test_ranks_go_where_they_explain_most():
    model = small_net(torch.float64)
    ia.attach(model, Eva(rank=3, rho=2, alpha=5.0), data=[inputs(60, 16)], loss=run)
    explained = []
    x = inputs(60, 16)
    for name, layer in (("up", 0), ("down", 2), ("again", 4)):
        with torch.no_grad():
            given = model[:layer](x)
        e = torch.linalg.svdvals(given).square() / given.square().sum()
        explained += [(float(value), name) for value in e[:6]]
    expected = [name for _, name in sorted(explained, reverse=True)[:9]]
    found = {name: state.A.shape[0] for name, state in states(model).items()}
    assert found == {name: expected.count(name) for name in found}
    assert sum(found.values()) == 9
    assert {state.method.scale for state in states(model).values()} == {5.0 / 3}


def test_inputs_of_one_dimension_cede_their_rank_and_a_layer_without_gets_none():
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).double()
    with torch.no_grad():  # the second layer is given a multiple of one vector
        model[0].weight.copy_(torch.ones(16, 1, dtype=torch.float64) @ model[0].weight[:1])
        model[0].bias.zero_()
    x = inputs(64, 16, spread=0.3)
    ia.attach(model, Eva(rank=4, rho=4), data=[x - x.mean(0)], loss=run)
    assert {name: len(state.A) for name, state in states(model).items()} == {"0": 7, "1": 1}
    ia.detach(model, "default")
    with torch.no_grad():
        model[0].weight.copy_(torch.zeros(16, 16))
    ia.attach(model, Eva(rank=4, rho=4), data=[x - x.mean(0)], loss=run)
    assert {name: len(state.A) for name, state in states(model).items()} == {"0": 8}


def test_one_rank_for_all_with_rho_one(tiny_llama):
    model = tiny_llama()
    ia.attach(model, Eva(rank=RANK, rho=1), data=batches())
    assert {len(state.A) for state in states(model).values()} == {RANK}


def test_it_is_saved_with_its_ranks_and_loads(tiny_llama, tmp_path):
    model = tiny_llama()
    ia.attach(model, Eva(rank=RANK, alpha=3.0), data=batches())
    with torch.no_grad():
        for state in states(model).values():
            state.B.normal_()
    wanted, ranks = model(**batches()[0]).logits, {n: len(s.A) for n, s in states(model).items()}
    assert len(set(ranks.values())) > 1
    ia.save(model, tmp_path / "eva")
    again = tiny_llama()
    ia.load(again, tmp_path / "eva")
    assert torch.equal(again(**batches()[0]).logits, wanted)
    assert {n: len(s.A) for n, s in states(again, "eva").items()} == ranks
    assert models.record(again).adapters["eva"].method == Eva(rank=RANK, alpha=3.0)


def test_lora_starts_so_with_the_usual_options(tiny_llama):
    one, other = tiny_llama(), tiny_llama()
    ia.attach(one, Eva(rank=RANK), data=batches())
    ia.attach(other, ia.Lora(rank=RANK, start="eva"), data=batches())
    assert {n: len(s.A) for n, s in states(one).items()} == {n: len(s.A) for n, s in states(other).items()}
    assert all(torch.equal(states(one)[n].A, s.A) for n, s in states(other).items())
    laws = ["starts as the base", "saves and loads exactly", "checkpoints exactly", "counts what it trains"]
    broken = [r for r in contract.check(ia.Lora(rank=2, start="eva"), laws) if r.state == "broken"]
    assert not broken, "\n".join(map(str, broken))


def test_dora_starts_around_it(tmp_path):
    model, x = small_net(), some_input()
    before, method = model(x), ia.Dora(Eva(rank=3))
    ia.attach(model, method, data=[inputs(60, 16).float()], loss=run)
    torch.testing.assert_close(model(x), before)
    ranks = {name: len(state.A) for name, state in states(model).items()}
    assert sum(ranks.values()) == 9
    assert len(set(ranks.values())) > 1
    ia.save(model, tmp_path / "both")
    again = small_net()
    ia.load(again, tmp_path / "both")
    assert {name: len(state.A) for name, state in states(again, "both").items()} == ranks


# ------------------------------------------------------------------ HF PEFT
def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Rows with padding and a prompt that is not trained."""
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 300, (8, 24), generator=generator)
        mask = (torch.arange(24) < torch.randint(16, 25, (8, 1), generator=generator)).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(24) < 4), -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_it_is_what_peft_makes(tiny_llama, rho):
    """Inputs whose directions differ in size, as real ones do: PEFT's own SVD is approximate, and knows like ones only roughly apart."""
    model, same = tiny_llama(), tiny_llama()
    for each in (model, same):
        each.model.embed_tokens.weight.data *= torch.logspace(0, -2, 64)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=8,
        target_modules=list(TARGETS),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.99),
    )
    theirs = peft.get_peft_model(same, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    ia.attach(model, Eva(rank=RANK, alpha=8.0, rho=rho, tau=0.99, center=True), data=batches())
    found = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[name.removeprefix("base_model.model.")] = (module.lora_A["default"].weight, module.scaling["default"])
    ours = states(model)
    assert {n: len(A) for n, (A, _) in found.items()} == {n: len(s.A) for n, s in ours.items()}
    for name, (A, scale) in found.items():
        assert (cosines(ours[name].A, A) > 0.99).all(), name
        assert ours[name].method.scale == pytest.approx(scale)


def test_mistakes_are_told():
    with pytest.raises(ia.IntarsiaError, match="eva: rho=0.5 must be 1 or more"):
        Eva(rho=0.5)
    with pytest.raises(ia.IntarsiaError, match="eva: start='pissa' must be eva; lora has the others"):
        Eva(start="pissa")
    with pytest.raises(ia.IntarsiaError, match="needs calibration data: pass data="):
        ia.attach(small_net(), Eva(rank=2))
