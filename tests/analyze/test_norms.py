"""The norms of queries, keys and changes, against a layer made by hand and a second computation of the whole model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import intarsia as ia
from intarsia.analyze import norm_report
from intarsia.edits import Dense, LowRank, Rescaled, Sparse, elements, row_norms
from intarsia.errors import IntarsiaError
from intarsia.model import base_of
from intarsia.store import Adapter

KEYS, QUERIES = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight"


class ByHand(nn.Module):
    """One linear layer that is given vectors by token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.proj = nn.Linear(2, 2)
        with torch.no_grad():
            self.embed.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]))
            self.proj.weight.copy_(torch.tensor([[1.0, -1.0], [0.5, 3.0]]))
            self.proj.bias.fill_(100.0)

    def forward(self, input_ids, attention_mask=None):
        return self.proj(self.embed(input_ids))


def adapter(model: nn.Module, **edits) -> Adapter:
    base, about = base_of(model, list(edits))
    return Adapter("one", edits, base, {"name": "shira"}, about)


def test_a_layer_by_hand():
    model = ByHand()
    # Rows of x W^T: (1, 0.5), (-2, 6): 6 is the largest; of x dW^T with dW = 2 e1 e1^T: 2. Token 2 is padding.
    change = LowRank((2, 2), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]), 2.0)
    batch = {"input_ids": torch.tensor([[0, 1, 2], [1, 2, 2]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    made = adapter(model, **{"proj.weight": change})
    report = norm_report(model, batch, made)
    (row,) = report.rows
    assert (row.weight, row.part, row.head) == ("proj.weight", "", None)
    assert (row.base, row.change, row.together) == (6.0, 2.0, 6.0)
    assert report.length == 2, "of the longest row, without padding"
    assert report.threshold == pytest.approx(math.sqrt(math.log(2)))
    assert row.ratio == pytest.approx(6 / math.sqrt(math.log(2)))
    assert row.above
    assert report.above == 1
    assert report.scores == ()
    tripled = dataclasses.replace(made, edits={"proj.weight": dataclasses.replace(change, scale=-6.0)})
    assert norm_report(model, batch, tripled).rows[0].change == 6.0
    nothing = dataclasses.replace(made, edits={"proj.weight": dataclasses.replace(change, scale=0.0)})
    assert norm_report(model, batch, nothing).rows[0].change == 0.0
    assert norm_report(model, batch).rows == (), "of the base alone nothing is edited, and no attention is known"


def llama(tiny_llama, **settings):
    model = tiny_llama(**settings)
    ids = torch.randint(1, 320, (2, 11))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def every_kind(model: nn.Module) -> Adapter:
    """A low-rank change of queries of the first layer, another kind of change of every other query and key."""
    weights = dict(model.named_parameters())

    def some(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape)

    inner = LowRank((64, 64), some(64, 3), some(3, 64), 1.0)
    W = weights["model.layers.1.self_attn.q_proj.weight"].detach()
    edits = {
        QUERIES: LowRank((64, 64), some(64, 2), some(2, 64), 1.5),
        "model.layers.0.self_attn.k_proj.weight": elements((32, 64), torch.arange(0, 2048, 7), some(293)),
        "model.layers.1.self_attn.q_proj.weight": Rescaled((64, 64), inner, row_norms(inner.fold(W)) * 1.1),
        KEYS: Dense((32, 64), some(32, 64)),
        "model.layers.1.mlp.up_proj.weight": elements((128, 64), torch.arange(50), some(50)),
    }
    return adapter(model, **edits)


def test_it_is_what_the_merged_model_computes(tiny_llama):
    model, batch = llama(tiny_llama)
    made = every_kind(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    report = norm_report(model, batch, made)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in made.edits:
                weight.copy_(made.edits[name].fold(weight))
    merged = {(row.weight, row.head): row for row in norm_report(model, batch).rows}
    for row in report.rows:
        if row.part:
            assert row.together == pytest.approx(merged[row.weight, row.head].base, rel=1e-4)
            assert row.ratio == pytest.approx(max(row.base, row.change) / math.sqrt(math.log(11)))
    heads = [(row.part, row.head) for row in report.rows if ".0." in row.weight]
    assert heads == [*(("q", h) for h in range(4)), *(("k", h) for h in range(2))]
    assert [row.weight for row in report.rows if not row.part] == ["model.layers.1.mlp.up_proj.weight"]


def test_no_score_is_above_its_bound(tiny_llama):
    model, batch = llama(tiny_llama)
    made = every_kind(model)
    report = norm_report(model, batch, made)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in made.edits:
                weight.copy_(made.edits[name].fold(weight))
    for name in ("q_proj", "k_proj"):
        layer = model.model.layers[0].self_attn.get_submodule(name)
        layer.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        model(**batch)
    q = seen["q_proj"].view(2, 11, 4, 16).transpose(1, 2)
    k = seen["k_proj"].view(2, 11, 2, 16).transpose(1, 2).repeat_interleave(2, dim=1)
    scores = (q @ k.mT).abs().amax((0, 2, 3))
    bounds = [one.bound for one in report.scores if ".0." in one.block]
    assert len(bounds) == 4
    for score, bound, head in zip(scores.tolist(), bounds, range(4), strict=True):
        assert score <= bound
        largest = float(q[:, head].abs().max()), float(k[:, head].abs().max())
        assert bound == pytest.approx(16 * largest[0] * largest[1], rel=1e-4)


def test_thin_factors_are_never_multiplied_out(tiny_llama, monkeypatch):
    model, batch = llama(tiny_llama)
    made = adapter(model, **{QUERIES: LowRank((64, 64), torch.randn(64, 2), torch.randn(2, 64), 1.0)})
    monkeypatch.setattr(LowRank, "delta", lambda self, W: pytest.fail("built an O x I matrix"))
    assert norm_report(model, batch, made).rows[0].change > 0


def test_weights_that_are_stored_transposed_and_fused():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    change = elements((48, 16), torch.arange(0, 768, 5), torch.randn(154))
    ids = torch.randint(0, 50, (1, 6))
    name = "transformer.h.0.attn.c_attn.weight"
    report = norm_report(model, {"input_ids": ids}, adapter(model, **{name: change}))
    assert [(row.part, row.head) for row in report.rows] == [("q", 0), ("q", 1), ("k", 0), ("k", 1)]
    with torch.no_grad():
        x = model.transformer.h[0].ln_1(model.transformer.wte(ids) + model.transformer.wpe(torch.arange(6)))
    delta = x @ change.delta(torch.zeros(48, 16)).mT
    for row, place in zip(report.rows, (0, 8, 16, 24), strict=True):
        assert row.change == pytest.approx(float(delta[..., place : place + 8].abs().max()), rel=1e-4)
    assert len(report.scores) == 2


def test_a_report_in_plain_values_and_the_mode_stays(tiny_llama):
    model, batch = llama(tiny_llama)
    model.train()
    plain = norm_report(model, batch, every_kind(model)).to_dict()
    assert model.training
    assert plain["rows"][0]["weight"] == QUERIES
    assert not any(layer._forward_hooks for layer in model.modules()), "hooks are taken off again"


def test_mistakes(tiny_llama):
    model, batch = llama(tiny_llama)
    with pytest.raises(IntarsiaError, match="longest row has 1 tokens"):
        norm_report(model, {"input_ids": torch.ones(3, 1, dtype=torch.int64)})
    with pytest.raises(IntarsiaError, match=r"input_ids are \(4,\); expected \(rows, tokens\)"):
        norm_report(model, {"input_ids": torch.ones(4, dtype=torch.int64)})
    embedding = elements((64, 320), torch.tensor([3]), torch.tensor([0.1]))
    with pytest.raises(IntarsiaError, match=r"linear layers of their own; one edits model.embed_tokens"):
        norm_report(model, batch, adapter(model, **{"model.embed_tokens.weight": embedding}))
    other = dataclasses.replace(every_kind(model), base=dataclasses.replace(base_of(model, [KEYS])[0], digest="0" * 64))
    with pytest.raises(IntarsiaError, match="belongs to another base"):
        norm_report(model, batch, other)
    ia.attach(model, ia.Lora(rank=2), name="on")
    with pytest.raises(IntarsiaError, match="on is active on this model"):
        norm_report(model, batch)
    assert isinstance(embedding, Sparse)
