"""One adapter of several: parameters, lineage, use in a deck, and what cannot be merged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import intarsia as ia
from intarsia import store
from intarsia.edits import Dense, LowRank, Rescaled, Sparse, elements
from intarsia.errors import IntarsiaError
from intarsia.interop import convert
from intarsia.merge import Wanted, check_kinds, known_rules, merge, settle
from intarsia.merge.plan import settings
from intarsia.store import Base
from merge.parts import BASE, adapter, change, low_rank, some
from small import SITES, layer_of, small_net, stir, weights

SHAPE = (6, 8)
INDEX = torch.tensor([0, 9, 20, 33])
METHODS = {
    "thin": ia.Shira(density=0.2),
    "lines": ia.Shira(density=0.2, granularity="line", width=4),
    "low": ia.Lora(rank=2),
    "length": ia.Dora(ia.Lora(rank=2)),
}


def _sparse(seed: int, index: torch.Tensor = INDEX) -> Sparse:
    return elements(SHAPE, index, some(seed, len(index)))


def _pair(**more: Any) -> dict[str, store.Adapter]:
    return {
        "pirate": adapter("pirate", {"layers.0.up.weight": _sparse(0), "layers.2.up.weight": _sparse(1)}),
        "json": adapter("json", {"layers.0.up.weight": _sparse(2, INDEX + 3)} | more),
    }


def _value(made: store.Adapter, weight: str = "layers.0.up.weight") -> torch.Tensor:
    return change(made.edits[weight])


@pytest.fixture(scope="module")
def trained():
    """A net and finished adapters on it."""
    net = small_net()
    made = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        ia.attach(net, method, name=name, seed=seed)
        stir(net, name, seed)
        made[name] = ia.export(net, name, called=name)
        ia.detach(net, name)
    return net, made


# ------------------------------------------------------------------ parameters
def test_weights_are_1_unless_told_otherwise():
    pair = _pair()
    expected = change(pair["pirate"].edits["layers.0.up.weight"]) + change(pair["json"].edits["layers.0.up.weight"])
    assert _value(merge(pair)).equal(expected)
    assert _value(merge(pair, weights={"json": 0})).equal(change(pair["pirate"].edits["layers.0.up.weight"]))


def test_parameters_of_all_of_one_and_by_layer():
    pair = _pair()
    found = merge(
        pair,
        parameters={"weight": [0.5, 1.0], "lambda": 2.0},
        own={"json": {"weight": [{"filter": "up", "value": 3}]}},
    )
    first, second = (one.edits["layers.0.up.weight"] for one in pair.values())
    assert _value(found).equal(2 * (0.5 * change(first) + 3 * change(second)))
    assert _value(found, "layers.2.up.weight").equal(2 * change(pair["pirate"].edits["layers.2.up.weight"]))
    assert found.method == {"name": "merge", "rule": "sum", "normalize": False, "lambda": 2.0}
    assert found.about["merged"]["pirate"]["weight"] == [0.5, 1.0]
    assert found.about["merged"]["json"]["weight"] == 3.0


def test_a_filter_that_does_not_fit_leaves_the_parameter_of_all():
    pair = _pair(**{"head.weight": _sparse(5)})
    found = merge(pair, parameters={"weight": 0.5}, own={"json": {"weight": {"filter": "head", "value": 4}}})
    assert _value(found, "head.weight").equal(4 * change(_sparse(5)))
    first, second = (one.edits["layers.0.up.weight"] for one in pair.values())
    assert _value(found).equal(0.5 * (change(first) + change(second)))


def test_normalizing_counts_those_that_leave_a_weight_alone():
    """As in mergekit, where such a model has a change of 0."""
    pair = _pair()
    found = merge(pair, rule="linear", weights={"pirate": 1, "json": 3})
    torch.testing.assert_close(
        _value(found, "layers.2.up.weight"), change(pair["pirate"].edits["layers.2.up.weight"]) / 4
    )


def test_the_order_of_adapters_and_weights_does_not_matter():
    pair = _pair()
    turned = {name: adapter(name, dict(reversed(list(pair[name].edits.items())))) for name in reversed(pair)}
    for rule in ("sum", "ties", "dare", "della", "breadcrumbs", "magnitude"):
        one, other = (merge(group, rule=rule, seed=3) for group in (pair, turned))
        for weight in one.edits:
            torch.testing.assert_close(_value(one, weight), _value(other, weight), rtol=1e-13, atol=1e-15)
    assert merge(pair, rule="dare", seed=3).digest == merge(pair, rule="dare", seed=3).digest
    assert merge(pair, rule="dare", seed=3).digest != merge(pair, rule="dare", seed=4).digest


def test_lambda_is_that_of_every_rule():
    one = {"a": adapter("a", {"up.weight": low_rank(0, SHAPE, 2)}, loss=1.0)}
    for name in known_rules():
        whole, half = (merge(one, rule=name, parameters={"lambda": factor}) for factor in (1.0, 0.5))
        torch.testing.assert_close(_value(half, "up.weight"), 0.5 * _value(whole, "up.weight"))


def test_what_is_pruned_away_is_not_kept():
    found = merge(
        _pair(),
        rule="magnitude",
        own={"json": {"density": 0}, "pirate": {"density": [{"filter": "layers.0", "value": 0}, {"value": 1}]}},
    )
    assert list(found.edits) == ["layers.2.up.weight"]


def test_the_loss_of_an_approximation_is_told():
    pair = {
        n: adapter(n, {"up.weight": low_rank(s, SHAPE, 2), "down.weight": low_rank(s + 3, SHAPE, 1)})
        for n, s in (("a", 0), ("b", 9))
    }
    found, exact = merge(pair, rule="svd", parameters={"rank": 1}), merge(pair)
    squares = [
        (float((_value(exact, w) - _value(found, w)).square().sum()), float(_value(exact, w).square().sum()))
        for w in exact.edits
    ]
    lost, of = (sum(column) for column in zip(*squares, strict=True))
    assert found.note["lost in the approximation"] == pytest.approx(math.sqrt(lost / of))
    assert exact.note == {}


# ------------------------------------------------------------------ what comes of it
def test_it_is_an_adapter_as_any_other(tmp_path, trained):
    net, made = trained
    found = merge({n: made[n] for n in ("thin", "lines", "low")}, weights={"thin": 0.5, "low": 2.0}, name="both")
    store.write(found, tmp_path / "both")
    again = ia.read(tmp_path / "both")
    assert (again.digest, again.method, again.about) == (found.digest, found.method, found.about)
    assert again.made_of == {name: made[name].digest for name in ("thin", "lines", "low")}
    assert (
        f"made of low | lora, weight `2.0`, SHA-256 `{made['low'].digest}`"
        in (tmp_path / "both" / "README.md").read_text()
    )
    before = weights(net)
    deck = ia.Deck(net)
    deck.add(tmp_path / "both")
    deck.add(*(made[n] for n in ("thin", "lines", "low")))
    deck.use("both")
    fused = weights(net)
    deck.fuse(thin=0.5, lines=1.0, low=2.0)
    for name in SITES:
        torch.testing.assert_close(fused[name], weights(net)[name], rtol=1e-6, atol=1e-7)
    deck.off()
    assert all(before[name].equal(layer_of(net, name).weight) for name in SITES)


def test_sparse_adapters_on_other_entries_keep_every_value_to_the_bit(trained):
    _, made = trained
    even = {w: edit for w, edit in made["thin"].edits.items() if isinstance(edit, Sparse)}
    halves = [
        adapter(f"half {i}", {w: elements(e.shape, e.index[i::2].clone(), e.values[i::2]) for w, e in even.items()})
        for i in range(2)
    ]
    found = merge(halves)
    for weight, edit in even.items():
        assert change(found.edits[weight]).equal(change(edit))


def test_nothing_trains_on_from_it(tmp_path, trained):
    net, made = trained
    store.write(merge({n: made[n] for n in ("thin", "low")}), tmp_path / "both")
    with pytest.raises(IntarsiaError, match=r"was merged of thin, low, and nothing trains on from a merge.*Deck"):
        ia.load(net, tmp_path / "both")
    assert ia.attached_names(net) == []


def test_it_is_converted_where_that_is_exact(tmp_path, trained):
    net, made = trained
    low = merge(
        {
            "low": made["low"],
            "other": adapter(
                "other", {w: low_rank(7, e.shape, 1) for w, e in made["low"].edits.items()}, made["low"].base
            ),
        },
        weights={"other": 0.25},
    )
    assert all(isinstance(edit, LowRank) for edit in low.edits.values())
    store.write(low, tmp_path / "low")

    class Loaded:
        model = net

    written = convert(tmp_path / "low", tmp_path / "peft", "peft-lora", load=lambda adapter: Loaded)  # type: ignore[arg-type, return-value]
    assert written.loss == 0.0
    assert written.facts["ranks"] == [3, 3]


def test_a_registry_knows_what_it_was_made_of(tmp_path, trained):
    _, made = trained
    store.write(merge({n: made[n] for n in ("thin", "low")}), tmp_path / "both")
    registry = store.Registry(tmp_path / "registry")
    assert registry.add(tmp_path / "both").version.parents == (made["thin"].digest, made["low"].digest)


def test_supports_of_one_seed_are_stored_as_the_seed(tmp_path, trained):
    net, _ = trained
    made = []
    for seed in (0, 1):
        ia.attach(net, ia.Shira(density=0.2, scorer="random"), name="a", seed=7)
        stir(net, "a", seed)
        made.append(ia.export(net, "a", called=f"a{seed}"))
        ia.detach(net, "a")
    found = merge(made)
    store.write(found, tmp_path / "both")
    store.write(made[0], tmp_path / "one")
    sizes = [(tmp_path / name / "adapter.safetensors").stat().st_size for name in ("both", "one")]
    assert sizes[0] == sizes[1]


# ------------------------------------------------------------------ what depends on the weight
def test_dora_is_summed_as_it_is(trained):
    net, made = trained
    found = merge({n: made[n] for n in ("length", "thin")}, weights={"length": 0.5})
    W = layer_of(net, "up").weight.detach().double()
    expected = 0.5 * made["length"].edits["up.weight"].delta(W) + made["thin"].edits["up.weight"].delta(W)
    torch.testing.assert_close(found.edits["up.weight"].delta(W), expected)


def test_other_rules_need_the_base_for_it(trained):
    net, made = trained
    pair = {n: made[n] for n in ("length", "thin")}
    with pytest.raises(
        IntarsiaError,
        match=r"length: up.weight and 2 more: what a rescaled edit changes depends on the base's weight.*model: MODEL.*mwa, sum",
    ):
        merge(pair, rule="ties")
    base = {f"{name}.weight": layer_of(net, name).weight for name in SITES}
    found = merge(pair, rule="magnitude", base=base, parameters={"density": 1.0})
    assert isinstance(found.edits["up.weight"], Dense)
    W = base["up.weight"].detach()
    expected = made["length"].edits["up.weight"].delta(W) + made["thin"].edits["up.weight"].delta(W)
    torch.testing.assert_close(found.edits["up.weight"].values, expected)


# ------------------------------------------------------------------ refusals
def _broken() -> store.Adapter:
    values = torch.ones(4)
    values[2] = float("nan")
    return adapter("broken", {"layers.0.up.weight": elements(SHAPE, INDEX, values)})


OTHER = Base("1" * 64, "bfloat16", "other/base")


@pytest.mark.parametrize(
    ("adapters", "given", "said"),
    [
        ({}, {}, "there are no adapters to merge"),
        (_pair() | {"third": adapter("third", {"up.weight": _sparse(3)}, OTHER)}, {}, r"(?s)different bases.*third: other/base in bfloat16, 111111111111"),
        (_pair() | {"again": _pair()["pirate"]}, {}, "pirate and again are the same adapter .sha256 .*give it once"),
        (_pair() | {"odd": adapter("odd", {"layers.0.up.weight": elements((3, 4), torch.tensor([1]), torch.ones(1))})}, {}, r"layers.0.up.weight: pirate edits \(6, 8\), odd \(3, 4\)"),
        (_pair() | {"none": adapter("none", {})}, {}, "none edits nothing"),
        (_pair() | {"broken": _broken()}, {}, "broken: layers.0.up.weight: values hold numbers that are not finite"),
        (_pair(), {"weights": {"pirat": 1}}, "no adapter 'pirat' is merged; did you mean 'pirate'"),
        (_pair(), {"own": {"jsno": {"weight": 1}}}, "no adapter 'jsno' is merged; did you mean 'json'"),
        (_pair(), {"weights": {"pirate": float("nan")}}, "the weight of 'pirate' is nan; expected a finite number"),
        (_pair(), {"weights": {"pirate": True}}, "the weight of 'pirate' is True; expected a finite number"),
        (_pair(), {"weights": {"pirate": 0, "json": 0}}, "every weight is 0, so nothing would be left"),
        (_pair(), {"weights": {"pirate": 1, "json": -1}, "rule": "linear"}, "the weights sum to 0, and normalize divides by that"),
        (_pair(), {"weights": {"pirate": 1e308, "json": 1e308}, "rule": "linear"}, "the weights sum to inf"),
        (_pair(), {"rule": "tise"}, "unknown merge method 'tise'; did you mean 'ties'"),
        (_pair(), {"parameters": {"densty": 1}}, "parameters.densty: sum has no parameter 'densty'"),
        (_pair(), {"rule": "ties", "parameters": {"desnity": 1}}, "did you mean 'density'"),
        (_pair(), {"rule": "ties", "own": {"json": {"lambda": 2}}}, "own.json.lambda: lambda is one for the whole merge; put it under parameters"),
        (_pair(), {"rule": "ties", "own": {"json": {"density": 2}}}, "own.json.density: ties: density=2.0 must be from 0 to 1"),
        (_pair(), {"rule": "ties", "parameters": {"density": "much"}}, "parameters.density: ties: density='much' is a str; expected float"),
        (_pair(), {"rule": "ties", "parameters": {"rank": [1, 2]}}, "parameters.rank: ties: rank=1.0 is a float; expected"),
        (_pair(), {"parameters": {"weight": {"filter": "self_atn", "value": 1}}}, "parameters.weight: 'self_atn' is part of none of the 2 names of weights"),
        (_pair(**{"head.weight": _sparse(5)}), {"parameters": {"weight": [0, 1]}}, "head.weight is in no numbered layer"),
        (_pair(), {"rule": "lego"}, "pirate: layers.0.up.weight and 1 more: lego takes edits that are low rank, and this one .elements. is sparse"),
        (_pair(), {"rule": "magnitude", "parameters": {"density": 0}}, "nothing is left of these adapters"),
        (_pair(), {"weights": {"pirate": 1e308, "json": 1e308}, "parameters": {"lambda": 1e308}}, "hold numbers that are not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged(adapters, given, said):
    with pytest.raises(IntarsiaError, match=said):
        merge(adapters, **given)


def test_all_that_a_rule_cannot_take_is_told_before_anything_is_made():
    wanted = Wanted("lego", own={"json": settings("json", {"weight": 0})})
    with pytest.raises(IntarsiaError, match=r"pirate: layers.0.up.weight and 1 more: lego takes") as told:
        check_kinds(settle(_pair(), wanted), False)
    assert "json" not in str(told.value), "an adapter of weight 0 takes no part"
    check_kinds(settle(_pair(), Wanted("ties")), False)


def test_names_are_taken_once_and_folders_are_opened(tmp_path):
    pair = _pair()
    for name, one in pair.items():
        store.write(one, tmp_path / name)
    found = merge([tmp_path / "pirate", str(tmp_path / "json")])
    assert list(found.about["merged"]) == ["pirate", "json"]
    assert found.digest == merge(pair).digest
    with pytest.raises(IntarsiaError, match="two adapters are named 'json'"):
        merge([tmp_path / "json", pair["json"]])


def test_the_base_is_that_of_the_adapters():
    nameless = adapter("a", {"up.weight": _sparse(0)}, Base(BASE.digest, BASE.dtype))
    named = adapter("b", {"up.weight": _sparse(1)})
    assert merge([nameless, named]).base == BASE


def test_every_rule_says_what_it_is():
    for name, rule in known_rules().items():
        assert rule.name == name
        assert rule.title
        assert rule.formula
        assert rule.paper.startswith(("arXiv:", "https://"))
        assert rule.takes
        rule()  # every field has a default


def test_rescaled_edits_may_be_low_ranks_inside():
    edit = Rescaled(SHAPE, low_rank(0, SHAPE, 2), torch.ones(6, dtype=torch.float64))
    with pytest.raises(
        IntarsiaError, match="lego takes edits that are low rank, and this one .rescaled. is weight-dependent"
    ):
        merge([adapter("a", {"up.weight": edit})], rule="lego")
