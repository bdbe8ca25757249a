"""Bases in fewer bits: adapters over packed weights, QPaCA, refusals.

The law that needs no package is at the head: over a base that is packed in name only, every sparse method is what it is on
a plain one. What follows needs bitsandbytes (NF4) and torchao (int8) and is skipped without; ``make quantised`` runs it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

import intarsia as ia
from intarsia import bases, chain, methods, pretrained, registry
from intarsia import model as models
from intarsia.bases import packing
from intarsia.forms import Pair, Sparse
from intarsia.train.config import make_config
from intarsia.train.trainer import train
from small import SITES, adapted, layer_of, small_net, some_input, some_loss, state_of, stir, trained
from toy import save_toy

# Of every method that is no matter of attention and MLP blocks, its first small settings.
REGISTERED = [cls(**cls.small[0]) for cls in registry.methods().values() if "linear" in cls.kinds]
REGISTERED = [method for method in REGISTERED if not method.roles_from()]
SPARSE = (
    *(method for method in REGISTERED if isinstance(method, Sparse)),
    ia.Paca(rank=3, alpha=6.0, parameterization="columns"),
    ia.Paca(rank=3, select="grad_norm"),
    ia.Shira(density=0.1),
    ia.Shira(density=0.1, scorer="snip"),
    ia.Shira(density=0.1, scorer="wanda"),
    ia.Shira(density=0.2, granularity="line", width=4),
    ia.Shira(density=0.2, granularity="tile", width=4),
    ia.Shira(density=0.2, granularity="row"),
    ia.Shira(density=0.2, granularity="diagonal"),
)
ALL = (*SPARSE, *(method for method in REGISTERED if not isinstance(method, Sparse)))


# ------------------------------------------------------------------ packed in name only
class Written(nn.Parameter):
    """A weight whose packing forgets nothing."""


class Identity(packing.Plain):
    in_place = False

    def holds(self, weight: Any) -> bool:
        return isinstance(weight, Written)

    def name(self, weight: Any) -> str:
        return "identity"

    def read(self, weight: Any, dtype: torch.dtype) -> Tensor:
        numbers: Tensor = weight.detach().clone()
        return numbers.to(dtype)


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACKINGS", (Identity(), *packing.PACKINGS))


def packed_in_name(net: nn.Module) -> nn.Module:
    for name in SITES:
        layer = layer_of(net, name)
        layer.weight = Written(layer.weight.detach().clone(), requires_grad=False)
    return net


def stepped(net: nn.Module, method: ia.Method, dtype: torch.dtype, steps: int = 3) -> list[Tensor]:
    """Outputs, gradients and values of some AdamW steps: all that training sees."""
    x = some_input(dtype)
    ia.attach(net, method, data=[x], loss=some_loss)
    optimizer = torch.optim.AdamW(trained(net), lr=1e-2, weight_decay=0.1)
    seen: list[Any] = []
    for _ in range(steps):
        given = x.clone().requires_grad_()
        y = net(given)
        (y.double() - 0.3).square().mean().backward()
        seen += [y.detach(), given.grad, *(p.grad.clone() for p in trained(net) if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
        seen += [p.detach().clone() for p in trained(net)]
    return seen


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_with_quantisation_replaced_by_identity_training_is_the_plain_one_to_the_bit(
    method: ia.Method, dtype: torch.dtype
) -> None:
    plain, packed = stepped(small_net(dtype), method, dtype), stepped(packed_in_name(small_net(dtype)), method, dtype)
    assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))


@pytest.mark.usefixtures("identity")
def test_identity_under_autocast_too() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plain = stepped(small_net(), ia.Paca(rank=3), torch.float32)
        packed = stepped(packed_in_name(small_net()), ia.Paca(rank=3), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))


@contextlib.contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


@pytest.mark.usefixtures("identity")
def test_no_dense_matrix_is_kept_for_backward() -> None:
    net = nn.Sequential(nn.Linear(64, 48, bias=False))
    layer_of(net, "0").weight = Written(layer_of(net, "0").weight.detach())
    ia.attach(net, ia.Paca(rank=3), targets="0")
    x = torch.randn(10, 64, requires_grad=True)
    with kept_for_backward() as kept:
        net(x)
    values = state_of(net, "0").values
    fresh = [t for t in kept if t.data_ptr() != values.data_ptr()]
    assert sorted(t.numel() for t in fresh) == [3, 10 * 3]  # the column numbers and x[:, I]


@pytest.mark.usefixtures("identity")
def test_values_written_between_forward_and_backward_are_noticed() -> None:
    net = packed_in_name(small_net())
    ia.attach(net, ia.Paca(rank=3))
    loss = some_loss(net, some_input())
    with torch.no_grad():
        for parameter in trained(net):
            parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("identity")
def test_a_deck_refuses_what_cannot_be_set_in(tmp_path: Path) -> None:
    net = packed_in_name(small_net())
    ia.attach(net, ia.Paca(rank=3))
    ia.save(net, tmp_path / "one")
    ia.detach(net, "default")
    before = models.digest(net)
    with pytest.raises(
        ia.IntarsiaError, match=r"'one' cannot be set in: up.weight and 2 more weights are stored in identity"
    ):
        ia.Deck(net).add(tmp_path / "one")
    assert models.digest(net) == before
    assert ia.load(net, tmp_path / "one") == "one"  # what the error says to do instead


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("place", ["parallel", "after", "before"])
def test_a_deck_takes_what_acts_beside_a_packed_weight(place: str) -> None:
    """No entry of the weight is written; before the layer its numbers are read once."""
    net, x = packed_in_name(small_net()), some_input()
    ia.attach(net, methods.Bottleneck(3, place))
    stir(net)
    adapter, y = ia.export(net, called="one"), net(x).detach()
    ia.detach(net, "default")
    base, before = net(x), models.digest(net)
    deck = ia.Deck(net)
    deck.add(adapter)
    deck.use("one")
    torch.testing.assert_close(net(x), y)
    deck.off()
    assert torch.equal(net(x), base)
    assert deck.verify() == before


# ------------------------------------------------------------------ nf4 and int8
def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed; make quantised")


NF4 = pytest.param("nf4", marks=needs("bitsandbytes"))
INT8 = pytest.param("int8", marks=needs("torchao"))
both = pytest.mark.parametrize("load_in", [NF4, INT8])


def packed_net(load_in: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = small_net(dtype)
    bases.quantise(net, load_in)
    return net


def numbers(net: nn.Module, name: str) -> Tensor:
    """What a packed weight stands for."""
    weight = layer_of(net, name).weight
    return bases.packing_of(weight).read(weight, torch.float32)


# QLoRA, arXiv:2305.14314, appendix E
NORMAL_FLOAT = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@needs("bitsandbytes")
def test_nf4_is_the_nearest_normal_float_in_blocks_of_64() -> None:
    net = nn.Sequential(nn.Linear(64, 32, bias=False))
    blocks = layer_of(net, "0").weight.detach().reshape(-1, 64).clone()
    bases.quantise(net, "nf4")
    found = numbers(net, "0").reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    level = NORMAL_FLOAT[(blocks[..., None] / scale[..., None] - NORMAL_FLOAT).abs().argmin(-1)]
    # Rounding the scales to 8-bit codes moves each by a few percent at most; the levels stay.
    torch.testing.assert_close(found, level * scale, rtol=0.05, atol=1e-6)


@needs("torchao")
def test_int8_is_the_nearest_of_256_steps_of_each_row() -> None:
    net = nn.Sequential(nn.Linear(64, 32, bias=False))
    W = layer_of(net, "0").weight.detach().clone()
    bases.quantise(net, "int8")
    step = W.abs().amax(1, keepdim=True) / 127.5
    off = (numbers(net, "0") - W).abs() / step
    assert off.max() < 0.5 + 1e-3


@both
@pytest.mark.parametrize("method", ALL, ids=str)
def test_training_starts_at_the_base_and_leaves_it(load_in: str, method: ia.Method) -> None:
    net, x = packed_net(load_in), some_input()
    start, digest = net(x).detach(), models.digest(net)
    ia.attach(net, method, data=[x], loss=some_loss, original=small_net())
    if method.starts_as_identity:
        torch.testing.assert_close(net(x), start, rtol=1e-5, atol=1e-6)  # torchao multiplies by the scale afterwards
    optimizer = torch.optim.AdamW(trained(net), lr=1e-2)
    first = some_loss(net, x).item()
    for _ in range(5):
        some_loss(net, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert some_loss(net, x).item() < first
    assert models.digest(net) == digest
    ia.detach(net, "default")
    assert torch.equal(net(x), start)


@both
@pytest.mark.parametrize("method", [method for method in SPARSE if not isinstance(method, Pair)], ids=str)
def test_what_is_not_selected_stays_what_the_codes_stand_for(load_in: str, method: ia.Method) -> None:
    net = packed_net(load_in)
    before = {name: numbers(net, name) for name in SITES}
    ia.attach(net, method, data=[some_input()], loss=some_loss)
    stir(net)
    for name in SITES:
        layer, state = layer_of(net, name), state_of(net, name)
        width = layer.in_features
        # The rows of the identity through the layer are its weight, as it computes with it.
        W = (layer(torch.eye(width)) - layer.bias).T.detach()
        free = state.granularity().scatter(state.shape, state.index, torch.ones_like(state.values)) == 0
        assert torch.equal(numbers(net, name), before[name])
        torch.testing.assert_close(W[free], before[name][free], rtol=1e-6, atol=1e-7)
        folded = chain.Chain(layer, [state]).weights(torch.float32)[0]
        assert torch.equal(folded[free], before[name][free])
        assert (folded[~free] != before[name][~free]).any()


@both
@pytest.mark.parametrize("method", ALL, ids=str)
def test_outputs_and_gradients_are_those_of_the_folded_weight(load_in: str, method: ia.Method) -> None:
    net, dense = packed_net(load_in), packed_net(load_in)
    bases.dequantise(dense)
    original = small_net(torch.float64)
    for model in (net, dense):
        model.double()  # the codes stay what they are
        ia.attach(model, method, data=[some_input(torch.float64)], loss=some_loss, original=original)
    with torch.no_grad():  # the same numbers in both: a decomposition in float32 is not quite the one in float64
        for name in SITES:
            for key, tensor in state_of(dense, name).tensors().items():
                tensor.copy_(state_of(net, name).tensors()[key])
    for model in (net, dense):
        stir(model)
    x = some_input(torch.float64)
    seen = []
    for model in (net, dense):
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        seen.append([model(x).detach(), given.grad, *(p.grad for p in trained(model))])
    for a, b in zip(*seen, strict=True):
        # The state is float32 over a packed base and float64 over the dense one; large entries leave their rounding in small ones.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6 * max(1.0, float(b.abs().max())), check_dtype=False)


@both
def test_kept_for_backward_are_codes_and_what_the_method_needs(load_in: str) -> None:
    net = nn.Sequential(nn.Linear(128, 96))
    bases.quantise(net, load_in)
    for method, most in ((ia.Paca(rank=3), 96 * 3), (ia.Lora(rank=2), 10 * 128)):
        ia.attach(net, method, targets="0", name=method.name)
        with kept_for_backward() as kept:
            net(torch.randn(10, 128, requires_grad=True))
        assert max(t.numel() for t in kept) <= most


@both
def test_an_adapter_belongs_to_the_packed_base(load_in: str, tmp_path: Path) -> None:
    net, x = packed_net(load_in), some_input()
    ia.attach(net, ia.Paca(rank=3))
    stir(net)
    y = net(x).detach()
    ia.save(net, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "adapter.json").read_text())["base"]["dtype"] == load_in
    again = packed_net(load_in)
    ia.load(again, tmp_path / "one")
    assert torch.equal(again(x), y)
    with pytest.raises(ia.IntarsiaError, match=f"made on {load_in}, this model is float32.*load_in='{load_in}'"):
        ia.load(small_net(), tmp_path / "one")
    plain = small_net()
    ia.load(plain, tmp_path / "one", any_base=True)
    assert not torch.equal(plain(x), y)  # the same change of another base


@both
def test_dequantised_it_can_be_set_in(load_in: str, tmp_path: Path) -> None:
    net, x = packed_net(load_in), some_input()
    ia.attach(net, ia.Shira(density=0.1))
    stir(net)
    y = net(x).detach()
    ia.save(net, tmp_path / "one")
    ia.detach(net, "default")
    with pytest.raises(ia.IntarsiaError, match=f"stored in {load_in}"):
        ia.Deck(net).add(tmp_path / "one")
    assert set(bases.dequantise(net)) == set(SITES)
    deck = ia.Deck(net)
    deck.add(tmp_path / "one", any_base=True)
    deck.use("one")
    assert torch.equal(net(x), y)


@both
def test_rows_and_stacks(load_in: str) -> None:
    net, x = packed_net(load_in), some_input()
    ia.attach(net, ia.Paca(rank=3), name="one")
    ia.attach(net, ia.Lora(rank=2), name="two")
    for name in ("one", "two"):
        ia.activate(net, name)
        stir(net, name, seed=len(name))
    alone: dict[tuple[str, ...], Tensor] = {}
    sets: tuple[tuple[str, ...], ...] = (("one",), ("two",), ())
    for active in sets:
        ia.activate(net, *active)
        alone[active] = net(x).detach()
    with ia.rows(net, ["two", None, "one", "two"]):
        y = net(x)
    for row, active in enumerate((sets[1], (), sets[0], sets[1])):
        torch.testing.assert_close(y[row], alone[active][row], rtol=1e-5, atol=1e-6)
    for order in (("one", "two"), ("two", "one")):  # over the base, and as a branch above another adapter
        ia.activate(net, *order)
        layer = layer_of(net, "up")
        W, b = chain.Chain(layer, [layer.adapters[n] for n in order]).weights(torch.float32)
        torch.testing.assert_close(layer(x), F.linear(x, W, b), rtol=1e-5, atol=1e-6)


@both
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing, torch 2.13
@pytest.mark.parametrize("method", [ia.Paca(rank=3), ia.Lora(rank=2)], ids=str)
def test_copies_compile_and_checkpointing(load_in: str, method: ia.Method) -> None:
    net = packed_net(load_in)
    ia.attach(net, method)
    stir(net)

    def run(f: Any) -> list[Tensor]:
        x = some_input().requires_grad_()
        for parameter in trained(net):
            parameter.grad = None
        y = f(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in trained(net))]

    expected = run(net)
    assert torch.equal(copy.deepcopy(net)(some_input()), expected[0])
    assert torch.equal(pickle.loads(pickle.dumps(net))(some_input()), expected[0])
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for f in (compiled, *(lambda x, r=r: checkpoint(net, x, use_reentrant=r) for r in (True, False))):
        for a, b in zip(run(f), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs("bitsandbytes")
def test_forward_passes_never_repack_an_adapted_nf4_base() -> None:
    from bitsandbytes.nn import Linear4bit

    net = nn.Sequential()
    net.add_module("up", Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32))
    net.to("cpu").eval()
    digest = models.digest(net)
    bits = layer_of(net, "up").weight.data.clone()
    ia.attach(net, ia.Paca(rank=3), targets="up")
    with torch.no_grad():
        net(torch.randn(2, 64))
        ia.activate(net)
        net(torch.randn(2, 64))
    ia.detach(net, "default")
    net(torch.randn(2, 64))
    assert torch.equal(layer_of(net, "up").weight.data, bits)
    assert models.digest(net) == digest
    layer_of(
        net, "up"
    ).weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes leaves it on CPUs with AVX512-BF16
    with pytest.raises(ia.IntarsiaError, match=r"up: bitsandbytes has rearranged its weight"):
        ia.attach(net, ia.Paca(rank=3), targets="up")


@needs("bitsandbytes")
def test_the_int8_of_bitsandbytes() -> None:
    from bitsandbytes.nn import Linear8bitLt

    net = nn.Sequential()
    net.add_module("up", Linear8bitLt(64, 32, has_fp16_weights=False))
    W = layer_of(net, "up").weight.detach().clone()
    with pytest.raises(ia.IntarsiaError, match=r"quantised when the model is moved"):
        ia.attach(net, ia.Paca(rank=3), targets="up")
    net.to("cpu")
    digest = models.digest(net)
    with torch.no_grad():
        net(torch.randn(2, 64))  # moves the scales
    assert models.digest(net) == digest
    assert (numbers(net, "up") - W).abs().max() <= 0.6 * W.abs().max() / 127
    ia.attach(net, ia.Paca(rank=3), targets="up")
    stir(net)
    folded, b = chain.Chain(layer_of(net, "up"), [state_of(net, "up")]).weights(torch.float32)
    x = torch.randn(2, 64)
    torch.testing.assert_close(net(x), F.linear(x, folded, b))


# ------------------------------------------------------------------ asking for it
@both
def test_load_in_and_a_run(load_in: str, tmp_path: Path) -> None:
    folder = save_toy(tmp_path / "toy")
    found = pretrained.load(folder, load_in=load_in)
    head, layer = found.model.lm_head, found.model.model.layers[0].self_attn.q_proj
    assert bases.packing_of(layer.weight).name(layer.weight) == load_in
    assert bases.packing_of(head.weight).in_place
    rows = [{"prompt": f"say {i}", "completion": f"the {i}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = {
        "model": str(folder), "data": str(tmp_path / "rows.jsonl"), "method": {"name": "paca", "rank": 2},
        "load_in": load_in, "output": str(tmp_path / "out"), "train": {"steps": 3, "batch_size": 4},
    }  # fmt: skip
    train(make_config(run))
    name = ia.load(found.model, tmp_path / "out")  # by digest the very same base
    assert models.active_names(found.model) == [name]
    with pytest.raises(ia.IntarsiaError, match=f"load_in='{load_in}'"):
        ia.load(pretrained.load(folder).model, tmp_path / "out")


@needs("bitsandbytes")
def test_a_model_that_transformers_quantised(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = save_toy(tmp_path / "toy")
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    ia.attach(model, ia.Paca(rank=2))
    out = model(input_ids=torch.arange(12).view(1, -1), labels=torch.arange(12).view(1, -1))
    out.loss.backward()
    assert all(p.grad is not None for p in trained(model))
    ia.save(model, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "adapter.json").read_text())["base"]["dtype"] == "nf4"


@needs("bitsandbytes")
def test_supports_do_not_move_over_codes(tmp_path: Path) -> None:
    folder = save_toy(tmp_path / "toy")
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"say {i}", "completion": "no"}) for i in range(8))
    )
    run = {
        "model": str(folder), "data": str(tmp_path / "rows.jsonl"), "load_in": "nf4", "output": str(tmp_path / "out"),
        "method": {"name": "shira", "density": 0.1, "schedule": "drop-and-grow", "every": 2},
        "train": {"steps": 6, "batch_size": 4},
    }  # fmt: skip
    with pytest.raises(ia.IntarsiaError, match="stored in nf4, and a support only moves over a plain base"):
        train(make_config(run))
    net = packed_net("nf4")
    with pytest.raises(ia.IntarsiaError, match="up: its weight is stored in nf4; a lottery trains the weights"):
        ia.lottery(net, ia.Shira(density=0.1, scorer="movement", budget="model"), lambda model: None)
    ia.attach(net, ia.Shira(density=0.1))
    with pytest.raises(ia.IntarsiaError, match="stored in nf4; a support only moves over a plain base"):
        ia.regrow(net, "default", None, data=[some_input()], loss=some_loss)


def test_the_page_runs(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parent.parent / "docs" / "quantised.md"
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed; make quantised")
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(0, 320, (2, 12))
    names: dict[str, Any] = {"model": tiny_llama(), "batch": {"input_ids": ids, "labels": ids}}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ia.IntarsiaError, match=r"load_in='nf8': expected nf4 or int8; did you mean"):
        bases.quantise(small_net(), "nf8")
    with pytest.raises(ia.IntarsiaError, match="has no quantised weight"):
        bases.dequantise(small_net())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ia.IntarsiaError, match=r"needs the package torchao.*pip install 'intarsia\[int8\]'"):
        bases.quantise(small_net(), "int8")


@both
def test_quantise_checks_before_it_changes(load_in: str) -> None:
    net = small_net()
    digest = models.digest(net)
    with pytest.raises(ia.IntarsiaError, match="keep='upp' matches none of the 3 linear layers; did you mean 'up'"):
        bases.quantise(net, load_in, keep=("upp",))
    with pytest.raises(ia.IntarsiaError, match="the model has adapters"):
        bases.quantise(adapted(ia.Paca(rank=3)), load_in)
    assert models.digest(net) == digest
    assert set(bases.quantise(net, load_in, keep=("again",))) == {"up", "down"}
    assert bases.packing_of(layer_of(net, "again").weight).in_place
    with pytest.raises(ia.IntarsiaError, match=f"up: its weight is stored in {load_in} already"):
        bases.quantise(net, load_in)
