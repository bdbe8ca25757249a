"""Prompt and prefix tuning against HF PEFT with the same numbers, and against attention written out by hand."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2Model

import intarsia as ia
from intarsia.methods import Prefix, Prompt
from intarsia.model import states
from toy import toy_model

N = 5
LENGTH = 9


def some_ids(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 250, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def padded(ids: torch.Tensor, side: str) -> dict[str, torch.Tensor]:
    """Rows of 4 tokens, 6 and all of them, filled up on one side."""
    mask = torch.ones_like(ids)
    for row, length in enumerate((4, 6)):
        mask[row, : LENGTH - length] = 0
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids.where(mask == 1, torch.tensor(258)), "attention_mask": mask}


def ours(method: ia.Method) -> Any:
    model = toy_model().eval()
    ia.attach(model, method)
    return model


def trained(model: torch.nn.Module) -> dict[str, Any]:
    return dict(states(model, "default")["model"].named_parameters())


def as_peft(K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """(L, h, n, d) twice as PEFT's one row for each position: layer by layer the keys, then the values."""
    return torch.stack([K, V], 1).permute(3, 0, 1, 2, 4).flatten(1)


def pair(kind: str) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
    """(ours, PEFT's, what trains in both by name) with the same numbers."""
    more = {"num_virtual_tokens": N, "task_type": "CAUSAL_LM"}
    if kind == "prompt":
        model, config = ours(Prompt(tokens=N)), peft.PromptTuningConfig(**more)
    elif kind == "prefix":
        model, config = ours(Prefix(tokens=N, std=1.0)), peft.PrefixTuningConfig(**more)
    else:
        model = ours(Prefix(tokens=N, hidden=7))
        config = peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=7, token_dim=16, **more)
    other = peft.get_peft_model(toy_model().eval(), config).eval()
    encoder = other.prompt_encoder["default"]
    mine = trained(model)
    if kind == "prompt":
        both = {"P": (mine["P"], encoder.embedding.weight)}
    elif kind == "prefix":
        both = {}
        encoder.embedding.weight.data.copy_(as_peft(mine["K"], mine["V"]))
    else:
        # PEFT's E is as wide as all heads of keys; ours is as wide as an embedding, and the same function of as many numbers.
        encoder.transform[0] = torch.nn.Linear(32, 7)
        encoder.embedding = torch.nn.Embedding(N, 32)
        first, _, last = encoder.transform
        theirs = (encoder.embedding.weight, first.weight, first.bias, last.weight, last.bias)
        both = {name: (mine[name], one) for name, one in zip(("E", "W1", "b1", "W2", "b2"), theirs, strict=True)}
    for one, two in both.values():
        two.data.copy_(one.data)
    return model, other, both


# PEFT asks a model for what transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

KINDS = ("prompt", "prefix", "prefix by an MLP")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["none", "right"])
def test_logits_loss_and_gradients_are_those_of_peft(kind, padding):
    model, other, both = pair(kind)
    ids = some_ids()
    batch = padded(ids, padding) if padding != "none" else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    labels[:, 0] = -100  # which PEFT has predicted by the last of a prompt; ours has states for tokens alone
    found, expected = model(**batch, labels=labels), other(**batch, labels=labels)
    theirs = expected.logits[:, N:] if kind == "prompt" else expected.logits
    assert found.logits.shape == (3, LENGTH, 264)
    torch.testing.assert_close(found.logits, theirs, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-6)
    found.loss.backward()
    expected.loss.backward()
    if kind == "prefix":
        mine = trained(model)
        gradient = as_peft(mine["K"].grad, mine["V"].grad)
        torch.testing.assert_close(gradient, other.prompt_encoder["default"].embedding.weight.grad, rtol=0, atol=1e-7)
    for name, (one, two) in both.items():
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-7, msg=name)
        assert one.grad.abs().max() > 0


GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 258}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generates_what_peft_generates(kind, more):
    model, other, _ = pair(kind)
    ids = some_ids(2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = model.generate(**batch, **GENERATE, **more)
    if "use_cache" in more:  # with which PEFT leaves its prefix out after the first token
        assert torch.equal(found, model.generate(**batch, **GENERATE))
        return
    assert torch.equal(found, other.generate(**batch, **GENERATE, **more))
    base = toy_model().eval().generate(**batch, **GENERATE, **more)
    assert not torch.equal(found, base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_filled_up_on_the_left_is_that_row_alone(kind):
    model, _, _ = pair(kind)
    batch = padded(some_ids(), "left")
    together, spoken = model(**batch).logits, model.generate(**batch, **GENERATE)
    for row, length in enumerate((4, 6, LENGTH)):
        alone = {key: tensor[row : row + 1, -length:] for key, tensor in batch.items()}
        torch.testing.assert_close(together[row, -length:], model(**alone).logits[0], rtol=0, atol=2e-6)
        assert torch.equal(spoken[row, LENGTH:], model.generate(**alone, **GENERATE)[0, length:])


def test_a_prefix_of_rows_filled_up_on_the_left_generates_as_in_peft():
    model, other, _ = pair("prefix")
    batch = padded(some_ids(), "left")
    assert torch.equal(model.generate(**batch, **GENERATE), other.generate(**batch, **GENERATE))


# ------------------------------------------------------------------ by hand
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ahead: int) -> torch.Tensor:
    """One head, token by token: each looks at what stands before all, and at itself and those before it."""
    rows = []
    for t in range(len(q)):
        seen = slice(0, ahead + t + 1)
        weights = [math.exp((q[t] @ key).item() / math.sqrt(q.shape[1])) for key in k[seen]]
        total = sum(weights)
        rows.append(sum(w / total * value for w, value in zip(weights, v[seen], strict=True)))
    return torch.stack(rows)


def one_layer(model: GPT2Model, x: torch.Tensor, positions: range, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """GPT-2 of one layer by its formulas; K, V (heads, n, d) stand before. x (T, O) without its positions."""
    layer = model.h[0]
    h = x + model.wpe.weight[list(positions)]
    q, k, v = (layer.ln_1(h) @ layer.attn.c_attn.weight + layer.attn.c_attn.bias).chunk(3, dim=-1)
    heads = []
    for number in range(len(K)):
        part = slice(number * K.shape[2], (number + 1) * K.shape[2])
        heads.append(
            attention(q[:, part], torch.cat([K[number], k[:, part]]), torch.cat([V[number], v[:, part]]), K.shape[1])
        )
    h = h + torch.cat(heads, -1) @ layer.attn.c_proj.weight + layer.attn.c_proj.bias
    mlp = layer.mlp
    inner = F.gelu(layer.ln_2(h) @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh")
    y: torch.Tensor = model.ln_f(h + inner @ mlp.c_proj.weight + mlp.c_proj.bias)
    return y


@pytest.mark.parametrize("method", [Prompt(tokens=3), Prefix(tokens=3, std=1.0)], ids=["prompt", "prefix"])
def test_is_attention_written_out_by_hand(method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        net: Any = torch.nn.ModuleDict(
            {"decoder": GPT2Model(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, **off))}
        )
    net = net.double().eval()
    plain, ids = net["decoder"], torch.tensor([[1, 4, 2, 7]])
    nothing = torch.zeros(2, 0, 8).double()
    x = plain.wte.weight[ids[0]]
    torch.testing.assert_close(plain(ids).last_hidden_state[0], one_layer(plain, x, range(4), nothing, nothing))
    ia.attach(net, method)
    state: Any = states(net, "default")["decoder"]
    found = net["decoder"](ids).last_hidden_state[0]
    if method.name == "prompt":
        expected = one_layer(plain, torch.cat([state.P, x]), range(7), nothing, nothing)[3:]
    else:
        expected = one_layer(plain, x, range(3, 7), state.K[0], state.V[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------ the start, the end, the count
def test_a_prompt_starts_from_rows_of_the_vocabulary():
    model = ours(Prompt(tokens=N))
    rows, P = model.model.embed_tokens.weight, trained(model)["P"]
    assert P.shape == (N, 32)
    assert all(any(torch.equal(row, one) for one in rows) for row in P)
    assert torch.equal(trained(ours(Prompt(tokens=N)))["P"], P)
    spelled = trained(ours(Prompt(tokens=N, ids=[7, 30])))["P"]
    assert torch.equal(spelled, rows[[7, 30, 7, 30, 7]])


def test_a_scaled_embedding_is_started_from_as_it_gives_its_rows():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    ia.attach(model, Prompt(tokens=2, ids=[3, 5]))
    given = model.get_input_embeddings()(torch.tensor([3, 5]))
    torch.testing.assert_close(trained(model)["P"], given.float())


def test_the_mlp_is_thrown_away_at_the_end_and_a_new_one_adds_nothing(tmp_path):
    model = ours(Prefix(tokens=N, hidden=7))
    edit = ia.export(model).edits["model"]
    assert {k: tuple(t.shape) for k, t in edit.tensors().items()} == dict.fromkeys(("K", "V"), (2, 2, N, 8))
    ids = some_ids()
    before = model(ids).logits
    again = toy_model().eval()
    ia.load(again, ia.save(model, tmp_path / "prefix"), "default")
    assert torch.equal(again(ids).logits, before)
    mine = trained(again)
    assert set(mine) == {"E", "W1", "b1", "W2", "b2"}
    assert not mine["W2"].any()
    again(ids, labels=ids).loss.backward()
    assert mine["W2"].grad.abs().max() > 0


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Prompt(tokens=20), 20 * 576),
        (Prefix(tokens=10), 10 * 2 * 30 * 3 * 64),
        (Prefix(tokens=10, hidden=32), 10 * 576 + 32 * 577 + 2 * 30 * 3 * 64 * 33),
    ],
    ids=["prompt", "prefix", "prefix by an MLP"],
)
def test_counts_of_smollm2_by_arithmetic(method, count):
    """Width 576, 30 layers, 3 heads of keys and values of 64 numbers."""
    assert method.trained_count((576, 2 * 30 * 3 * 64)) == count
