"""Low rank to sparse and back, bits, bit masks, budgets, searches, sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import intarsia as ia
from intarsia import compress, store
from intarsia.compress import Bitmasks
from intarsia.edits import Core, Dense, LowRank, Rescaled, Sparse, elements, to_dense
from intarsia.support import sample
from small import adapted, small_net, some_input
from some_edits import adapter_of, every_kind, low_ranks, normal


# ------------------------------------------------------------------ forms
def test_the_low_rank_is_the_best_one_and_its_error_is_that_of_the_singular_values():
    change = normal(30, 20)
    before = adapter_of(
        {"a.weight": Dense((30, 20), change), "b.weight": LowRank((30, 20), normal(30, 2), normal(2, 20), 1.0)}
    )
    after = compress.to_low_rank(before, 5)
    values = np.linalg.svd(change.double().numpy(), compute_uv=False)
    whole = math.sqrt((values**2).sum() + float(to_dense(before.edits["b.weight"]).double().square().sum()))
    assert compress.change_error(before, after) == pytest.approx(math.sqrt((values[5:] ** 2).sum()) / whole, rel=1e-5)
    assert after.edits["b.weight"] is before.edits["b.weight"]
    assert (after.method["name"], after.method["rank"]) == ("lora", 5)
    assert after.about["compressed"] == [{"to": "low-rank", "rank": 5, "from": before.digest}]


def test_the_sparse_one_keeps_the_largest_entries_of_each_weight_exactly():
    before = low_ranks()
    after = compress.to_sparse(before, 0.1)
    lost = whole = 0.0
    for weight, edit in before.edits.items():
        change = to_dense(edit)
        kept = after.edits[weight]
        assert kept.touched == 60
        dense = to_dense(kept)
        assert torch.equal(dense[dense != 0], change[dense != 0])
        assert change[dense == 0].abs().max() <= dense[dense != 0].abs().min()
        lost += float(change[dense == 0].double().square().sum())
        whole += float(change.double().square().sum())
    assert compress.change_error(before, after) == pytest.approx(math.sqrt(lost / whole), rel=1e-5)
    assert compress.change_error(before, compress.to_sparse(before, 1.0)) == pytest.approx(0, abs=1e-6)


def test_the_error_is_that_of_the_dense_changes():
    before = adapter_of({f"{kind}.weight": edit for kind, edit in every_kind().items() if not edit.needs_weight})
    for after in (compress.stc(before, 0.3), compress.prune(before, 0.5), compress.in_bits(before, 1)):
        lost = whole = 0.0
        for weight, edit in before.edits.items():
            change = to_dense(edit, dtype=torch.float64)
            left = to_dense(after.edits[weight], dtype=torch.float64) if weight in after.edits else torch.zeros(())
            lost += float((change - left).square().sum())
            whole += float(change.square().sum())
        assert compress.change_error(before, after) == pytest.approx(math.sqrt(lost / whole), rel=1e-5)


def test_balanced_factors_make_the_same_change_and_are_alike():
    before = adapter_of({"a.weight": LowRank((30, 20), 0.001 * normal(30, 4), normal(4, 20), 2.0)})
    after = compress.balanced(before).edits["a.weight"]
    assert isinstance(after, LowRank)
    assert torch.allclose(to_dense(after), to_dense(before.edits["a.weight"]), atol=1e-8)
    assert torch.allclose(after.B.mT @ after.B, after.A @ after.A.mT, atol=1e-7)


def test_a_change_that_depends_on_the_weight_has_no_other_form():
    bound = adapter_of(
        {"a.weight": Rescaled((30, 20), LowRank((30, 20), normal(30, 2), normal(2, 20), 1.0), torch.ones(30))}
    )
    for rule in (lambda: compress.to_low_rank(bound, 2), lambda: compress.to_sparse(bound, 0.1)):
        with pytest.raises(ia.IntarsiaError, match="a rescaled edit changes depends on the weight"):
            rule()
    with pytest.raises(ia.IntarsiaError, match="rank=0; expected a whole number above 0"):
        compress.to_low_rank(low_ranks(), 0)


@pytest.mark.parametrize("method", [ia.Shira(density=0.1), ia.Lora(2), ia.Paca(3)], ids=lambda m: m.name)
def test_compressed_adapters_are_set_in_as_any_other_and_load_where_their_counts_are_the_methods(method, tmp_path):
    before = ia.export(adapted(method), called="before")
    rules = {
        "ternary": compress.ternary(before, 0.5, 1.0), "bits": compress.in_bits(before, 4), "prune": compress.prune(before, 0.5),
        "low": compress.to_low_rank(before, 1), "sparse": compress.to_sparse(before, 0.1),
    }  # fmt: skip
    for name, made in rules.items():
        folder = store.write(made, tmp_path / name)
        net, x = small_net(), some_input()
        base = net(x)
        deck = ia.Deck(net)
        deck.add(folder)
        deck.use(name)
        expected = small_net()
        for weight, edit in made.edits.items():
            parameter = expected.get_parameter(weight)
            parameter.data = edit.fold(parameter.detach())
        assert torch.allclose(net(x), expected(x), atol=1e-6)
        deck.off()
        assert torch.equal(net(x), base)
        if name in ("bits", "low", "sparse") or (name, method.name) == ("ternary", "lora"):
            fresh = small_net()
            ia.load(fresh, folder)
            assert torch.allclose(fresh(x), expected(x), atol=1e-6)


# ------------------------------------------------------------------ bits
def test_every_matrix_has_its_own_code_and_the_support_stays():
    before = low_ranks()
    after = compress.in_bits(before, 1)
    for name, tensor in before.tensors().items():
        mu, sd = tensor.double().mean(), tensor.double().std()
        expected = torch.where(tensor > mu, mu + 0.6745 * sd, mu - 0.6745 * sd).float()
        assert torch.allclose(after.tensors()[name], expected, rtol=1e-4, atol=1e-7)
    index = sample(900, 200, 1)
    sparse = compress.in_bits(adapter_of({"a.weight": elements((30, 30), index, normal(200))}), 4).edits["a.weight"]
    assert torch.equal(sparse.tensors()["indices"].long(), index)
    assert len(sparse.tensors()["values"].unique()) <= 16
    with pytest.raises(ia.IntarsiaError, match="bits=3; expected one of 1, 2, 4, 8"):
        compress.in_bits(before, 3)


def test_more_bits_lose_less():
    before = low_ranks()
    errors = [compress.change_error(before, compress.in_bits(before, bits)) for bits in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)  # type: ignore[type-var]
    assert errors[-1] < 0.02  # type: ignore[operator]


# ------------------------------------------------------------------ bit masks
@settings(max_examples=40)
@given(data=st.data(), s=st.floats(0.25, 4, width=16), t=st.floats(0.25, 4, width=16), count=st.integers(1, 300))
def test_products_by_counting_bits_are_those_of_the_numbers(data, s, t, count):
    signs = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=count, max_size=count)
    a, b = (torch.tensor(data.draw(signs)) * scalar for scalar in (s, t))
    one, other = Bitmasks.of(a), Bitmasks.of(b)
    assert torch.equal(one.dense(), a)
    dense = float(a.double() @ b.double())
    if a.any() and b.any():
        assert compress.dot(one, other) == dense
    assert compress.dot(one, other) == pytest.approx(dense)
    assert compress.distance(one, other) == pytest.approx(float((a.double() - b.double()).norm()), abs=1e-6)


def test_a_whole_adapter_is_one_vector_of_bits():
    one, other = compress.stc(low_ranks(), 0.4), compress.stc(compress.prune(low_ranks(), 0.9), 0.2)
    vectors = [torch.cat([t.reshape(-1) for _, t in sorted(a.tensors().items())]).double() for a in (one, other)]
    assert compress.dot(compress.bitmasks(one), compress.bitmasks(other)) == pytest.approx(
        float(vectors[0] @ vectors[1]), rel=1e-6
    )
    with pytest.raises(ia.IntarsiaError, match="sizes besides 0"):
        compress.bitmasks(low_ranks())
    with pytest.raises(ia.IntarsiaError, match="vectors of 3 and 4 numbers"):
        compress.dot(Bitmasks.of(torch.ones(3)), Bitmasks.of(torch.ones(4)))


# ------------------------------------------------------------------ search and budget
def test_the_search_finds_the_least_loss_and_of_equals_the_smallest():
    before = low_ranks()
    seen = []

    def loss(made: store.Adapter) -> float:
        step = made.about["compressed"][-1]
        seen.append((step["density"], step["alpha"]))
        return float(abs(step["alpha"] - 3.0))

    best, trials = compress.search(before, loss, densities=(0.5, 0.2), alphas=(1.0, 3.0, 6.0))
    assert seen == [(0.2, 1.0), (0.2, 3.0), (0.2, 6.0), (0.5, 1.0), (0.5, 3.0), (0.5, 6.0)]
    assert [trial.loss for trial in trials] == [2.0, 0.0, 3.0] * 2
    assert best.digest == compress.ternary(before, 0.2, 3.0).digest
    with pytest.raises(ia.IntarsiaError, match="no density or no alpha"):
        compress.search(before, loss, densities=())


def test_a_budget_is_filled_and_kept(tmp_path):
    before = adapter_of({"a.weight": elements((300, 300), sample(90_000, 10_000, 5), normal(10_000))})
    for rule in ("prune", "stc"):
        made = compress.compressed(before, rule, budget=8_000)
        folder = store.write(made, tmp_path / rule)
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert 7_500 < size <= 8_000
    assert compress.compressed(before, "prune", budget=10**7).about["compressed"][-1]["density"] == 1.0
    with pytest.raises(ia.IntarsiaError, match="a budget of 900 bytes is too small: at a density of .* it takes"):
        compress.compressed(before, "prune", budget=900)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("ternry", {}, "no rule 'ternry' to compress by; did you mean 'ternary'?"),
        ("bits", {}, r"bits needs a bits \(--bits\)"),
        ("stc", {}, r"stc needs a density \(--density\), or a budget of bytes"),
        ("stc", {"density": 0.1, "alpha": 2.0}, r"stc takes no alpha \(--alpha\); that is for ternary"),
        (
            "bits",
            {"bits": 2, "budget": 10},
            r"bits takes no budget \(--budget\); that is for ternary, stc, prune, sparse",
        ),
        ("prune", {"density": 0.1, "budget": 10}, "one follows from the other"),
    ],
)
def test_options_that_do_not_fit_are_refused(to, options, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        compress.compressed(low_ranks(), to, **options)


# ------------------------------------------------------------------ sizes
def test_sizes_are_those_that_are_written(tmp_path):
    index = sample(10_000, 5000, ia.method.Start.at("a", 0).key)
    before = adapter_of({"a.weight": elements((100, 100), index, normal(5000))})
    sizes = {one.name: one for one in compress.sizes(before)}
    folder = store.write(compress.in_bits(before, 2), tmp_path / "a")
    assert sizes["2 bits"].bytes == pytest.approx(sum(path.stat().st_size for path in folder.iterdir()), abs=8)
    assert sizes["2 bits"].numbers == (folder / store.TENSORS).stat().st_size
    assert sizes["float32"].error == 0.0
    assert sizes["float32, plain"].bytes > sizes["float32, without the seed"].bytes > sizes["float32"].bytes
    assert sizes["float32, without the seed"].numbers - sizes["float32"].numbers >= 5000, (
        "a seed saves a byte for each index"
    )
    assert sizes["bfloat16"].share_16 == sizes["float32"].share_32 == 1.0
    assert sizes["ternary 10%"].numbers < sizes["ternary 20%"].numbers < sizes["ternary 20%, bit masks"].numbers
    assert sizes["ternary 10%"].error == pytest.approx(compress.change_error(before, compress.stc(before, 0.1)))
    assert isinstance(before.edits["a.weight"], Sparse)


def test_sizes_say_what_cannot_be_had():
    from intarsia.edits import Kernel

    sizes = compress.sizes(adapter_of({"a": Kernel((6, 5), normal(2, 5, 3), normal(2, 6, 3), None, 3, "soft")}))
    assert sizes[0].bytes > 0
    (said,) = {one.refused for one in sizes if "%" in one.name}
    assert said is not None
    assert said.startswith("a: kernel edits cannot be compressed; it is for ")
    assert "Combined, " in said


def test_a_mixture_without_a_coefficient_of_b_changes_nothing():
    from intarsia.compress.numbers import changes
    from intarsia.edits import Combined

    some, none = normal(4), torch.zeros(4)
    assert changes(Combined((12, 10), none, some, 2, 0, 1.0))
    assert not changes(Combined((12, 10), some, none, 2, 0, 1.0))


def test_a_change_from_a_start_is_compressed_as_a_low_rank():
    """Its factors are far larger than what they make: refused, until it is two factors of its own."""
    factors = {"A": normal(3, 10), "B": normal(12, 3)}
    start = {name: tensor + 0.01 for name, tensor in factors.items()}
    before = adapter_of({"a.weight": Core((12, 10), factors, start, 0.5)})
    with pytest.raises(ia.IntarsiaError, match="a.weight: core edits that have a start cannot be compressed"):
        compress.prune(before, 0.5)
    after = compress.balanced(before)
    assert compress.prune(after, 0.5).edits["a.weight"].kind == "low_rank"
    lost = compress.change_error(before, after)
    assert lost is not None
    assert lost < 1e-5
    assert compress.to_low_rank(before, 6).edits["a.weight"].kind == "low_rank"
