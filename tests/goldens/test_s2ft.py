"""S2FT: counts of the released budgets, gradients against the dense ones, the permuted formulation, and its neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import intarsia as ia
from intarsia import chain, families
from intarsia import model as models
from intarsia.errors import IntarsiaError
from intarsia.forms import Part
from intarsia.method import Start
from intarsia.site import Site
from small import layer_of, small_net, some_input, some_loss, state_of, stir, trained

BLOCK: dict[str, Any] = {"scope": "block"}
EVERY: dict[str, Any] = {"o": 0.5, "v": 0.5, "q": 0.5, "k": 0.5, "down": 0.2, "up": 0.2, "gate": 0.2}
TOKENS = torch.arange(24).view(2, 12) * 13 % 300


def _loss(model, batch=TOKENS):
    return F.cross_entropy(model(input_ids=batch[:, :-1]).logits.double().flatten(0, 1), batch[:, 1:].flatten())


def _llama(layers, heads, hidden, mlp, kv):
    """A Llama of real size without its numbers, and the sites of its layers."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8,
                hidden_size=hidden,
                intermediate_size=mlp,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv,
            )
        )


def _states(model, name="default") -> dict[str, Any]:
    return dict(models.states(model, name))


def _settled(model, method):
    found = families.roles(families.blocks(model))
    sites = method.takes({n: Site(n, model.get_submodule(n).weight, None, roles) for n, roles in found.items()})
    surveys = {name: method.survey(site, Start.at(name, 0)) for name, site in sites.items()}
    return {name: (part, given["index"]) for name, (part, given) in method.settle(sites, surveys, 0).items()}


@pytest.mark.parametrize(
    ("shape", "shares", "heads", "channels"),
    [
        ((32, 32, 4096, 11008, 32), {"o": 0.052, "down": 0.02}, 53, 7045),  # LLaMA-2-7B: 56.6 M
        ((32, 32, 4096, 14336, 8), {"o": 0.0, "down": 0.03}, 0, 13762),  # LLaMA-3-8B: 56.4 M
        ((30, 9, 576, 1536, 3), {"o": 0.0, "down": 0.03}, 0, 1382),  # SmolLM2-135M: 0.80 M
    ],
    ids=["llama2-7b", "llama3-8b", "smollm2-135m"],
)
def test_budgets_as_released(shape, shares, heads, channels):
    layers, _, hidden, _, _ = shape
    found = _settled(_llama(*shape), ia.S2ft(**shares))
    widths = {part.granularity.width for name, (part, _) in found.items() if name.endswith("o_proj")}
    assert widths <= {128}
    assert sum(len(index) for name, (_, index) in found.items() if name.endswith("o_proj")) == heads
    assert sum(len(index) for name, (_, index) in found.items() if name.endswith("down_proj")) == channels
    total = sum(part.trained_count((hidden, 1)) for part, _ in found.values())
    assert total == (heads * 128 + channels) * hidden
    per_layer = [len(index) for name, (_, index) in found.items() if name.endswith("down_proj")]
    assert len(per_layer) == layers
    assert len(set(per_layer)) > 1  # drawn from the pool of all layers


@pytest.mark.parametrize("select", ["random", "weight", "gradient", "activation", "product"])
@pytest.mark.parametrize("scope", ["model", "block"])
def test_gradients_are_those_of_the_dense_weights(tiny_llama, select, scope):
    """Every part under grouped queries, in float64: the slices of the dense gradient."""
    model, dense = tiny_llama(torch.float64), tiny_llama(torch.float64)
    ia.attach(model, ia.S2ft(**EVERY, select=select, scope=scope), data=[TOKENS], loss=_loss)
    stir(model, size=0.01)
    with torch.no_grad():
        for name, layer in chain.adapted_layers(model).items():
            layer_of(dense, name).weight.copy_(layer.weight)
    assert _loss(model).item() == _loss(dense).item()
    _loss(model).backward()
    _loss(dense).backward()
    seen = set()
    for name, state in _states(model, "default").items():
        part = state.method
        seen.add(name.rpartition(".")[2])
        expected = part.granularity.gather(layer_of(dense, name).weight.grad, state.index) * part.scale
        torch.testing.assert_close(state.values.grad, expected, rtol=1e-12, atol=1e-15)
    assert len(seen) == 7


def test_parts_of_a_block_train_the_same_units(tiny_llama):
    """Equal shares: one set of channels for down, up and gate; whole groups of heads for o, q, k and v (4 heads over 2)."""
    for select in ("random", "weight", "gradient"):
        for scope in ("block", "model"):
            model = tiny_llama(layers=3)
            ia.attach(model, ia.S2ft(**EVERY, select=select, scope=scope), data=[TOKENS], loss=_loss)
            index = {name.removeprefix("model.layers."): s.index for name, s in _states(model, "default").items()}
            for layer in "012":
                mlp = [
                    index[f"{layer}.mlp.{part}_proj"]
                    for part in ("down", "up", "gate")
                    if f"{layer}.mlp.{part}_proj" in index
                ]
                assert mlp
                assert all(torch.equal(mlp[0], other) for other in mlp)
                heads = {part: index.get(f"{layer}.self_attn.{part}_proj", torch.empty(0)).tolist() for part in "oqkv"}
                assert heads["o"] == heads["q"]
                assert heads["k"] == heads["v"]
                assert heads["o"] == [head for group in heads["v"] for head in (2 * group, 2 * group + 1)]
                assert scope == "model" or len(heads["v"]) == 1


def test_groups_by_the_scores_of_their_parts(tiny_llama):
    """Query heads that share a key-value head are chosen together, by what o and v say of them (4 heads over 2)."""
    model, dense = tiny_llama(layers=8), tiny_llama(layers=8)
    ia.attach(model, ia.S2ft(o=0.5, v=0.5, down=0.1, select="weight", **BLOCK))
    best = []
    for number, block in enumerate(dense.model.layers):
        heads = block.self_attn.o_proj.weight.norm(dim=0).view(4, 16).mean(1)
        values = block.self_attn.v_proj.weight.norm(dim=1).view(2, 16).mean(1)
        best.append(int((heads.view(2, 2).sum(1) + values).argmax()))
        found = state_of(model, f"model.layers.{number}.self_attn.v_proj").index.tolist()
        assert found == [best[-1]]
    assert set(best) == {0, 1}


def test_one_scale_for_one_shape(tiny_llama):
    """However unevenly a model's channels fall to its layers, each trained number takes the steps of the others."""
    model = tiny_llama(layers=6)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.2)
    ia.attach(model, ia.S2ft(o=0.0, down=0.2, select="weight"))
    states = _states(model)
    assert len({len(state.index) for state in states.values()}) > 1
    assert len({state.method.scale for state in states.values()}) == 1


def test_smaller_shares_are_nested():
    net = small_net()
    ia.attach(net, ia.S2ft(o=0.0, down=0.5, up=0.25, layout="up > down", **BLOCK))
    down, up = (set(state_of(net, site).index.tolist()) for site in ("down", "up"))
    assert (len(down), len(up)) == (12, 6)
    assert up < down


def test_trains_as_the_permuted_formulation(tiny_llama):
    """The official way: permute the chosen heads and channels to the front, train that one block. Same trajectory."""
    method = ia.S2ft(o=0.5, v=0.5, down=0.2, up=0.2, scale=1.0, **BLOCK)
    ours, front = tiny_llama(torch.float64), tiny_llama(torch.float64)
    ia.attach(ours, method)
    chosen = {name: state.index for name, state in _states(ours, "default").items()}
    blocks, orders = families.blocks(front), {}
    for block in blocks:
        first = chosen[block.name].tolist()
        orders[block.name] = first + [unit for unit in range(block.units) if unit not in first]
        families.permute(front, block, orders[block.name])
    torch.testing.assert_close(_loss(front), _loss(tiny_llama(torch.float64)), rtol=0, atol=1e-12)
    slices, kept = [], {}
    for name, index in chosen.items():
        part, W = state_of(ours, name).method, layer_of(front, name).weight
        size = len(index) * part.granularity.width
        slices.append((W, (slice(None), slice(size)) if part.granularity.name == "column" else (slice(size),)))
        kept[name] = W
    parameters = [W.detach()[at].clone().requires_grad_() for W, at in slices]
    adam, optimizer = (torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0) for p in (trained(ours), parameters))
    for step in range(5):
        batch = (TOKENS + 5 * step) % 300
        adam.zero_grad()
        _loss(ours, batch).backward()
        adam.step()
        front.zero_grad()
        _loss(front, batch).backward()
        with torch.no_grad():
            for parameter, (W, at) in zip(parameters, slices, strict=True):
                assert W.grad is not None
                parameter.grad = W.grad[at].clone()
            optimizer.step()
            for parameter, (W, at) in zip(parameters, slices, strict=True):
                W[at] = parameter
    torch.testing.assert_close(_loss(ours), _loss(front), rtol=0, atol=1e-10)
    # Back in the order of the base, the two models are one: an adapter of the permuted layout is an adapter of the base.
    for block in blocks:
        families.permute(front, block, torch.tensor(orders[block.name]).argsort())
    for name, W in kept.items():
        torch.testing.assert_close(layer_of(ours, name).weight, W, rtol=0, atol=1e-10)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_trains_as_masked_full_fine_tuning(optimizer):
    method = ia.S2ft(o=0.0, down=0.3, up=0.3, scale=1.0, layout="up > down; again", **BLOCK)
    ours, dense = small_net(torch.float64), small_net(torch.float64)
    start = {n: p.detach().clone() for n, p in dense.named_parameters()}
    ia.attach(ours, method)
    masks = {}
    for name, state in _states(ours, "default").items():
        W = layer_of(dense, name).weight
        masks[name] = state.granularity().scatter(tuple(W.shape), state.index, torch.ones_like(state.values)).bool()
    weights = {name: layer_of(dense, name).weight for name in masks}
    mine, theirs = optimizer(trained(ours), lr=0.01), optimizer(weights.values(), lr=0.01)
    for group in (*mine.param_groups, *theirs.param_groups):
        group["weight_decay"] = 0.0
    for seed in range(20):
        x = some_input(torch.float64, seed=seed)
        for model, steps in ((ours, mine), (dense, theirs)):
            steps.zero_grad()
            some_loss(model, x).backward()
            for name, W in weights.items() if model is dense else ():
                W.grad[~masks[name]] = 0.0
            steps.step()
    for name, mask in masks.items():
        found = layer_of(ours, name).weight
        torch.testing.assert_close(found, weights[name], rtol=0, atol=1e-12)
        assert torch.equal(found[~mask], start[f"{name}.weight"][~mask])
        assert bool((found != start[f"{name}.weight"])[mask].all())
        change = (found - start[f"{name}.weight"]).detach()
        assert int(torch.linalg.matrix_rank(change, rtol=1e-10)) <= len(state_of(ours, name).index)
    if optimizer is torch.optim.AdamW:
        entries = [t.numel() for state in mine.state.values() for key, t in state.items() if key != "step"]
        assert sum(entries) == 2 * sum(p.numel() for p in trained(ours))


def test_single_columns_are_paca():
    """One seed, columns alone, shares of each block: the same columns as PaCA's, and the same steps."""
    ours, paca = small_net(torch.float64), small_net(torch.float64)
    ia.attach(ours, ia.S2ft(o=0.0, down=0.25, layout="again", **BLOCK), targets="again")
    ia.attach(paca, ia.Paca(rank=4), targets="again")
    assert torch.equal(state_of(ours, "again").index, state_of(paca, "again").index)
    for model in (ours, paca):
        optimizer = torch.optim.AdamW(trained(model), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            some_loss(model, some_input(torch.float64)).backward()
            optimizer.step()
    assert torch.equal(layer_of(ours, "again").weight, layer_of(paca, "again").weight)


def test_heads_are_lora_with_a_one_hot_A(tiny_llama):
    """Columns: B is the change and A picks the columns; the same steps as LoRA with that A frozen."""
    ours, lora = tiny_llama(torch.float64), tiny_llama(torch.float64)
    ia.attach(ours, ia.S2ft(o=0.5, down=0.25, scale=2.0, **BLOCK))
    ia.attach(lora, ia.Lora(rank=32, alpha=64.0), targets=["o_proj", "down_proj"])
    with torch.no_grad():
        for name, state in _states(lora).items():
            mine = state_of(ours, name)
            columns = mine.granularity().spread(mine.index)
            assert len(columns) == 32
            state.A.zero_()[torch.arange(32), columns] = 1.0
            state.A.requires_grad_(False)
    for model in (ours, lora):
        optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            _loss(model).backward()
            optimizer.step()
    for name, state in _states(ours).items():
        torch.testing.assert_close(state.values, state_of(lora, name).B, rtol=0, atol=1e-12)
    assert _loss(ours).item() == pytest.approx(_loss(lora).item(), abs=1e-12)


def test_selections(tiny_llama):
    """Every score from its definition, a head's the mean over its channels."""
    dense = tiny_llama(torch.float64)
    seen: dict[Any, Any] = {}
    for name in ("o_proj", "down_proj"):
        for layer, block in enumerate(dense.model.layers):
            module = block.self_attn.o_proj if name == "o_proj" else block.mlp.down_proj
            module.register_forward_pre_hook(lambda m, x, at=(layer, name): seen.__setitem__(at, x[0].detach()))
    _loss(dense).backward()
    for select in ("weight", "gradient", "activation", "product"):
        for take in ("large", "small"):
            model = tiny_llama(torch.float64)
            ia.attach(model, ia.S2ft(o=0.5, down=0.2, select=select, take=take, **BLOCK), data=[TOKENS], loss=_loss)
            for layer, name, width in ((0, "self_attn.o_proj", 16), (1, "mlp.down_proj", 1)):
                W = layer_of(dense, f"model.layers.{layer}.{name}").weight
                activation = seen[layer, name.partition(".")[2]].abs().mean((0, 1))
                score = {
                    "weight": W.norm(dim=0), "gradient": W.grad.norm(dim=0), "activation": activation,
                    "product": W.norm(dim=0) * activation,
                }[select]  # fmt: skip
                score = score.view(-1, width).mean(1)
                best = score.topk(int(len(score) * (0.5 if width > 1 else 0.2)), largest=take == "large").indices
                found = state_of(model, f"model.layers.{layer}.{name}").index.tolist()
                assert found == sorted(best.tolist()), (select, take, name)


def test_saved_and_loaded_without_the_family(tiny_llama, tmp_path):
    """The file says what the units are: whoever loads it needs no names of blocks, and the base keeps its order."""
    model = tiny_llama()
    ia.attach(model, ia.S2ft(**EVERY))
    stir(model)
    ia.save(model, tmp_path / "skill")
    other = tiny_llama()
    ia.load(other, tmp_path / "skill")
    assert torch.equal(other(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    assert all(isinstance(state.method, Part) for state in _states(other, "skill").values())
    kept = {name: state.index for name, state in _states(other, "skill").items()}
    assert all(torch.equal(kept[name], state.index) for name, state in _states(model, "default").items())
    deck = ia.Deck(tiny_llama())
    deck.add(tmp_path / "skill")
    deck.use("skill")


def test_every_request_its_own(tiny_llama):
    """Rows of one batch with different heads and channels, each as alone."""
    model = tiny_llama(torch.float64)
    for seed, name in enumerate(("a", "b")):
        ia.attach(model, ia.S2ft(o=0.5, down=0.1), name=name, seed=seed)
        stir(model, name, seed=seed)
    with ia.rows(model, ["a", None, "b"]):
        together = model(input_ids=TOKENS[[0, 1, 0]]).logits
    for row, (active, tokens) in enumerate(((["a"], 0), ([], 1), (["b"], 0))):
        ia.activate(model, *active)
        torch.testing.assert_close(together[row], model(input_ids=TOKENS[[tokens]]).logits[0], rtol=0, atol=1e-10)


def test_takes_its_parts_of_all_linears(tiny_llama):
    model = tiny_llama()
    assert {name.rpartition(".")[2] for name in models.plan(model, ia.S2ft(o=0.5))} == {"o_proj", "down_proj"}
    ia.attach(model, ia.S2ft(o=0.5))
    assert {name.rpartition(".")[2] for name in _states(model, "default")} == {"o_proj", "down_proj"}


def test_inside_of_dora_it_is_chosen_as_it_is_alone(tiny_llama):
    alone, inside = tiny_llama(), tiny_llama()
    ia.attach(alone, ia.S2ft(o=0.5, down=0.2))
    ia.attach(inside, ia.Dora(ia.S2ft(o=0.5, down=0.2)))
    found = _states(inside, "default")
    assert found.keys() == _states(alone, "default").keys()
    assert all(torch.equal(state.index, found[name].index) for name, state in _states(alone, "default").items())


@pytest.mark.parametrize(
    ("method", "targets", "says"),
    [
        (
            ia.S2ft(),
            "q_proj",
            "s2ft trains down, o of attention and MLP blocks, and none of the 2 targeted .*those are q",
        ),
        (ia.S2ft(o=0.1), "all-linear", "none of the 8 heads of 2 blocks would be trained in o"),
        (ia.S2ft(layout="fc1 > fc2"), "all-linear", "Looked for, under every module: fc1 > fc2"),
        (ia.S2ft(o=0.5, select="gradient"), "all-linear", "needs calibration data"),
    ],
    ids=str,
)
def test_what_is_refused(tiny_llama, method, targets, says):
    model = tiny_llama()
    with pytest.raises(IntarsiaError, match=says):
        ia.attach(model, method, targets=targets)
    assert not ia.attached_names(model)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"o": 0.0, "down": 0.0}, "nothing would be trained"),
        ({"down": 1.5}, "in .0, 1."),
        ({"select": "fisher"}, "one of random, weight"),
        ({"take": "all"}, "large or small"),
        ({"o": 0.0, "v": 0.1, "select": "activation"}, "o .or down. needs a share"),
        ({"scope": "layer"}, "model or block"),
    ],
)
def test_fields_out_of_range(fields, says):
    with pytest.raises(IntarsiaError, match=says):
        ia.S2ft(**fields)
