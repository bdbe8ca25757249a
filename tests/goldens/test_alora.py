"""Activated LoRA against HF PEFT's, against plain LoRA and the base, and the promise it is made for: the base's cache serves it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import intarsia as ia
from intarsia import edits
from intarsia import model as models
from intarsia.methods import Alora
from small import small_net, some_input, stir

INVOCATION = (7, 11)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)  # what PEFT asks for
TARGETS = ["*q_proj", "*k_proj", "*v_proj"]


def _ids(length: int = 20, rows: int = 1, seed: int = 0, **at: int) -> Tensor:
    """Random tokens without the invocation, which is then put where ``at`` says (row0=5)."""
    ids = torch.randint(20, 300, (rows, length), generator=torch.Generator().manual_seed(seed))
    for row, start in at.items():
        ids[int(row.removeprefix("row")), start : start + 2] = torch.tensor(INVOCATION)
    return ids


def _adapted(model: Any, targets: Any = TARGETS, **fields: Any) -> Any:
    ia.attach(model, Alora(INVOCATION, **({"rank": 4} | fields)), targets)
    stir(model, size=0.3)
    return model.eval()


def _lora_of(model: Any, targets: Any = TARGETS) -> None:
    """Attach a plain LoRA with the same numbers, and make it the active one."""
    ia.attach(model, ia.Lora(4), targets, name="plain")
    with torch.no_grad():
        for site, state in models.states(model, "plain").items():
            for name, tensor in state.tensors().items():
                tensor.copy_(models.states(model, "default")[site].tensors()[name])


def _cache(model: Any, ids: Tensor) -> Any:
    return _out(model, ids, past_key_values=DynamicCache()).past_key_values


def _out(model: Any, ids: Tensor, **more: Any) -> Any:
    with torch.no_grad():
        return model(ids, **more)


# ------------------------------------------------------------------ against PEFT
@pytest.mark.parametrize("where", [0, 9, 18, None])
def test_logits_and_gradients_are_pefts(tiny_llama, where):
    import peft

    ids = _ids(rows=3, row0=4, row1=13, **({} if where is None else {"row2": where}))
    ids[0, 12:14] = torch.tensor(INVOCATION)  # the last one counts
    model = _adapted(tiny_llama(torch.float64), alpha=6.0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM",
                             alora_invocation_tokens=list(INVOCATION))  # fmt: skip
    theirs: Any = peft.get_peft_model(tiny_llama(torch.float64), config).eval()
    for site, state in models.states(model, "default").items():
        layer = theirs.base_model.model.get_submodule(site)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(state.A)
            layer.lora_B["default"].weight.copy_(state.B)
    found, expected = model(ids).logits, theirs(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    for site, state in models.states(model, "default").items():
        layer = theirs.base_model.model.get_submodule(site)
        torch.testing.assert_close(state.A.grad, layer.lora_A["default"].weight.grad, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(state.B.grad, layer.lora_B["default"].weight.grad, rtol=1e-8, atol=1e-11)


def test_generation_is_pefts(tiny_llama):
    import peft

    ids = _ids(rows=2, row0=4, row1=13)
    model = _adapted(tiny_llama())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM",
                             alora_invocation_tokens=list(INVOCATION))  # fmt: skip
    theirs: Any = peft.get_peft_model(tiny_llama(), config).eval()
    for site, state in models.states(model, "default").items():
        layer = theirs.base_model.model.get_submodule(site)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(state.A)
            layer.lora_B["default"].weight.copy_(state.B)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours, theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))
    without = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(ours, without)


# ------------------------------------------------------------------ what comes before is the base's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
@pytest.mark.parametrize("by", ["attached", "deck"])
def test_all_before_the_invocation_is_the_bases_to_the_bit(tiny_llama, dtype, targets, by):
    base, ids, at = tiny_llama(dtype), _ids(24, row0=15), 15
    model = _adapted(tiny_llama(dtype), targets)
    if by == "deck":
        deck = ia.Deck(tiny_llama(dtype))
        deck.add(a=ia.export(model))
        deck.use("a")
        model = deck.model.eval()
    expected, found = (_out(m, ids, use_cache=True, output_hidden_states=True) for m in (base, model))
    for one, other in zip(expected.past_key_values.layers, found.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            theirs, ours = getattr(one, name), getattr(other, name)
            assert torch.equal(ours[:, :, :at], theirs[:, :, :at])
            assert not torch.equal(ours[:, :, at], theirs[:, :, at])
    for one, other in zip(expected.hidden_states, found.hidden_states, strict=True):
        assert torch.equal(one[:, :at], other[:, :at])
    assert torch.equal(expected.logits[:, :at], found.logits[:, :at])
    assert not torch.equal(expected.logits[:, at:], found.logits[:, at:])


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("by", ["attached", "deck"])
def test_the_bases_cache_and_the_rest_is_the_whole(tiny_llama, by, copied):
    base, ids, at = tiny_llama(), _ids(24, row0=15), 15
    model = _adapted(tiny_llama())
    if by == "deck":
        deck = ia.Deck(tiny_llama())
        deck.add(a=ia.export(model))
        model = deck.model.eval()
        cache = _cache(model, ids[:, :at])  # the base's, of this very model
        deck.use("a")
    else:
        cache = _cache(base, ids[:, :at])
    whole = _out(model, ids).logits
    cache = copy.deepcopy(cache) if copied else cache
    rest = _out(model, ids[:, at:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, at:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rest, _out(base, ids).logits[:, at:], atol=1e-3)


def test_a_deck_switches_it_in_the_middle_of_a_conversation(tiny_llama):
    """Base, adapter and base again on one cache, token by token and generated: each sees what the others wrote."""
    source = _adapted(tiny_llama())
    deck = ia.Deck(tiny_llama())
    deck.add(a=ia.export(source))
    model: Any = deck.model.eval()
    ids = _ids(16, row0=12)
    cache = _cache(model, ids[:, :12])
    deck.use("a")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    assert torch.equal(answer, source.generate(ids, attention_mask=torch.ones_like(ids), **options))
    hooks = len(model._forward_pre_hooks)
    deck.off()
    assert len(model._forward_pre_hooks) == hooks - 1
    assert not model._forward_hooks


def test_interleaved_caches_keep_their_own_invocations(tiny_llama):
    model = _adapted(tiny_llama())
    invoked, other = _ids(10, row0=6), _ids(10, seed=5)
    more = _ids(3, seed=9)
    expected = [_out(model, torch.cat([ids, more], 1)).logits[:, 10:] for ids in (invoked, other)]
    caches = [_cache(model, ids) for ids in (invoked, other)]
    for cache, right in zip(caches, expected, strict=True):
        torch.testing.assert_close(_out(model, more, past_key_values=cache).logits, right, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ missing, first, repeated, batched
def test_without_an_invocation_it_is_the_base_and_learns_nothing(tiny_llama):
    base, model, ids = tiny_llama(), _adapted(tiny_llama()), _ids(rows=2)
    logits = model(ids).logits
    assert torch.equal(logits, base(ids).logits)
    logits.sum().backward()
    for state in models.states(model, "default").values():
        assert not state.A.grad.any()  # type: ignore[union-attr, operator]
        assert not state.B.grad.any()  # type: ignore[union-attr, operator]


def test_from_the_first_token_on_it_is_a_lora(tiny_llama):
    model, ids = _adapted(tiny_llama()), _ids(row0=0)
    found = _out(model, ids).logits
    _lora_of(model)
    torch.testing.assert_close(found, _out(model, ids).logits, rtol=1e-6, atol=1e-6)


def test_rows_with_invocations_elsewhere_are_as_alone(tiny_llama):
    model = _adapted(tiny_llama(torch.float64))
    ids = _ids(rows=4, row0=3, row1=10, row3=18)
    ids[1, 2:4] = torch.tensor(INVOCATION)
    together = _out(model, ids).logits
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], _out(model, ids[row : row + 1]).logits, rtol=0, atol=1e-12)
    last = _ids(rows=4, row1=10)[1:2]
    last[:, 2:4] = ids[1, 2:4]
    cut = _out(model, last).logits
    assert torch.equal(cut[:, :10], _out(tiny_llama(torch.float64), last).logits[:, :10])  # the first one is nothing


@pytest.mark.parametrize("padding", [1, 6])
def test_left_padding_changes_nothing(tiny_llama, padding):
    model, ids = _adapted(tiny_llama(torch.float64)), _ids(row0=9)
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= padding).long()[None]
    positions = (torch.arange(padded.shape[1]) - padding).clamp_min(0)[None]
    found = _out(model, padded, attention_mask=mask, position_ids=positions).logits[:, padding:]
    torch.testing.assert_close(found, _out(model, ids).logits, rtol=0, atol=1e-10)


def test_a_start_offset_begins_later(tiny_llama):
    model, base, ids = _adapted(tiny_llama(), start_offset=2), tiny_llama(), _ids(row0=9)
    found, expected = _out(model, ids).logits, _out(base, ids).logits
    assert torch.equal(found[:, :11], expected[:, :11])
    assert not torch.equal(found[:, 11], expected[:, 11])


def test_rows_of_a_batch_with_adapters_of_their_own(tiny_llama):
    model = _adapted(tiny_llama(torch.float64))
    ia.attach(model, Alora((9,), rank=2), TARGETS, name="other")
    stir(model, "other", seed=3, size=0.3)
    ids = _ids(rows=4, row0=3, row1=8, row3=12)
    ids[2, 15] = 9
    names = ["default", "other", "other", None]
    with ia.rows(model, names):
        together = _out(model, ids).logits
    for row, name in enumerate(names):
        ia.activate(model, *([name] if name else []))
        torch.testing.assert_close(together[row : row + 1], _out(model, ids[row : row + 1]).logits, rtol=0, atol=1e-12)


# ------------------------------------------------------------------ training, copies, errors
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_meets_the_same_tokens(tiny_llama, reentrant):
    model, ids = _adapted(tiny_llama(torch.float64)), _ids(rows=3, row0=3, row1=10)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(ids, labels=ids).loss, trained)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


def test_a_compiled_model_sees_the_tokens(tiny_llama):
    model, base = _adapted(tiny_llama()), tiny_llama()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for at in (5, 12):
        ids = _ids(row0=at)
        found = _out(compiled, ids, use_cache=False).logits
        torch.testing.assert_close(found, _out(model, ids).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[:, :at], _out(base, ids).logits[:, :at])


def test_a_deck_on_a_compiled_model_sees_the_tokens(tiny_llama):
    """The hook comes after the model was compiled, and goes again."""
    ids, source = _ids(row0=9), _adapted(tiny_llama())
    torch._dynamo.reset()
    deck = ia.Deck(tiny_llama())
    deck.add(a=ia.export(source))
    compiled = torch.compile(deck.model.eval(), backend="eager")
    base = _out(compiled, ids, use_cache=False).logits
    for _ in range(2):
        deck.use("a")
        found = _out(compiled, ids, use_cache=False).logits
        torch.testing.assert_close(found, _out(source, ids).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[:, :9], base[:, :9])
        deck.off()
        assert torch.equal(_out(compiled, ids, use_cache=False).logits, base)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_a_copy_sees_its_own_tokens(tiny_llama, copied):
    model = _adapted(tiny_llama())
    other = copied(model)
    found = _out(other, _ids(row0=4)).logits
    _out(model, _ids(row0=12, seed=3))
    assert torch.equal(_out(other, _ids(row0=4)).logits, found)
    models.detach(other, "default")
    assert not other._forward_pre_hooks
    assert model._forward_pre_hooks


def test_where_there_are_no_tokens_it_acts_everywhere():
    net = small_net()
    ia.attach(net, Alora(INVOCATION, rank=4))
    stir(net)
    found = net(some_input())
    _lora_of(net, "all-linear")
    torch.testing.assert_close(found, net(some_input()), rtol=1e-6, atol=1e-6)


def test_embeddings_alone_are_refused(tiny_llama):
    model = _adapted(tiny_llama())
    given = model.get_input_embeddings()(_ids(row0=4))
    with pytest.raises(ia.IntarsiaError, match="input_ids"):
        model(inputs_embeds=given)
    ia.activate(model)
    model(inputs_embeds=given)


def test_a_layer_that_does_not_see_every_token_is_refused(tiny_llama):
    model = _adapted(tiny_llama())
    model(_ids(row0=4))
    with pytest.raises(ia.IntarsiaError, match="1 x 20 tokens"):
        model.get_submodule("model.layers.0.self_attn.q_proj")(torch.zeros(1, 3, 64))


def test_it_folds_into_no_weight(tiny_llama):
    model = _adapted(tiny_llama())
    edit = next(iter(ia.export(model).edits.values()))
    with pytest.raises(ia.IntarsiaError, match="folds into no weight"):
        edit.fold(torch.zeros(edit.shape))


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"invocation": "<|x|>"}, "invocation"), ({"invocation": [1.5]}, "invocation"), ({"invocation": [-1]}, "invocation"),
     ({"invocation": [1], "start_offset": -1}, "start_offset"), ({"invocation": [1], "rank": 0}, "rank")],
)  # fmt: skip
def test_fields_out_of_range_are_refused(fields, word):
    with pytest.raises(ia.IntarsiaError, match=f"{word}="):
        Alora(**fields)


def test_without_an_invocation_it_is_not_attached(tiny_llama):
    with pytest.raises(ia.IntarsiaError, match="no invocation"):
        ia.attach(tiny_llama(), Alora(), TARGETS)


@pytest.mark.parametrize(
    ("tensors", "facts", "word"),
    [({"A": torch.zeros(2, 16)}, {}, "tensors"), ({"A": torch.zeros(2, 15)}, {}, "multiply"),
     ({}, {"invocation": []}, "invocation"), ({}, {"invocation": 3}, "invocation"), ({}, {"start_offset": -1}, "start_offset")],
)  # fmt: skip
def test_a_file_that_makes_none_is_refused(tensors, facts, word):
    good = {"A": torch.zeros(2, 16), "B": torch.zeros(24, 2)}
    given = tensors if word == "tensors" else good | tensors
    said = {
        "type": "insert",
        "what": "low rank activated by tokens",
        "place": "parallel",
        "scale": 1.0,
        "invocation": [1],
        "start_offset": 0,
    }
    with pytest.raises(ia.IntarsiaError, match=word):
        edits.build_edit("insert", (24, 16), given, said | facts)
    edits.build_edit("insert", (24, 16), good, said)
