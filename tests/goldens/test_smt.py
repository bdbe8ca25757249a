"""SMT: tiles by their gradient against a definition in loops, the gradient of a tile, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import intarsia as ia
from intarsia import chain
from intarsia import model as models
from intarsia.errors import IntarsiaError
from intarsia.methods import Smt
from small import layer_of, stir

TOKENS = torch.arange(24).view(2, 12) * 13 % 300


def _loss(model, batch=TOKENS):
    return F.cross_entropy(model(input_ids=batch[:, :-1]).logits.double().flatten(0, 1), batch[:, 1:].flatten())


def _scores(G, width, score):
    """Tile by tile, in loops."""
    found = {}
    for i in range(G.shape[0] // width):
        for j in range(G.shape[1] // width):
            tile = G[i * width : (i + 1) * width, j * width : (j + 1) * width]
            found[i, j] = {"mean_abs": tile.mean().abs(), "abs_mean": tile.abs().mean(), "norm": tile.norm()}[
                score
            ].item()
    return found


@pytest.mark.parametrize("score", ["mean_abs", "abs_mean", "norm"])
@pytest.mark.parametrize("of", ["q, k, v", "gate, up, down", "all"])
def test_the_best_tiles_of_the_model(tiny_llama, score, of):
    batches = [TOKENS, TOKENS + 1]
    model, dense = tiny_llama(torch.float64), tiny_llama(torch.float64)
    ia.attach(model, Smt(density=0.1, of=of, width=16, score=score), data=batches, loss=_loss)
    for batch in batches:
        _loss(dense, batch).backward()
    parts = [f"{part}_proj" for part in ("q, k, v, o, gate, up, down" if of == "all" else of).split(", ")]
    tiles = {
        (name, *at): value
        for name, layer in dense.named_modules()
        if name.rpartition(".")[2] in parts
        for at, value in _scores(layer_of(dense, name).weight.grad, 16, score).items()
    }
    expected = set(sorted(tiles, key=lambda tile: -tiles[tile])[: round(0.1 * len(tiles))])
    across = {name: layer.weight.shape[1] // 16 for name, layer in chain.adapted_layers(model).items()}
    states = models.states(model, "default")
    found = {
        (n, int(t) // across[n], int(t) % across[n]) for n, state in states.items() for t in state.tensors()["index"]
    }
    assert found == expected


def test_the_gradient_is_that_of_the_tiles(tiny_llama):
    model, dense = tiny_llama(torch.float64), tiny_llama(torch.float64)
    ia.attach(model, Smt(density=0.2, width=16), data=[TOKENS], loss=_loss)
    stir(model, size=0.01)
    before = {n: p.detach().clone() for n, p in tiny_llama(torch.float64).named_parameters()}
    layers = chain.adapted_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            layer_of(dense, name).weight.copy_(layer.weight)
    for each in (model, dense):
        _loss(each).backward()
    for name, layer in layers.items():
        state = layer.adapters["default"]
        expected = state.granularity().gather(layer_of(dense, name).weight.grad, state.index) * state.method.scale
        torch.testing.assert_close(state.values.grad, expected, rtol=1e-12, atol=1e-15)
        changed = (layer.weight != before[f"{name}.weight"]).view(layer.weight.shape[0] // 16, 16, -1, 16)
        assert int(changed.any(3).any(1).sum()) == len(state.index)  # whole tiles and nothing else


def test_within_each_weight(tiny_llama):
    model = tiny_llama()
    ia.attach(model, Smt(density=0.25, width=16, scope="weight"), data=[TOKENS], loss=_loss)
    counts = {name.rpartition(".")[2]: len(s.tensors()["index"]) for name, s in models.states(model, "default").items()}
    assert counts == {"q_proj": 4, "k_proj": 2, "v_proj": 2}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {},
            "of the 0 tiles of width 256 in weights such as 64 x 64 none would be trained; raise the density or lower",
        ),
        ({"of": "all", "width": 200}, "of the 0 tiles of width 200"),
        ({"of": "q"}, None),
        ({"of": "x"}, "some of q, k"),
        ({"score": "sum"}, "one of mean_abs"),
        ({"width": 0}, "width=0 must be 1 or more"),
    ],
)
def test_what_is_refused(tiny_llama, fields, says):
    model = tiny_llama()
    if says is None:
        ia.attach(model, Smt(width=16, density=0.1, **fields), data=[TOKENS], loss=_loss)
        assert {name.rpartition(".")[2] for name in models.states(model, "default")} == {"q_proj"}
        return
    with pytest.raises(IntarsiaError, match=says):
        ia.attach(model, Smt(**fields), data=[TOKENS], loss=_loss)
    assert not ia.attached_names(model)
