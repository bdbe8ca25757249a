"""Layers that are no Linear: the same laws, against plain autograd on the stored weight."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import intarsia as ia
from intarsia import chain
from intarsia import model as models
from intarsia.operators import operator_of
from small import state_of, stir, trained

Net = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


class TiedNet(nn.Module):
    """An embedding, tanh, and a head on the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Embedding(24, 16, padding_idx=3)
        self.head = nn.Linear(16, 24)
        self.head.weight = self.site.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.site(x).tanh())  # type: ignore[no-any-return]


def _of(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("site", layer())
        model.add_module("tanh", nn.Tanh())
        return model

    return make


def _tied() -> nn.Module:
    torch.manual_seed(0)
    return TiedNet()


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _tokens() -> Tensor:
    return torch.tensor([[1, 5, 1, 3], [0, 7, 23, 5]])


NETS: dict[str, Net] = {
    "linear": (_of(lambda: nn.Linear(16, 24)), _numbers(2, 3, 16)),
    "conv1d-of-transformers": (_of(lambda: Conv1D(24, 16)), _numbers(2, 3, 16)),
    "conv1d": (_of(lambda: nn.Conv1d(4, 24, 4, stride=2, padding=1)), _numbers(2, 4, 9)),
    "conv1d-unbatched": (_of(lambda: nn.Conv1d(4, 24, 4)), _numbers(4, 9)),
    "conv2d": (_of(lambda: nn.Conv2d(4, 8, 3, padding="same", dilation=2, bias=False)), _numbers(2, 4, 5, 6)),
    "conv2d-grouped": (_of(lambda: nn.Conv2d(8, 24, (2, 3), groups=4, padding=1)), _numbers(2, 8, 4, 4)),
    "conv2d-depthwise": (_of(lambda: nn.Conv2d(8, 8, 3, groups=8)), _numbers(2, 8, 4, 4)),
    "conv3d": (_of(lambda: nn.Conv3d(2, 8, 2)), _numbers(1, 2, 3, 3, 3)),
    "embedding": (_of(lambda: nn.Embedding(24, 16, padding_idx=3)), _tokens),
    "tied": (_tied, _tokens),
}
SPARSE = {
    "elements": ia.Shira(density=0.3),
    "columns": ia.Shira(density=0.3, granularity="column"),
    "wide-columns": ia.Shira(density=0.4, granularity="column", width=3),
    "rows": ia.Shira(density=0.3, granularity="row"),
    "lines": ia.Shira(density=0.3, granularity="line", width=4),
    "tiles": ia.Shira(density=0.5, granularity="tile", width=4),
    "diagonals": ia.Shira(density=0.3, granularity="diagonal"),
    "magnitude": ia.Shira(density=0.3, scorer="magnitude"),
    "gradient": ia.Shira(density=0.3, scorer="gradient"),
    "paca": ia.Paca(rank=2),
    "paca-columns": ia.Paca(rank=2, parameterization="columns"),
}
ALL = {**SPARSE, "lora": ia.Lora(rank=2), "dora": ia.Dora(ia.Lora(rank=2))}


def _x(net: str, dtype: torch.dtype = torch.float64) -> Tensor:
    x = NETS[net][1]()
    return x.to(dtype) if x.is_floating_point() else x


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return (y.double() - 0.3).square().mean()


def _fits(net: str, method: str) -> bool:
    return not (method == "dora" and net == "tied") and not (net == "conv2d-depthwise" and method in ("lines", "tiles"))


def _adapted(net: str, method: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = NETS[net][0]().to(dtype)
    ia.attach(model, ALL[method], "site", data=[_x(net, dtype)], loss=_loss)
    return model


SPARSE_PAIRS = [
    pytest.param(net, method, id=f"{net}-{method}") for net in NETS for method in SPARSE if _fits(net, method)
]


@pytest.mark.parametrize(("net", "method"), SPARSE_PAIRS)
def test_the_gradient_is_the_dense_one_on_the_support(net, method):
    """Of the stored weight, by plain autograd: through both uses where the weight is shared."""
    model, x = _adapted(net, method), _x(net)
    stir(model)
    state = state_of(model, "site")
    plain = NETS[net][0]().double()
    with torch.no_grad():
        plain.get_parameter("site.weight").copy_(model.get_parameter("site.weight"))
    _loss(plain, x).backward()
    operator = operator_of(plain.get_submodule("site"))
    dense = operator.matrix(plain.get_parameter("site.weight").grad)  # type: ignore[union-attr, arg-type]
    expected = state.granularity().gather(dense, state.index) * ALL[method].scale_at(state.shape)  # type: ignore[attr-defined]
    for live in (True, False):
        for layer in chain.adapted_layers(model).values():
            chain.set_active(layer, layer.active, live)
        model.zero_grad()
        assert torch.allclose(_loss(model, x), _loss(plain, x), rtol=1e-12)
        _loss(model, x).backward()
        torch.testing.assert_close(state.values.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["elements", "columns", "lines", "paca-columns", "lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_start_train_and_undo(net, method, dtype, tmp_path):
    """The start is the base to the bit; a step moves it; detaching, and a deck's off(), give back the very bits."""
    if not _fits(net, method):
        return
    model, x = NETS[net][0]().to(dtype), _x(net, dtype)
    y, start = model(x), {k: t.clone() for k, t in model.state_dict().items()}
    ia.attach(model, ALL[method], "site", data=[x], loss=_loss)
    assert torch.equal(model(x), y)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        _loss(model, x).backward()
        optimizer.step()
    learned = model(x)
    assert not torch.equal(learned, y)
    assert all(
        torch.equal(model.state_dict()[k], t) for k, t in start.items() if k != "site.weight" and "head" not in k
    )
    ia.save(model, tmp_path / "a")
    ia.detach(model, "default")
    assert all(torch.equal(model.state_dict()[k], t) for k, t in start.items())
    assert [type(m) for m in model.modules()] == [type(m) for m in NETS[net][0]().modules()]
    deck = ia.Deck(model)
    deck.add(tmp_path / "a")
    deck.use("a")
    torch.testing.assert_close(model(x), learned, rtol=0, atol=8 * torch.finfo(dtype).eps)
    deck.fuse(a=0.5)
    deck.off()
    assert all(torch.equal(model.state_dict()[k], t) for k, t in start.items())
    ia.load(model, tmp_path / "a")
    assert torch.equal(model(x), learned)


@pytest.mark.parametrize("net", [n for n in NETS if n != "conv1d-unbatched"])
@pytest.mark.parametrize("method", ["elements", "columns", "lora"])
def test_rows_equal_each_row_alone(net, method):
    model, x = _adapted(net, method), _x(net)
    if len(x) == 1:
        x = torch.cat([x, x + 1])
    stir(model)
    ia.attach(model, ALL[method], "site", name="other", seed=1)
    stir(model, "other", seed=1)
    with ia.rows(model, ["default", None]):
        together = model(x)
    for row, names in enumerate((["default"], [])):
        ia.activate(model, *names)
        torch.testing.assert_close(together[row], model(x[row : row + 1])[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["elements", "columns", "lora"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_copies_and_checkpoints(net, method):
    model, x = _adapted(net, method, torch.float32), _x(net, torch.float32)
    stir(model)
    gradients = torch.autograd.grad(_loss(model, x), trained(model))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = [torch.autograd.grad((compiled(x).double() - 0.3).square().mean(), trained(model))]
    for whole in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(whole(x), model(x))
        found.append(torch.autograd.grad(_loss(whole, x), trained(whole)))
        base = NETS[net][0]()
        ia.detach(whole, "default")
        assert torch.equal(whole(x), base(x))
        assert [type(m) for m in whole.modules()] == [type(m) for m in base.modules()]
    again = checkpoint(model, x, use_reentrant=False)
    found.append(torch.autograd.grad((again.double() - 0.3).square().mean(), trained(model)))
    for each in found:
        torch.testing.assert_close(each, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["elements", "columns", "lora"])
def test_autocast_gives_the_dtype_of_the_base(net, method):
    model, x = _adapted(net, method, torch.float32), _x(net, torch.float32)
    stir(model)
    expected = model(x)
    plain = NETS[net][0]()
    for live in (True, False):
        for layer in chain.adapted_layers(model).values():
            chain.set_active(layer, layer.active, live)
        with torch.autocast("cpu", torch.bfloat16):
            y, base = model(x), plain(x)
            _loss(model, x).backward()
        assert y.dtype == base.dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained(model))


@pytest.mark.parametrize("net", NETS)
def test_a_stack_is_one_fold_upon_the_other(net):
    model, x = _adapted(net, "elements"), _x(net)
    stir(model)
    ia.attach(model, ia.Lora(2), "site", name="upper")
    stir(model, "upper")
    ia.activate(model, "default", "upper")
    found = model(x)
    layer: Any = model.get_submodule("site")
    W, b = chain.base_weight(layer).clone(), chain.bias(layer)
    for name in ("default", "upper"):
        state = layer.adapters[name]
        W, b = state.method.fold(state.cast(torch.float64), W, b)
    plain = NETS[net][0]().double()
    with torch.no_grad():
        layer.operator.matrix(plain.get_parameter("site.weight").detach()).copy_(W)
    torch.testing.assert_close(found, plain(x), rtol=1e-10, atol=1e-12)


def test_a_live_embedding_builds_no_dense_gradient_for_few_columns(monkeypatch):
    model, x = _adapted("embedding", "columns"), _x("embedding")
    loss = _loss(model, x)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: pytest.fail("a dense gradient"))
    loss.backward()


# ------------------------------------------------------------------ transformers' Conv1D
@pytest.fixture
def gpt2():
    def make() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=48, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()

    return make


def test_all_linear_of_gpt2_is_its_conv1d(gpt2, tmp_path):
    model, x = gpt2(), torch.tensor([[5, 9, 2, 40]])
    before = model(x).logits
    ia.attach(model, ia.Shira(density=0.1))
    assert len(ia.export(model).edits) == 8
    assert torch.equal(model(x).logits, before)
    stir(model)
    changed = model(x).logits
    ia.save(model, tmp_path / "a")
    edit = ia.read(tmp_path / "a").edits["transformer.h.0.attn.c_attn.weight"]
    assert edit.shape == (96, 32)  # out, in: the stored weight is (in, out), and the file says so
    head = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert set(head["about"]["layouts"].values()) == {"in-out"}
    deck = ia.Deck(other := gpt2())
    deck.add(tmp_path / "a")
    deck.use("a")
    torch.testing.assert_close(other(x).logits, changed)
    assert deck.verify() == ia.digest(gpt2())


def test_a_square_weight_stored_the_other_way_round_is_refused(tmp_path):
    """Its shape fits, and its edit would be set in transposed."""
    stored = nn.ModuleDict({"a": Conv1D(8, 8)})
    ia.attach(stored, ia.Shira(density=0.2))
    ia.save(stored, tmp_path / "a")
    with pytest.raises(
        ia.IntarsiaError, match="a.weight: the adapter edits a weight stored in-out, the model stores it out-in"
    ):
        ia.Deck(nn.ModuleDict({"a": nn.Linear(8, 8)})).add(tmp_path / "a", any_base=True)


# ------------------------------------------------------------------ embeddings
def test_a_tied_embedding_is_adapted_for_both(tiny_llama):
    model, x = tiny_llama(tie_word_embeddings=True), torch.tensor([[5, 9, 319, 40]])
    before = model(x).logits
    ia.attach(model, ia.Shira(density=0.02, granularity="column"), "embed_tokens")
    assert list(ia.export(model).edits) == ["model.embed_tokens.weight"]
    assert torch.equal(model(x).logits, before)
    stir(model)
    index = state_of(model, "model.embed_tokens").index
    moved = (model.lm_head.weight - tiny_llama(tie_word_embeddings=True).lm_head.weight).abs().sum(1)
    assert torch.equal(moved.nonzero().squeeze(1), index)
    with pytest.raises(ia.IntarsiaError, match="lm_head: .* name 'model.embed_tokens' instead"):
        ia.attach(model, ia.Lora(2), "lm_head", name="b")
    ia.detach(model, "default")
    assert torch.equal(model(x).logits, before)
    ia.attach(model, ia.Lora(2), ["embed_tokens", "lm_head", "q_proj"])
    assert "lm_head.weight" not in ia.export(model).edits


def test_an_untied_embedding_and_head_are_two_sites(tiny_llama):
    model = tiny_llama()
    ia.attach(model, ia.Lora(2), ["embed_tokens", "lm_head"])
    assert {w: e.shape for w, e in ia.export(model).edits.items()} == {
        "model.embed_tokens.weight": (64, 320),
        "lm_head.weight": (320, 64),
    }


def test_what_cannot_sit_on_a_tied_weight_says_so(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ia.IntarsiaError, match="embed_tokens shares its weight with lm_head, where dora cannot sit"):
        ia.attach(model, ia.Dora(), "embed_tokens")
    with pytest.raises(ia.IntarsiaError, match="of the kind embedding, where shira cannot sit as it is set: the norms"):
        ia.attach(model, ia.Shira(scorer="wanda"), "embed_tokens", data=[{"input_ids": torch.tensor([[1]])}])
    assert ia.attached_names(model) == []


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(8, 4, max_norm=1.0), "with max_norm its forward rewrites the weight"),
        (nn.Embedding(8, 4, scale_grad_by_freq=True), "scale_grad_by_freq=True is not computed"),
        (nn.Conv2d(2, 4, 3, padding_mode="reflect"), "padding_mode='reflect' is not computed here"),
        (nn.Conv1d(2, 4, 4, padding="same"), "padding='same' with an even kernel"),
    ],
    ids=str,
)
def test_layers_whose_settings_are_not_computed_are_refused(layer, message):
    model = nn.Sequential(layer)
    with pytest.raises(ia.IntarsiaError, match=message):
        ia.attach(model, ia.Lora(2), "0")
    assert type(model[0]) is type(layer)


def test_a_scaled_embedding_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 8

    with pytest.raises(ia.IntarsiaError, match="the forward of Scaled is not that of its base class"):
        ia.attach(nn.Sequential(Scaled(8, 4)), ia.Lora(2), "0")


def test_all_linear_without_a_linear_names_the_others():
    with pytest.raises(ia.IntarsiaError, match="'all-linear' matches nothing.*name others, such as '0' \\(a Conv2d\\)"):
        ia.attach(nn.Sequential(nn.Conv2d(2, 4, 3)), ia.Lora(2))


def test_a_convolution_that_works_in_place_after_it_still_trains():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True))
    ia.attach(model, ia.Shira(density=0.3), "0")
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    y: Tensor = model[:1](x)
    assert torch.equal(model(x), F.relu(y))


# ------------------------------------------------------------------ parameters that a module reads itself
def _mixtral() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=40, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, **shape)
    return MixtralForCausalLM(config).eval()


def _gpt_oss() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GptOssConfig(
        vocab_size=40, num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2, **shape
    )
    return GptOssForCausalLM(config).eval()


EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
IDS = torch.tensor([[5, 9, 2, 30, 11, 7]])


@pytest.mark.parametrize("make", [_mixtral, _gpt_oss])
@pytest.mark.parametrize("method", ["elements", "columns", "rows", "lines", "paca-columns"])
def test_stacks_of_experts_train_in_place(make, method, tmp_path):
    """The gradient is the dense one on the support; a step writes the parameter; the file says the order of its axes."""
    model, plain = make(), make()
    before = model(input_ids=IDS, labels=IDS).logits
    kind = type(model.get_submodule("model.layers.0.mlp.experts"))
    ia.attach(model, ALL[method], ["gate_up_proj", "experts.down_proj"])
    assert set(ia.export(model).edits) == {EXPERTS, EXPERTS.replace("gate_up", "down")}
    assert torch.equal(model(input_ids=IDS).logits, before)
    plain(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None and "adapters" not in n] == []
    for name in models.states(model, "default"):
        state = state_of(model, name)
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        dense = state.operator.matrix(gradient)
        expected = state.granularity().gather(dense, state.index) * ALL[method].scale_at(state.shape)  # type: ignore[attr-defined]
        torch.testing.assert_close(state.values.grad, expected, rtol=1e-4, atol=1e-7)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    optimizer.step()
    learned = model(input_ids=IDS).logits
    assert not torch.equal(learned, before)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(input_ids=IDS).logits, learned)
        ia.detach(copied, "default")
        assert torch.equal(copied(input_ids=IDS).logits, before)
    ia.save(model, tmp_path / "a")
    layout = "expert-in-out" if make is _gpt_oss else "expert-out-in"
    assert ia.read(tmp_path / "a").about["layouts"][EXPERTS] == layout
    ia.detach(model, "default")
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert ia.digest(model) == ia.digest(make())
    assert type(model.get_submodule("model.layers.0.mlp.experts")) is kind
    deck = ia.Deck(model)
    deck.add(tmp_path / "a")
    deck.use("a")
    torch.testing.assert_close(model(input_ids=IDS).logits, learned)
    deck.off()
    ia.load(model, tmp_path / "a")
    assert torch.equal(model(input_ids=IDS).logits, learned)
    model.to(torch.bfloat16)
    assert not torch.equal(model(input_ids=IDS).logits, make().to(torch.bfloat16)(input_ids=IDS).logits)
    ia.detach(model, "a")
    assert ia.digest(model) == ia.digest(make().to(torch.bfloat16))


def test_what_a_stack_of_experts_cannot_do_is_refused():
    model = _mixtral()
    with pytest.raises(ia.IntarsiaError, match="gate_up_proj is of the kind stack, where lora cannot sit; .*shira"):
        ia.attach(model, ia.Lora(2), "gate_up_proj")
    for name in ("a", "b"):
        ia.attach(model, ia.Shira(density=0.1), "gate_up_proj", name=name)
    with pytest.raises(ia.IntarsiaError, match="one adapter can act on it, not a, b"):
        ia.activate(model, "a", "b")
    with pytest.raises(ia.IntarsiaError, match="cannot differ from row to row"), ia.rows(model, ["a"]):
        pass
    with torch.no_grad():
        state_of(model, EXPERTS, "b").values.add_(0.1)
    with pytest.raises(ia.IntarsiaError, match="out of date"):
        model(input_ids=IDS)
    ia.sync(model)
    model(input_ids=IDS)


def test_all_linear_leaves_experts_alone():
    model = _mixtral()
    ia.attach(model, ia.Shira(density=0.1))
    assert not any("experts" in name for name in ia.export(model).edits)
