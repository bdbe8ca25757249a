"""Families: the blocks of real architectures, what is refused, and permutations that leave the function as it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import intarsia as ia
from intarsia import families
from intarsia import model as models
from intarsia.errors import IntarsiaError
from small import small_net

TOKENS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GROUPED = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6} | {
    "num_key_value_heads": 2
}


def _make(kind, **given):
    config = getattr(transformers, f"{kind}Config")(**(TOKENS | given))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, {"Bert": "BertModel", "GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))(
            config
        )
        for (
            parameter
        ) in model.parameters():  # biases are zero at the start, and a bias that is not moved would not show
            nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    return model.double().eval()


MODELS = {
    "llama": lambda: _make("Llama", **GROUPED, attention_bias=True, mlp_bias=True),
    "wide heads": lambda: _make("Llama", **GROUPED, head_dim=12),
    "phi3": lambda: _make("Phi3", **GROUPED),
    "gpt2": lambda: _make("GPT2", n_embd=48, n_layer=2, n_head=6),
    "opt": lambda: _make(
        "OPT", hidden_size=48, num_hidden_layers=2, num_attention_heads=6, ffn_dim=40, word_embed_proj_dim=48
    ),
    "bert": lambda: _make("Bert", hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=40),
}


def _run(model):
    tokens = torch.arange(24).view(2, 12) * 7 % 50
    out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def _output(model):
    with torch.no_grad():
        return _run(model)


def _another_order(block):
    """Groups in reverse, and the units of each moved on by one."""
    group = max(role.group for _, role in block.parts)
    return torch.arange(block.units).view(-1, group).flip(0).roll(1, dims=1).reshape(-1)


@pytest.mark.parametrize("name", MODELS)
def test_permuting_a_block_leaves_the_function(name):
    model = MODELS[name]()
    before, found = _output(model), families.blocks(model)
    assert [block.kind for block in found] == ["attention", "mlp"] * 2
    for block in found:
        weights = {part: model.get_submodule(part).weight.clone() for part, _ in block.parts}
        families.permute(model, block, _another_order(block))
        assert all(not torch.equal(model.get_submodule(part).weight, W) for part, W in weights.items())
    torch.testing.assert_close(_output(model), before, rtol=0, atol=1e-10)


def test_heads_do_not_leave_their_group():
    model = MODELS["llama"]()
    block = families.blocks(model)[0]
    before = _output(model)
    with pytest.raises(IntarsiaError, match="key-value head, which 3 of them share"):
        families.permute(model, block, [3, 1, 2, 0, 4, 5])
    with pytest.raises(IntarsiaError, match="each of its 6 units once"):
        families.permute(model, block, [0, 1, 2, 3, 4, 4])
    assert torch.equal(_output(model), before)
    # What is refused would change the function: heads 0 and 3 swapped in q and o alone.
    q, o = model.get_submodule("model.layers.0.self_attn.q_proj"), model.get_submodule(block.name)
    heads = torch.tensor([3, 1, 2, 0, 4, 5])
    entries = torch.arange(48).view(6, 8)[heads].reshape(-1)
    with torch.no_grad():
        q.weight.copy_(q.weight[entries])
        q.bias.copy_(q.bias[entries])
        o.weight.copy_(o.weight[:, entries])
    assert (_output(model) - before).abs().max() > 1e-3


def test_roles_of_grouped_queries():
    roles = families.roles(families.blocks(MODELS["llama"]()))
    found = {
        name.rpartition(".")[2]: (role.part, role.side, role.width, role.units, role.group)
        for name, (role,) in roles.items()
        if ".0." in name
    }
    assert found == {
        "q_proj": ("q", "rows", 8, 6, 1), "k_proj": ("k", "rows", 8, 2, 3), "v_proj": ("v", "rows", 8, 2, 3),
        "o_proj": ("o", "columns", 8, 6, 1), "gate_proj": ("gate", "rows", 1, 40, 1),
        "up_proj": ("up", "rows", 1, 40, 1), "down_proj": ("down", "columns", 1, 40, 1),
    }  # fmt: skip


def test_roles_in_fused_weights():
    roles = families.roles(families.blocks(MODELS["phi3"]()))
    fused = {r.part: (r.first, r.units, r.group) for r in roles["model.layers.1.self_attn.qkv_proj"]}
    assert fused == {"q": (0, 6, 1), "k": (6, 2, 3), "v": (8, 2, 3)}
    assert [r.first for r in roles["model.layers.1.mlp.gate_up_proj"]] == [0, 40]
    gpt2 = families.roles(families.blocks(MODELS["gpt2"]()))["transformer.h.0.attn.c_attn"]
    assert {r.part: r.first for r in gpt2} == {"q": 0, "k": 6, "v": 12}


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_channels_train_in_every_family(name):
    """Gradients are those of the dense weights, whichever way round and however fused these are kept."""
    every = {"o": 0.5, "v": 0.5, "q": 0.5, "k": 0.5, "down": 0.2, "up": 0.2}
    model, dense = MODELS[name](), MODELS[name]()
    ia.attach(model, ia.S2ft(**every, scope="block", scale=2.0))  # type: ignore[arg-type]
    assert torch.equal(_run(model), _run(dense))
    for each in (model, dense):
        _run(each).sin().sum().backward()
    states = models.states(model, "default")
    roles = families.roles(families.blocks(dense))
    assert states.keys() == {n for n, held in roles.items() if {r.part for r in held} - {"gate"}}
    for site, state in states.items():
        layer: Any = dense.get_submodule(site)
        G = layer.weight.grad.T if families.turned(layer) else layer.weight.grad
        values: Any = state.values
        torch.testing.assert_close(
            values.grad, 2 * state.granularity().gather(G.contiguous(), state.tensors()["index"]), rtol=1e-9, atol=1e-11
        )
        taken = {r.part: {int(u) - r.first for u in state.tensors()["index"]} for r in roles[site]}
        for role in roles[site]:
            own = {u for u in taken[role.part] if 0 <= u < role.units}
            assert len(own) == (0 if role.part == "gate" else int(every[role.part] * role.units)), (site, role.part)


def test_neox_knows_its_output_side():
    model = _make("GPTNeoX", hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=40)
    parts = [[role.part for _, role in block.parts] for block in families.blocks(model)]
    assert parts == [["o"], ["up", "down"]]


def test_by_hand():
    net = small_net()
    (pair, alone) = families.blocks(net, "up > down; again")
    assert [(name, role.part, role.units) for name, role in pair.parts] == [("up", "up", 24), ("down", "down", 24)]
    assert [(name, role.part, role.units) for name, role in alone.parts] == [("again", "down", 16)]
    (heads,) = families.blocks(net, "up > down / 8")
    assert [(role.part, role.width, role.units) for _, role in heads.parts] == [("v", 8, 3), ("o", 8, 3)]


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("family", ["Sequential", "self_attn.q_proj", "mlp.down_proj", "layout='fc1 > fc2"]),
        ("up > dwon", ["Looked for", "up > dwon"]),
        ("up > again", ["up: its 24 rows are not the channels", "16 of width 1"]),
        ("up > down / 7", ["down: 24 inputs cannot be heads of 7"]),
        ("up >", ["'up >' cannot be read"]),
        ("a, b, c > down", ["cannot be read"]),
        ("", ["cannot be read"]),
    ],
)
def test_what_is_refused(layout, says):
    with pytest.raises(IntarsiaError, match=".*".join(map(re.escape, says))):
        families.blocks(small_net(), layout)


def test_a_head_of_unknown_width_is_refused():
    layer = nn.Module()
    layer.self_attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    with pytest.raises(IntarsiaError, match="how wide a head is"):
        families.blocks(nn.Sequential(layer))
