"""Adapters that are disjoint on purpose: which entries they take, by brute force; what is refused; what fusing them gives."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import intarsia as ia
from intarsia import model as models
from intarsia.edits import positions
from intarsia.errors import IntarsiaError
from intarsia.forms import Sparse
from intarsia.method import Method, Start
from intarsia.methods.smt import Smt
from intarsia.support import Element, permute, struct
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, stir, weights

X = some_input(seed=7)


def made(model, method: Method, name: str, **given) -> ia.Adapter:
    """An adapter with stirred values; the model is the base again."""
    ia.attach(model, method, data=[X.to(layer_of(model, "up").weight.dtype)], loss=some_loss, **given)
    stir(model, seed=len(name))
    adapter = ia.export(model, "default", called=name)
    ia.detach(model, "default")
    return adapter


def entries(adapter: ia.Adapter, site: str) -> set[int]:
    edit = adapter.edits.get(f"{site}.weight")
    if edit is None:
        return set()
    found = positions(edit)
    assert found is not None
    return set(found.tolist())


# ------------------------------------------------------------------ which entries
def test_magnitude_takes_the_next_largest_for_every_task():
    """The card: sort |W| descending; task t takes positions (t - 1) K .. t K of that order."""
    model, base = small_net(), weights(small_net())
    tasks: list[ia.Adapter] = []
    for t in range(4):
        tasks.append(made(model, ia.Shira(density=0.1, scorer="magnitude"), f"task{t}", avoid=tasks))
    for site in SITES:
        sizes = base[site].abs().flatten()
        order = sorted(range(384), key=lambda i: (-float(sizes[i]), i))
        for t, task in enumerate(tasks):
            assert entries(task, site) == set(order[t * 38 : (t + 1) * 38])


@pytest.mark.parametrize("scorer", ["snip", "wanda", "residual", f"{__name__}:rising"])
def test_a_score_takes_the_best_of_what_is_left(scorer):
    model, order = small_net(), {}
    for count in range(1, 70):  # one entry more at a time gives the ranking, ties and all
        ia.attach(model, ia.Shira(density=count / 384, scorer=scorer), "up", data=[X], loss=some_loss)
        order[count] = set(state_of(model, "up").index.tolist())
        ia.detach(model, "default")
    ranking = [*order[1], *(min(order[k] - order[k - 1]) for k in range(2, 70))]
    other = made(model, ia.Shira(density=0.3), "other", seed=3)
    found = made(model, ia.Shira(density=0.1, scorer=scorer), "found", targets="up", avoid=other)
    free = [i for i in ranking if i not in entries(other, "up")]
    assert 38 <= len(free) < 69  # some are left out, and enough are known
    assert entries(found, "up") == set(free[:38])


@ia.scorer()
def rising(site, start):
    """Negative everywhere, so that an excluded entry is not hidden by a score of zero."""
    return torch.arange(384.0).view(site.shape) - 1000


def test_random_goes_on_in_the_order_of_its_permutation():
    model = small_net()
    first = made(model, ia.Shira(density=0.2), "first", seed=5)
    again = made(model, ia.Shira(density=0.2), "again", seed=5, avoid=first)
    for site in SITES:
        order = permute(torch.arange(384), 384, Start.at(site, 5).key).tolist()
        assert entries(first, site) == set(order[:77])
        assert entries(again, site) == set(order[77:154])  # the same seed: the next ones
    other = made(model, ia.Shira(density=0.5), "other", seed=6, avoid=[first])
    for site in SITES:
        order = permute(torch.arange(384), 384, Start.at(site, 6).key).tolist()
        assert entries(other, site) == set([i for i in order if i not in entries(first, site)][:192])


@pytest.mark.parametrize("scorer", ["random", "magnitude"])
def test_a_budget_by_row_stays_one(scorer):
    model = small_net()
    method = ia.Shira(density=0.25, scorer=scorer, budget="neuron")
    first = made(model, method, "first")
    second = made(
        model, method, "second", seed=1, avoid=first
    )  # in some rows its own first ones are free, in others not
    for site, (rows, columns) in zip(SITES, [(24, 16), (16, 24), (24, 16)], strict=True):
        found = entries(second, site)
        assert not found & entries(first, site)
        assert [sum(i // columns == row for i in found) for row in range(rows)] == [columns // 4] * rows


def test_struct_leaves_the_diagonal_out_and_takes_the_next_rows():
    # 24 x 16, 60 entries each. The first one: the diagonal, row 0, row 6, and the head of row 12 (see test_shira). The second one:
    # no diagonal, 60 in four rows and one more for what is taken: 24 // 5 = 4 apart. Row 0 is full; row 4 has 15, row 8 has
    # 15, row 12 what is left there, one entry; 16 has 16 and 20 takes the last 13.
    first = struct((24, 16), 60)
    free = torch.ones(384, dtype=torch.bool).index_fill(0, first, False)
    second = set(struct((24, 16), 60, free=free).tolist())
    assert not second & set(first.tolist())
    rows = {row: sum(i // 16 == row for i in second) for row in range(24)}
    assert {row: n for row, n in rows.items() if n} == {4: 15, 8: 15, 12: 1, 16: 16, 20: 13}


def test_struct_takes_rows_of_the_next_offset_where_its_own_are_full():
    rows = torch.ones(24, 16, dtype=torch.bool)
    rows[[2, 14]] = False  # of 2, 8, 14, 20, which are 24 // (ceil(40 / 16) + 1) = 6 apart
    rows[range(16), range(16)] = False
    found = struct((24, 16), 40, offset=2, free=rows.view(-1))
    assert sorted({int(i) // 16 for i in found}) == [3, 8, 20]


def test_struct_serves_as_many_adapters_as_there_is_room_for():
    model = small_net()
    tasks: list[ia.Adapter] = []
    for t in range(6):
        tasks.append(made(model, ia.Shira(density=0.16, scorer="struct"), f"t{t}", avoid=tasks))
    for site in SITES:
        assert len(set.union(*(entries(task, site) for task in tasks))) == 6 * 61


@pytest.mark.parametrize("budget", ["model", "layer"])
def test_a_budget_of_the_model_counts_what_is_left(budget):
    model, base = small_net(), weights(small_net())
    first = made(model, ia.Shira(density=0.9), "first", targets="up")
    found = made(model, ia.Shira(density=0.4, scorer="magnitude", budget=budget), "found", avoid=first)
    counts = {site: len(entries(found, site)) for site in SITES}
    assert sum(counts.values()) == round(0.4 * 3 * 384)
    assert counts["up"] <= 38
    free = {site: sorted(set(range(384)) - entries(first, site)) for site in SITES}
    sizes = {site: base[site].abs().flatten()[free[site]] for site in SITES}
    if budget == "model":
        threshold = torch.cat(list(sizes.values())).sort(descending=True).values[461]
        assert counts == {site: int((sizes[site] > threshold).sum()) for site in SITES}
    for site in SITES:
        best = sizes[site].argsort(descending=True, stable=True)[: counts[site]]
        assert entries(found, site) == {free[site][i] for i in best.tolist()}


def test_a_budget_of_the_model_gives_nothing_to_a_full_weight():
    model = small_net()
    full = made(model, ia.Shira(density=1.0), "full", targets="up")
    for budget in ("model", "layer"):
        found = made(model, ia.Shira(density=0.5, scorer="magnitude", budget=budget), "found", avoid=full)
        assert found.edits.keys() == {"down.weight", "again.weight"}


def test_tiles_compete_for_what_is_left():
    model, smt = small_net(), Smt(of="all", width=4, density=0.25)
    first = made(model, smt, "first")
    second = made(model, smt, "second", avoid=first)
    whole = made(model, Smt(of="all", width=4, density=0.5), "whole")
    for site in SITES:  # the next best of one ranking
        assert entries(first, site) | entries(second, site) == entries(whole, site)
        assert not entries(first, site) & entries(second, site)


def test_a_lottery_leaves_them_out_too():
    model = small_net()
    first = made(model, ia.Shira(density=0.3), "first")

    def train(model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(parameter)

    ia.lottery(model, ia.Shira(density=0.2, scorer="movement", budget="model"), train, avoid=first, iterations=2)
    found = ia.export(model)
    assert sum(len(entries(found, site)) for site in SITES) == round(0.2 * 3 * 384)
    for site in SITES:
        assert not entries(found, site) & entries(first, site)


def test_a_support_that_moves_does_not_move_there():
    model = small_net()
    first = made(model, ia.Shira(density=0.4, scorer="gradient"), "first")  # where it would grow
    ia.attach(model, ia.Shira(density=0.3), avoid=first)
    moved = [ia.regrow(model, "default", None, data=[X], share=0.5, loss=some_loss) for _ in range(3)]
    assert all(sum(move.values()) > 100 for move in moved)
    for site in SITES:
        assert not entries(first, site) & set(state_of(model, site).index.tolist())


def test_no_more_units_move_than_are_left():
    model = small_net()
    first = made(model, ia.Shira(density=0.6), "first")
    ia.attach(model, ia.Shira(density=0.35), avoid=first)
    moved = ia.regrow(model, "default", None, data=[X], share=1.0, loss=some_loss)
    assert moved == dict.fromkeys(SITES, 384 - 230 - 134)


# ------------------------------------------------------------------ the law
UNITS = [{"granularity": "element"}, {"granularity": "row"}, {"granularity": "column"}, {"granularity": "diagonal"},
         *({"granularity": unit, "width": width} for unit in ("line", "tile", "row", "column") for width in (2, 4))]  # fmt: skip


@settings(max_examples=60)
@given(
    st.tuples(st.sampled_from(UNITS), st.sampled_from(UNITS)),
    st.tuples(st.sampled_from(["random", "magnitude", "snip"]), st.sampled_from(["random", "magnitude", "snip"])),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 3),
    st.booleans(),
)
def test_fused_they_hold_the_values_of_each_to_the_bit(units, scorers, dtype, seed, turned):
    model = small_net(dtype)
    first = made(model, ia.Shira(density=0.15, scorer=scorers[0], **units[0]), "a", seed=seed)
    second = ia.Shira(density=0.15, scorer=scorers[1], **units[1])
    try:
        other = made(model, second, "bb", seed=seed, avoid=[first])
    except IntarsiaError as error:  # every row or column holds one of the first one's entries
        if "are left" not in str(error):
            raise
        return
    base = weights(model)
    deck = ia.Deck(model)
    deck.add(first)
    deck.add(other)
    alone = {}
    for name in ("a", "bb"):
        deck.use(name)
        alone[name] = weights(model)
    deck.fuse({"bb": 1, "a": 1} if turned else {"a": 1, "bb": 1})
    fused = weights(model)
    for site in SITES:
        mine, its = (torch.tensor(sorted(entries(each, site)), dtype=torch.int64) for each in (first, other))
        assert not set(mine.tolist()) & set(its.tolist())
        expected = base[site].flatten().clone()
        expected[mine] = alone["a"][site].flatten()[mine]
        expected[its] = alone["bb"][site].flatten()[its]
        assert torch.equal(bits(fused[site].flatten()), bits(expected))
        assert not torch.equal(fused[site], base[site])
    deck.off()
    deck.verify()


def bits(W: torch.Tensor) -> torch.Tensor:
    return W.contiguous().view(torch.uint8)


def test_a_change_of_minus_zero_stays_one():
    """-0.0 is what 0.0 + -0.0 is not: an entry of the base that is -0.0 keeps its sign."""
    model = small_net()
    with torch.no_grad():
        layer_of(model, "up").weight.fill_(-0.0)
    first, other = (
        ia.Adapter(
            name, {"up.weight": replace(edit, values=torch.full_like(edit.values, -0.0))}, adapter.base, adapter.method
        )
        for name, adapter, edit in two(model)
    )
    deck = ia.Deck(model)
    deck.add(first)
    deck.add(other)
    deck.fuse(a=1, b=1)
    assert bool(layer_of(model, "up").weight.signbit().all())


def two(model):
    first = made(model, ia.Shira(density=0.1), "a", targets="up")
    for adapter in (first, made(model, ia.Shira(density=0.1), "b", targets="up", avoid=first)):
        yield adapter.name, adapter, adapter.edits["up.weight"]


# ------------------------------------------------------------------ again and in a file
@pytest.mark.parametrize("units", UNITS, ids=str)
def test_a_random_one_is_the_same_for_the_same_seed_and_reads_back_to_the_bit(units, tmp_path):
    """A support that is not what its key draws may not be stored as a bare key."""
    model, method = small_net(), ia.Shira(density=0.2, **units)
    first = made(model, method, "first")
    torch.manual_seed(1)
    ia.attach(model, method, avoid=[first])
    stir(model)
    one = ia.export(model)
    ia.save(model, tmp_path / "one")
    ia.detach(model, "default")
    torch.manual_seed(2)
    ia.attach(model, method, avoid=[first])
    stir(model)
    assert ia.export(model).digest == one.digest
    ia.detach(model, "default")
    back = ia.read(tmp_path / "one")
    assert back.digest == one.digest
    for name, tensor in one.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)


def test_what_was_avoided_stands_in_the_file_and_stays_there(tmp_path):
    model = small_net()
    first = made(model, ia.Shira(density=0.1), "first")
    ia.attach(model, ia.Shira(density=0.1), avoid=[first, first])
    ia.save(model, tmp_path / "one")
    ia.detach(model, "default")
    assert ia.read(tmp_path / "one").about["avoid"] == [{"name": "first", "digest": first.digest}]
    ia.load(model, tmp_path / "one")
    ia.save(model, tmp_path / "two")
    assert ia.read(tmp_path / "two").about == ia.read(tmp_path / "one").about
    ia.detach(model, "one")
    assert "avoid" not in first.about
    ia.attach(model, ia.Shira(density=0.1), avoid=tmp_path / "one")
    assert ia.export(model).about["avoid"] == [{"name": "one", "digest": ia.read(tmp_path / "two").digest}]


def test_a_state_from_elsewhere_does_not_bring_avoided_entries():
    model = small_net()
    first = made(model, ia.Shira(density=0.2), "first")
    ia.attach(model, ia.Shira(density=0.2), name="plain")
    taken = models.adapter_state(model, "plain")
    taken = {name: tensor.clone() for name, tensor in taken.items()}
    ia.attach(model, ia.Shira(density=0.2), avoid=first)
    before = weights(model)
    with pytest.raises(IntarsiaError, match="to be avoided"):
        models.load_adapter_state(model, "default", taken)
    assert all(torch.equal(before[site], found) for site, found in weights(model).items())


# ------------------------------------------------------------------ what is refused
def refused(model, method: Method, match: str, **given) -> str:
    """The message; the model is as it was."""
    before = [models.digest(model), *(type(m) for m in model.modules())]
    with pytest.raises(IntarsiaError, match=match) as caught:
        ia.attach(model, method, data=[X], loss=some_loss, **given)
    assert [models.digest(model), *(type(m) for m in model.modules())] == before
    assert not hasattr(model, "_intarsia")
    return str(caught.value)


def test_an_overfull_weight_is_named_with_what_is_left():
    model = small_net()
    first = made(model, ia.Shira(density=0.9), "first", targets=["up", "again"])
    message = refused(model, ia.Shira(density=0.2), "asked for", avoid=first)
    assert message.splitlines() == [
        f"{site}: 77 elements of the 24 x 16 weight are asked for, and 38 of its 384 are left beside the adapters to avoid; "
        "ask for fewer, or avoid fewer adapters"
        for site in ("up", "again")
    ]
    with pytest.raises(IntarsiaError, match="up: 77 elements"):
        models.plan(model, ia.Shira(density=0.2), avoid=first)
    half = made(model, ia.Shira(density=0.7), "half", targets="up", seed=4)
    few = ia.Shira(density=0.2, budget="neuron")
    row = min(range(24), key=lambda row: (sum(i // 16 != row for i in entries(half, "up")), row))
    left = 16 - sum(i // 16 == row for i in entries(half, "up"))
    message = refused(model, few, "elements of every row", avoid=half)
    assert message.startswith(f"up: 3 elements of every row are asked for, and in row {row} {left} are left beside")
    whole = ia.Shira(density=0.5, scorer="magnitude", budget="model")
    refused(model, whole, r"576 units of 3 weights are asked for, and 460 of their 1152 are left", avoid=first)
    smt = Smt(of="all", width=4, density=0.9)
    assert "are asked for, and" in refused(model, smt, "left beside the adapters to avoid", avoid=first)


@pytest.mark.parametrize(
    "method",
    [ia.Lora(rank=2), ia.Dora(), ia.Dora(inner=ia.Shira(density=0.1)), ia.S2ft(layout="up > down; again", o=0.0)],
)
def test_a_method_that_cannot_says_so(method):
    model = small_net()
    message = refused(model, method, "cannot leave out the entries", avoid=made(model, ia.Shira(density=0.1), "first"))
    assert "paca, shira, smt" in message
    assert len(message.splitlines()) == 1


def test_nothing_is_disjoint_to_a_dense_change():
    model = small_net()
    lora = made(model, ia.Lora(rank=2), "lora", targets="up")
    message = refused(model, ia.Shira(density=0.1), "nothing can be disjoint", avoid=lora)
    assert "up: lora is low_rank there" in message
    found = made(model, ia.Shira(density=0.1), "found", targets=["down", "again"], avoid=lora)  # it does not meet it
    assert found.edits.keys() == {"down.weight", "again.weight"}


def test_an_adapter_of_another_base_is_refused():
    other = made(small_net(seed=1), ia.Shira(density=0.1), "other")
    message = refused(small_net(), ia.Shira(density=0.1), "belongs to another base", avoid=other)
    assert message.startswith("other, which is to be avoided,")
    assert "leave it out of avoid" in message
    assert "any_base" not in message


def test_folders_that_are_none_are_named_all_at_once(tmp_path):
    message = refused(small_net(), ia.Shira(density=0.1), "does not exist", avoid=[tmp_path / "a", str(tmp_path / "b")])
    assert [line.startswith("avoid: ") for line in message.splitlines()] == [True, True]


@dataclass(frozen=True)
class Stubborn(Sparse):
    """Always the first entries, whatever is to be avoided."""

    name, title = "stubborn", "Stubborn"

    def granularity_at(self, shape):
        return Element()

    def units(self, shape):
        return 5

    def scale_at(self, shape):
        return 1.0

    def choose(self, site, start):
        return torch.arange(5)


def test_a_method_that_ignores_it_is_found_out():
    model = small_net()
    first = made(model, ia.Shira(density=0.5), "first", seed=1)
    refused(model, Stubborn(), "holds entries that are to be avoided", avoid=first)


def test_a_loaded_support_that_avoids_others_does_not_move(tmp_path):
    model = small_net()
    ia.attach(model, ia.Shira(density=0.1), avoid=made(model, ia.Shira(density=0.1), "first"))
    ia.save(model, tmp_path / "one")
    ia.detach(model, "default")
    ia.load(model, tmp_path / "one")
    with pytest.raises(IntarsiaError, match="'one' avoids first"):
        ia.regrow(model, "one", None, data=[X], loss=some_loss)


def test_what_is_damaged_is_said(tmp_path):
    from intarsia.store.writing import checksum

    model = small_net()
    ia.attach(model, ia.Shira(density=0.1))
    ia.save(model, tmp_path / "one")
    ia.detach(model, "default")
    head = json.loads((tmp_path / "one/adapter.json").read_text())
    for wrong in ("first", ["first"], [{"name": "first"}], 3):
        head["about"]["avoid"] = wrong
        head["checksum"] = checksum(head)
        (tmp_path / "one/adapter.json").write_text(json.dumps(head))
        with pytest.raises(IntarsiaError, match="what it says of its making is damaged"):
            ia.load(model, tmp_path / "one")
