"""Decoders as sites: what stands before the tokens, by itself, with others, in a deck, row by row, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import intarsia as ia
from intarsia.edits import Insert, Prefix, Prompt, Sum, add, scale
from intarsia.methods import Prefix as PrefixTuning
from intarsia.methods import Prompt as PromptTuning
from intarsia.model import states
from intarsia.site import find_sites
from small import small_net, stir
from toy import toy_model

T = 6
PROMPT, PREFIX, LORA = PromptTuning(tokens=3), PrefixTuning(tokens=4, std=1.0), ia.Lora(rank=2)


def ids(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 250, (rows, T), generator=torch.Generator().manual_seed(seed))


def adapted(*methods: ia.Method, dtype: torch.dtype = torch.float64) -> Any:
    """A toy model with an adapter of each method, named a, b, ..., all of them active."""
    model = toy_model(dtype=dtype).eval()
    for seed, method in enumerate(methods):
        ia.attach(model, method, name="abcdef"[seed], seed=seed)
        stir(model, "abcdef"[seed], seed)
    ia.activate(model, *"abcdef"[: len(methods)])
    return model


def numbers(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {key: tensor.detach() for key, tensor in states(model, name)["model"].tensors().items()}


# ------------------------------------------------------------------ where it sits
def test_the_default_target_is_what_the_method_sits_at():
    model = toy_model()
    ia.attach(model, PROMPT, name="a")
    ia.attach(model, LORA, name="b")
    assert list(states(model, "a")) == ["model"]
    assert len(states(model, "b")) == 14
    for targets in ("decoder", "model", ["model"]):
        other = toy_model()
        ia.attach(other, PREFIX, targets)
        assert list(states(other, "default")) == ["model"]


def test_no_pattern_but_its_own_names_a_decoder():
    model = toy_model()
    assert "model" not in find_sites(model, "*")
    assert list(find_sites(model, "decoder")) == ["model"]
    assert list(find_sites(model, "model")) == ["model"]
    assert "model" not in find_sites(model, "re:.*")


@pytest.mark.parametrize(
    ("make", "method", "targets", "said"),
    [
        (toy_model, LORA, "model", r"model is of the kind decoder, where lora cannot sit.*prefix, prompt"),
        (toy_model, PROMPT, "*.q_proj", r"q_proj is of the kind linear, where prompt cannot sit"),
        (small_net, PROMPT, "all-linear", r"the model has no module that could be given inputs_embeds"),
        (lambda: toy_model().model, PROMPT, "decoder", r"the model is a single LlamaModel; put it into a module"),
        (toy_model, PromptTuning(ids=[264]), "decoder", r"model: there is no token 264 among its 264"),
    ],
)
def test_elsewhere_it_is_refused(make, method, targets, said):
    model = make()
    with pytest.raises(ia.IntarsiaError, match=said):
        ia.attach(model, method, targets)
    assert not hasattr(model, "_intarsia")


def test_an_encoder_with_a_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ia.IntarsiaError, match="encoder: what stands before the tokens of an encoder with a decoder"):
        ia.attach(model, PROMPT)


def test_plan_counts_it():
    from intarsia.model import plan

    assert plan(toy_model(), PROMPT) == {"model": 3 * 32}
    assert plan(toy_model(), PREFIX) == {"model": 4 * 2 * 2 * 2 * 8}


# ------------------------------------------------------------------ what comes out
def test_the_base_is_untouched_and_the_class_goes_and_comes():
    model = toy_model().eval()
    keys, digest, before = set(model.state_dict()), ia.digest(model), model(ids()).logits
    for method in (PROMPT, PREFIX):
        ia.attach(model, method)
        assert isinstance(model.model, LlamaModel)
        assert keys < set(model.state_dict())
        assert ia.digest(model) == digest
        assert not torch.equal(model(ids()).logits, before)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(ids()).logits, model(ids()).logits)
            ia.detach(copied, "default")
            assert type(copied.model) is LlamaModel
        ia.activate(model)
        assert torch.equal(model(ids()).logits, before)
        ia.detach(model, "default")
        assert type(model.model) is LlamaModel
        assert ia.digest(model) == digest


@pytest.mark.parametrize("method", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_every_output_is_of_the_tokens(method):
    model = adapted(method)
    model.set_attn_implementation("eager")
    y = model(ids(), output_hidden_states=True, output_attentions=True)
    n = method.tokens
    assert [tuple(h.shape) for h in y.hidden_states] == [(2, T, 32)] * 3
    assert [tuple(a.shape) for a in y.attentions] == [(2, 4, T, T + n)] * 2
    assert y.past_key_values.get_seq_length() == T + n
    assert torch.equal(model.model(ids(), return_dict=False)[0], y.hidden_states[-1])
    assert model(ids(), use_cache=False).past_key_values is None


@pytest.mark.parametrize("method", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_embeddings_may_be_given_instead_of_tokens(method):
    model = adapted(method)
    x = model.get_input_embeddings()(ids())
    torch.testing.assert_close(model(inputs_embeds=x).logits, model(ids()).logits)
    more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 258}
    assert torch.equal(model.generate(inputs_embeds=x, **more), model.generate(ids(), **more)[:, T:])


@pytest.mark.parametrize("method", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_a_cache_goes_on_token_by_token(method):
    model = adapted(method)
    whole, past = model(ids()).logits, None
    for t in range(T):
        y = model(ids()[:, t : t + 1], past_key_values=past, attention_mask=torch.ones(2, t + 1))
        torch.testing.assert_close(y.logits[:, 0], whole[:, t])
        past = y.past_key_values
    y = model(ids()[:, :2])
    y = model(ids()[:, 2:], past_key_values=y.past_key_values)  # without a mask too
    torch.testing.assert_close(y.logits, whole[:, 2:])


def test_several_stand_behind_one_another_the_lowest_first():
    model = adapted(PROMPT, PREFIX, PromptTuning(tokens=2))
    plain = toy_model(dtype=torch.float64).eval()
    low, keys, high = (numbers(model, name) for name in "abc")
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(2):
        cache.update(*(keys[k][layer].expand(2, -1, -1, -1) for k in "KV"), layer)
    x = torch.cat([low["P"].expand(2, -1, -1), high["P"].expand(2, -1, -1), plain.get_input_embeddings()(ids())], 1)
    torch.testing.assert_close(model(ids()).logits, plain(inputs_embeds=x, past_key_values=cache).logits[:, 5:])


def test_a_lora_below_works_on_what_stands_before_too():
    both = adapted(LORA, PROMPT)
    lora = adapted(LORA)
    x = torch.cat([numbers(both, "b")["P"].expand(2, -1, -1), lora.get_input_embeddings()(ids())], 1)
    torch.testing.assert_close(both(ids()).logits, lora(inputs_embeds=x).logits[:, 3:])


def test_a_classifier_reads_the_last_token():
    torch.manual_seed(0)
    config = toy_model().config
    config.num_labels = 3
    model = LlamaForSequenceClassification(config).eval()
    right = torch.cat([ids(), torch.full((2, 2), 258)], 1)
    ia.attach(model, PROMPT)
    alone = model(ids()).logits
    torch.testing.assert_close(model(right, attention_mask=(right != 258).long()).logits, alone)


def test_an_encoder_takes_a_prompt_and_no_prefix():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config).double().eval()
    with pytest.raises(ia.IntarsiaError, match=r"bert: no cache of keys and values.*train a prompt"):
        ia.attach(model, PREFIX)
    tokens, kinds = torch.tensor([[2, 5, 7, 1]]), torch.tensor([[0, 0, 1, 1]])
    plain = copy.deepcopy(model.bert)
    ia.attach(model, PROMPT)
    state: Any = states(model, "default")["bert"]
    P = numbers_of_bert = state.P.detach()
    assert P.shape == (3, 8)
    x = torch.cat([numbers_of_bert[None], plain.get_input_embeddings()(tokens)], 1)
    full = plain(inputs_embeds=x, token_type_ids=torch.tensor([[0, 0, 0, 0, 0, 1, 1]])).last_hidden_state[:, 3:]
    y = model.bert(tokens, token_type_ids=kinds)
    torch.testing.assert_close(y.last_hidden_state, full)
    torch.testing.assert_close(y.pooler_output, plain.pooler(full))
    saved = ia.export(model)
    assert saved.share == 0
    ia.detach(model, "default")
    deck = ia.Deck(model)
    deck.add(a=saved)
    deck.use("a")
    torch.testing.assert_close(model.bert(tokens, token_type_ids=kinds).last_hidden_state, full)


# ------------------------------------------------------------------ row by row
@pytest.mark.parametrize("filled", [False, True], ids=["no mask", "left-padded"])
def test_each_row_has_its_own(filled):
    """Different lengths, kinds, the base and a LoRA in one batch: each row is that row alone, also while it generates."""
    model = adapted(PROMPT, PREFIX, PromptTuning(tokens=1), LORA)
    names = ["a", None, "b", "c", "d", "a"]
    batch = {"input_ids": ids(6)}
    if filled:
        batch["attention_mask"] = torch.ones(6, T, dtype=torch.int64)
        batch["attention_mask"][0, :2] = batch["attention_mask"][3, :4] = 0
    with ia.rows(model, names):
        together = model(**batch).logits
        together.sin().sum().backward()
        spoken = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=258)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, name in enumerate(names):
        ia.activate(model, *([name] if name else []))
        alone = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        seen = slice(int((alone["attention_mask"] == 0).sum()), None) if filled else slice(None)
        y = model(**alone).logits
        torch.testing.assert_close(together[row, seen], y[0, seen])
        if name:
            y.sin().sum().backward()
        found = model.generate(**alone, max_new_tokens=3, do_sample=False, pad_token_id=258)
        assert torch.equal(spoken[row], found[0])
    if filled:  # what a model says of padding is nobody's business, and the sums count it
        return
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, msg=name)
    ia.activate(model)
    with ia.rows(model, ["a"]), pytest.raises(ia.IntarsiaError, match=r"1 adapters, and this layer meets 2 rows"):
        model(ids())


# ------------------------------------------------------------------ in a deck
def test_one_deck_switches_prompts_prefixes_and_loras():
    model = toy_model(dtype=torch.float64).eval()
    base, digest = model(ids()).logits, ia.digest(model)
    made = adapted(PROMPT, PREFIX, LORA)
    deck = ia.Deck(model)
    for name in "abc":
        more: Any = {name: ia.export(made, name)}
        deck.add(**more)
    for name in "abacbca":
        deck.use(name)
        ia.activate(made, name)
        torch.testing.assert_close(model(ids()).logits, made(ids()).logits)
        assert isinstance(model.model, LlamaModel)
    deck.fuse(a=1, c=0.5, b=1)
    assert "inserts at 7 positions before the tokens" in str(deck.status())
    with pytest.raises(ia.IntarsiaError, match=r"prompt stands before the tokens or does not.*weight 0.5"):
        deck.fuse(a=0.5, c=1)
    assert deck.active == {"a": 1, "c": 0.5, "b": 1}
    deck.use("c", 0.5)
    half = model(ids()).logits
    deck.fuse(b=1, a=1)
    ia.activate(made, "b", "a")
    torch.testing.assert_close(model(ids()).logits, made(ids()).logits)
    deck.use("c", 0.5)
    assert torch.equal(model(ids()).logits, half)
    deck.verify()
    deck.off()
    assert type(model.model) is LlamaModel
    assert torch.equal(model(ids()).logits, base)
    assert ia.digest(model) == digest


def test_a_fusion_is_in_the_order_that_was_asked_for():
    model, made = toy_model(dtype=torch.float64).eval(), adapted(PROMPT, PromptTuning(tokens=2))
    deck = ia.Deck(model)
    deck.add(a=ia.export(made, "a"), b=ia.export(made, "b"))
    found = []
    for names in (("a", "b"), ("b", "a")):
        deck.fuse(dict.fromkeys(names, 1.0))
        ia.activate(made, *names)
        found.append(model(ids()).logits)
        torch.testing.assert_close(found[-1], made(ids()).logits)
    assert (found[0] - found[1]).abs().max() > 1e-6


# ------------------------------------------------------------------ as an edit
def test_it_is_there_or_not():
    prompt = Insert((8, 16), Prompt(torch.ones(2, 8)), "ahead")
    prefix = Insert((8, 16), Prefix(torch.ones(2, 2, 3, 2), torch.ones(2, 2, 3, 2)), "ahead")
    edit: Any
    for edit in (prompt, prefix):
        whole: Any = scale(edit, 1.0)
        assert whole.scale == 1
        for half in (lambda edit=edit: scale(edit, 0.5), lambda edit=edit: Sum(edit.shape, (edit,), (2.0,))):
            with pytest.raises(ia.IntarsiaError, match=r"stands before the tokens or does not"):
                half()
        with pytest.raises(ia.IntarsiaError, match=r"stands before the tokens and folds into no weight"):
            edit.fold(torch.zeros(8, 16))
        assert (edit.in_weight(), edit.touched) == (None, 0)
    both = add(prompt, prefix)
    assert [insert.inserted.what for _, insert in both.inserts()] == ["prompt", "prefix"]
    assert (prompt.multiplications, prefix.multiplications) == (32, 48)


@pytest.mark.parametrize(
    ("edit", "tensors", "said"),
    [
        (Prompt(torch.ones(2, 8)), {"P": torch.ones(2, 7)}, r"P is \(2, 7\); expected \(n, 8\)"),
        (Prompt(torch.ones(2, 8)), {"P": torch.ones(0, 8)}, r"P is \(0, 8\)"),
        (Prompt(torch.ones(2, 8)), {"P": torch.full((2, 8), torch.nan)}, r"not finite"),
        (Prompt(torch.ones(2, 8)), {}, r"found the tensors none"),
        (Prefix(*torch.ones(2, 2, 2, 3, 2)), {"K": torch.ones(2, 2, 3, 2)}, r"expected K, V"),
        (
            Prefix(*torch.ones(2, 2, 2, 3, 2)),
            dict(zip("KV", torch.ones(2, 2, 2, 3, 3), strict=True)),
            r"no prefix: .*16",
        ),
    ],
)
def test_a_file_is_checked(edit, tensors, said):
    with pytest.raises(ia.IntarsiaError, match=said):
        Insert((8, 16), edit, "ahead").made_of(tensors)


def test_a_place_is_checked():
    with pytest.raises(ia.IntarsiaError, match="place is 'after'; expected one of ahead"):
        Insert.build((8, 16), {"P": torch.ones(2, 8)}, {"what": "prompt", "place": "after", "scale": 1.0})
    with pytest.raises(ia.IntarsiaError, match="place is 'ahead'; expected one of after"):
        Insert.build((8, 16), {}, {"what": "bottleneck", "place": "ahead", "scale": 1.0})


def test_a_file_for_layers_does_not_fit_a_decoder():
    model = toy_model()
    ia.attach(model, PROMPT)
    made = ia.export(model)
    wrong = {"model.layers.0.self_attn.o_proj.weight": Insert((32, 32), Prompt(torch.ones(2, 32)), "ahead")}
    deck = ia.Deck(toy_model())
    with pytest.raises(
        ia.IntarsiaError,
        match=r"an insert \(prompt\) acts at layers of the kind decoder; this one is of the kind linear",
    ):
        deck.add(a=ia.Adapter("a", wrong, made.base, {"name": "any"}))


# ------------------------------------------------------------------ what cannot be
def test_a_prefix_and_gradient_checkpointing_are_refused():
    """transformers takes the cache from its layers, and the prefix would be gone without a word."""
    for method in (PREFIX, PROMPT):
        model = adapted(method, dtype=torch.float32).train()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if method is PROMPT:
            model(ids(), use_cache=False).logits.sum().backward()
            continue
        with pytest.raises(ia.IntarsiaError, match=r"with gradient checkpointing .* prefix would be left out"):
            model(ids())


@pytest.mark.parametrize("method", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_masks_and_caches_that_cannot_grow_are_refused(method):
    model = adapted(method)
    more = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 258}
    with pytest.raises(
        ia.IntarsiaError, match="needs a cache that grows|it is made for every pair|this one is made for every pair"
    ):
        model.generate(ids(), cache_implementation="static", **more)
    with pytest.raises(ia.IntarsiaError, match="made for every pair"):
        model(ids(), attention_mask=torch.ones(2, 1, T, T))
    with pytest.raises(ia.IntarsiaError, match=r"the mask is \(2, 9\) for 6 tokens"):
        model(ids(), attention_mask=torch.ones(2, 9))
    with pytest.raises(ia.IntarsiaError, match="several texts in one row"):
        model(ids(), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))
    with pytest.raises(ia.IntarsiaError, match=r"takes \(batch, tokens\)"):
        model(ids(), position_ids=torch.zeros(3, 2, T, dtype=torch.int64))


@pytest.mark.parametrize("method", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_a_cache_that_was_begun_otherwise_is_refused(method):
    model = adapted(method)
    ia.activate(model)
    past = model(ids()).past_key_values
    ia.activate(model, "a")
    with pytest.raises(ia.IntarsiaError, match=r"the cache holds 6 positions, the mask 7.*begin with an empty cache"):
        model(ids()[:, :1], past_key_values=past, attention_mask=torch.ones(2, T + 1))


def test_a_sharded_base_is_refused(monkeypatch):
    from intarsia import distributed

    monkeypatch.setattr(distributed, "_must_be_started", lambda _: None)
    monkeypatch.setattr(distributed, "check_alike", lambda _: None)
    with pytest.raises(ia.IntarsiaError, match=r"model has something before its tokens.*replicate"):
        ia.shard(adapted(PROMPT))
