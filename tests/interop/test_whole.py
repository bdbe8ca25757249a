"""Weight patches, whole models and GGUF files hold the very bits that a deck sets in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import intarsia as ia
from intarsia import interop, pretrained
from intarsia.edits import Edit, elements
from intarsia.interop.patch import _checksum
from intarsia.model import base_of
from toy import save_toy, toy_model, toy_tokenizer, write_gguf

METHODS: dict[str, ia.Method] = {
    "elements": ia.Shira(density=0.05),
    "rows": ia.Shira(density=0.1, granularity="row"),
    "columns": ia.Paca(rank=2),
    "low rank": ia.Lora(rank=2),
    "rescaled": ia.Dora(ia.Lora(rank=2)),
}
SPARSE = ("elements", "rows", "columns")


def trained(model: nn.Module, method: ia.Method, size: float = 0.05, **given: Any) -> ia.Adapter:
    """An adapter of that method with random changes; the model is its base again."""
    ia.attach(model, method, **given)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    ia.sync(model)
    adapter = ia.export(model, called="ours")
    ia.detach(model, "default")
    return adapter


def in_a_deck(model: nn.Module, adapter: ia.Adapter) -> dict[str, Tensor]:
    """Copies of all weights with the adapter set in."""
    deck = ia.Deck(model)
    deck.add(adapter)
    deck.use("ours")
    found = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    deck.off()
    return found


def same_bits(found: Any, expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("base") / "base", torch.bfloat16)


@pytest.fixture(scope="module")
def base(folder: Path) -> pretrained.Pretrained:
    """In bfloat16; every test leaves it as it found it."""
    return pretrained.load(folder)


def gpt2(folder: Path) -> pretrained.Pretrained:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 264, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=257, eos_token_id=257)).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return pretrained.load(folder)


# ------------------------------------------------------------------ whole models
@pytest.mark.parametrize("kind", METHODS)
def test_a_whole_model_has_the_bits_of_the_deck(kind, base, tmp_path):
    adapter = trained(base.model, METHODS[kind])
    before = ia.digest(base.model)
    written = interop.write_full_model(adapter, base, tmp_path / "whole")
    assert ia.digest(base.model) == before
    whole = pretrained.load(tmp_path / "whole")
    same_bits(whole.model.state_dict(), in_a_deck(base.model, adapter))
    assert whole.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert whole.tokenizer.chat_template == base.tokenizer.chat_template
    assert adapter.digest in (tmp_path / "whole" / "README.md").read_text()
    assert written.bytes == sum(file.stat().st_size for file in (tmp_path / "whole").iterdir())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_rounded_to_once_and_said_in_the_config(dtype, base, tmp_path):
    adapter = trained(base.model, METHODS["elements"])
    interop.write_full_model(adapter, base, tmp_path / "whole", dtype=dtype)
    found = pretrained.load(tmp_path / "whole").model.state_dict()
    for name, weight in base.model.state_dict().items():
        exact = weight.float()
        if name in adapter.edits:
            exact = adapter.edits[name].fold(exact)
        assert torch.equal(found[name], exact.to(getattr(torch, dtype))), name


def test_weights_that_are_tied_or_stored_transposed(tmp_path):
    base = gpt2(tmp_path / "base")
    adapter = trained(base.model, ia.Lora(rank=2), targets=["wte", "c_attn"])
    interop.write_full_model(adapter, base, tmp_path / "whole", dtype="bfloat16")
    whole = pretrained.load(tmp_path / "whole").model
    assert whole.lm_head.weight is whole.transformer.wte.weight
    expected = {k: t.to(torch.bfloat16) for k, t in in_a_deck(base.model, adapter).items()}
    same_bits(whole.state_dict(), expected)


def test_a_whole_model_that_cannot_be_written(base, tmp_path):
    adapter = trained(base.model, METHODS["elements"], size=1e6)
    with pytest.raises(ia.IntarsiaError, match="too large for float16; take bfloat16 or float32"):
        interop.write_full_model(adapter, base, tmp_path / "whole", dtype="float16")
    with pytest.raises(ia.IntarsiaError, match="dtype 'float61' is none .* did you mean 'float16'"):
        interop.write_full_model(adapter, base, tmp_path / "whole", dtype="float61")
    assert list(tmp_path.iterdir()) == []
    other = pretrained.load(save_toy(tmp_path / "other"))
    with pytest.raises(ia.IntarsiaError, match="belongs to another base"):
        interop.write_full_model(adapter, other, tmp_path / "whole")
    interop.write_full_model(adapter, base, tmp_path / "whole")
    (tmp_path / "whole" / "leftover.txt").write_text("of the old one")
    with pytest.raises(ia.IntarsiaError, match="exists already"):
        interop.write_full_model(adapter, base, tmp_path / "whole")
    interop.write_full_model(adapter, base, tmp_path / "whole", overwrite=True)
    assert not (tmp_path / "whole" / "leftover.txt").exists()


# ------------------------------------------------------------------ weight patches
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("where", ["model", "state dict"])
def test_a_patched_base_has_the_bits_of_the_deck(kind, where, base, folder, tmp_path):
    adapter = trained(base.model, METHODS[kind])
    file = tmp_path / "one.safetensors"
    if kind not in SPARSE:
        with pytest.raises(
            ia.IntarsiaError, match=r"(?s)a weight patch is for sparse changes:.*edits change every entry.*--dense"
        ):
            interop.write_patch(adapter, base.model, file)
    interop.write_patch(adapter, base.model, file, dense=kind not in SPARSE)
    expected = in_a_deck(base.model, adapter)
    model = pretrained.load(folder).model
    target = model if where == "model" else {name: weight.clone() for name, weight in model.state_dict().items()}
    digest = interop.apply_patch(target, file)
    same_bits(model.state_dict() if where == "model" else target, expected)
    same_bits(base.model.state_dict(), toy_state(folder))
    with safe_open(file, "pt") as content:
        assert content.metadata()["new_digest"] == digest
        assert content.metadata()["base_digest"] == ia.digest(base.model)


def toy_state(folder: Path) -> dict[str, Tensor]:
    return dict(pretrained.load(folder).model.state_dict())


def test_what_a_patch_holds(base, tmp_path):
    """Absolute values at ascending int32 positions, and only where bits change: most steps are too small for bfloat16."""
    adapter = trained(base.model, METHODS["elements"], size=1e-5)
    written = interop.write_patch(adapter, base.model, tmp_path / "one.safetensors")
    tensors, expected = load_file(tmp_path / "one.safetensors"), in_a_deck(base.model, adapter)
    count = 0
    for weight in adapter.edits:
        index, values = tensors[f"{weight}.indices"], tensors[f"{weight}.values"]
        assert (index.dtype, values.dtype) == (torch.int32, torch.bfloat16)
        assert torch.equal(expected[weight].flatten()[index.long()], values)
        changed = (expected[weight] != base.model.state_dict()[weight]).flatten().nonzero().squeeze(1)
        assert torch.equal(index.long(), changed)
        count += len(changed)
    assert count == written.facts["changed"] < adapter.touched
    with safe_open(tmp_path / "one.safetensors", "pt") as content:
        shapes = json.loads(content.metadata()["full_shapes"])
        assert content.metadata()["values"] == "absolute"
    assert shapes == {weight: list(expected[weight].shape) for weight in adapter.edits}


def test_positions_are_those_of_the_stored_weight(tmp_path):
    """A Conv1D stores (in, out), and an engine that knows no matrices of ours writes there."""
    base = gpt2(tmp_path / "base")
    name = "transformer.h.0.attn.c_attn.weight"
    edits: dict[str, Edit] = {name: elements((48, 16), torch.tensor([16 * 5 + 2]), torch.tensor([1.0]))}
    made, layouts = base_of(base.model, edits)
    interop.write_patch(ia.Adapter("ours", edits, made, {}, layouts), base.model, tmp_path / "one.safetensors")
    assert load_file(tmp_path / "one.safetensors")[f"{name}.indices"].tolist() == [2 * 48 + 5]
    before = base.model.state_dict()[name][2, 5].item()
    interop.apply_patch(base.model, tmp_path / "one.safetensors")
    assert base.model.state_dict()[name][2, 5].item() == pytest.approx(before + 1)


@pytest.fixture(scope="module")
def patch(base: pretrained.Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("patch") / "one.safetensors"
    interop.write_patch(trained(base.model, METHODS["elements"]), base.model, file)
    return file


WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def _forged(change: Callable[[dict[str, Tensor], dict[str, str]], Any], honest: bool = True) -> Callable[[Path], None]:
    """A file that somebody changed, with a checksum that fits again or not."""

    def forge(file: Path) -> None:
        with safe_open(file, "pt") as content:
            facts = {k: v for k, v in content.metadata().items() if k != "checksum"}
            checksum = content.metadata()["checksum"]
        tensors = load_file(file)
        change(tensors, facts)
        save_file(tensors, file, facts | {"checksum": _checksum(facts, tensors) if honest else checksum})

    return forge


def _shifted(tensors: dict[str, Tensor], _: Any) -> None:
    tensors[f"{WEIGHT}.indices"][-1] = 32 * 32


def _unsorted(tensors: dict[str, Tensor], _: Any) -> None:
    tensors[f"{WEIGHT}.indices"] = tensors[f"{WEIGHT}.indices"].flip(0).contiguous()


def _infinite(tensors: dict[str, Tensor], _: Any) -> None:
    tensors[f"{WEIGHT}.values"][0] = float("inf")


def _other_value(tensors: dict[str, Tensor], _: Any) -> None:
    tensors[f"{WEIGHT}.values"][0] += 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-5]), "cut off or not a safetensors file"),
        (lambda f: f.write_bytes(b"hello"), "is no weight patch"),
        (lambda f: f.unlink(), "cannot be read"),
        (lambda f: save_file(load_file(f), f), "its metadata say format None"),
        (_forged(_other_value, honest=False), "does not match its own checksum"),
        (_forged(lambda t, m: m.update(full_shapes="{}")), "unexpected tensor"),
        (_forged(lambda t, m: m.update(full_shapes="[")), "its metadata are damaged"),
        (_forged(lambda t, m: t.pop(f"{WEIGHT}.values")), f"missing tensor {WEIGHT}.values"),
        (_forged(_shifted), "not ascending positions in 0..1023"),
        (_forged(_unsorted), "not ascending positions"),
        (_forged(_infinite), "expected one row of finite numbers"),
        (_forged(lambda t, m: t.update({f"{WEIGHT}.indices": t[f"{WEIGHT}.indices"].long()})), "of int32"),
        (_forged(lambda t, m: t.pop(f"{WEIGHT}.indices")), r"values; \(32, 32\) has 1024"),
        (_forged(lambda t, m: m.update(base_digest="0" * 64)), "belongs to another base"),
        (_forged(_other_value), "the patched weights have digest .* the patch is broken"),
    ],
)
def test_a_patch_that_is_not_whole_leaves_the_weights_alone(damage, said, patch, base, tmp_path):
    file = Path(shutil.copy(patch, tmp_path / "bad.safetensors"))
    damage(file)
    before = ia.digest(base.model)
    with pytest.raises(ia.IntarsiaError, match=said):
        interop.apply_patch(base.model, file)
    assert ia.digest(base.model) == before


def test_a_patch_meets_other_weights(patch, folder, base):
    other = toy_model(seed=1).to(torch.bfloat16)
    before = ia.digest(other)
    with pytest.raises(ia.IntarsiaError, match="the patch belongs to another base"):
        interop.apply_patch(other, patch)
    with pytest.raises(
        ia.IntarsiaError, match=r"the patch is for \(32, 32\) torch.bfloat16, here it is \(32, 32\) torch.float32"
    ):
        interop.apply_patch(toy_model(), patch)
    with pytest.raises(ia.IntarsiaError, match="there is no such weight"):
        interop.apply_patch({"q_proj.weight": torch.zeros(2)}, patch)
    assert ia.digest(other) == before
    assert interop.apply_patch(other, patch, any_base=True) == ia.digest(other) != before
    model = pretrained.load(folder).model
    ia.attach(model, ia.Lora(rank=1))
    with pytest.raises(ia.IntarsiaError, match="default is active on this model"):
        interop.apply_patch(model, patch)


def test_where_a_patch_can_be_written(patch, base, tmp_path):
    adapter = trained(base.model, METHODS["elements"])
    with pytest.raises(ia.IntarsiaError, match=r"does not end in .safetensors; name it one.safetensors"):
        interop.write_patch(adapter, base.model, tmp_path / "one")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ia.IntarsiaError, match="is a folder, a weight patch is none"):
        interop.write_patch(adapter, base.model, tmp_path / "folder.safetensors", overwrite=True)
    file = Path(shutil.copy(patch, tmp_path / "one.safetensors"))
    with pytest.raises(ia.IntarsiaError, match="exists already"):
        interop.write_patch(adapter, base.model, file)
    file.write_text("old")
    interop.write_patch(adapter, base.model, file, overwrite=True)
    assert set(interop.read_patch(file).weights) == set(adapter.edits)


# ------------------------------------------------------------------ GGUF
@pytest.fixture(scope="module")
def toy_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "toy.gguf", toy_model())


@pytest.fixture
def from_gguf(toy_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pretrained.Pretrained:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))
    return pretrained.load(toy_gguf)


@pytest.mark.parametrize("kind", ["elements", "rescaled"])
def test_a_merged_gguf_read_again_has_the_bits_of_the_deck(kind, from_gguf, toy_gguf, tmp_path):
    adapter = trained(from_gguf.model, METHODS[kind])
    written = interop.write_gguf(adapter, from_gguf, tmp_path / "merged.gguf")
    assert written.facts["dtype"] == "bfloat16"
    again = pretrained.load(tmp_path / "merged.gguf")
    same_bits(again.model.state_dict(), in_a_deck(from_gguf.model, adapter))
    assert again.tokenizer.get_vocab() == from_gguf.tokenizer.get_vocab()
    ids = torch.arange(20).view(2, 10)
    whole = interop.write_full_model(adapter, from_gguf, tmp_path / "whole").path
    assert torch.equal(again.model(ids).logits, pretrained.load(whole).model(ids).logits)
    old, new = gguf.GGUFReader(toy_gguf), gguf.GGUFReader(tmp_path / "merged.gguf")
    kept = {n: f.contents() for n, f in old.fields.items() if not n.startswith("GGUF.") and n != "general.file_type"}
    assert {n: new.fields[n].contents() for n in kept} == kept
    assert new.fields["general.file_type"].contents() == 32
    assert new.fields["intarsia.adapter"].contents() == adapter.digest
    assert [t.name for t in new.tensors] == [t.name for t in old.tensors]


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("float16", "F16")])
def test_a_merged_gguf_in_other_dtypes(dtype, kind, from_gguf, tmp_path):
    adapter = trained(from_gguf.model, METHODS["elements"])
    interop.write_gguf(adapter, from_gguf, tmp_path / "merged.gguf", dtype=dtype)
    for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors:
        assert tensor.tensor_type.name == (kind if len(tensor.shape) > 1 else "F32")
        assert np.isfinite(np.asarray(tensor.data, dtype=np.float32)).all()
    again = pretrained.load(tmp_path / "merged.gguf", dtype="float32").model.state_dict()
    for name, edit in adapter.edits.items():
        exact = edit.fold(from_gguf.model.state_dict()[name].float()).to(getattr(torch, dtype))
        assert torch.equal(again[name], exact.to(torch.bfloat16).float()), name


def test_a_gguf_needs_a_gguf_of_its_own_base(base, from_gguf, tmp_path):
    adapter = trained(base.model, METHODS["elements"])
    with pytest.raises(ia.IntarsiaError, match=r"is no GGUF file, .* name the base's .gguf file"):
        interop.write_gguf(adapter, base, tmp_path / "merged.gguf")
    stranger = write_gguf(tmp_path / "two.gguf", _deeper())
    borrowed = pretrained.Pretrained(from_gguf.model, from_gguf.tokenizer, str(stranger), from_gguf.folder)
    with pytest.raises(ia.IntarsiaError, match=r"two.gguf is not the file that this model came from:\n  blk.2"):
        interop.write_gguf(trained(from_gguf.model, METHODS["elements"]), borrowed, tmp_path / "merged.gguf")
    qwen = write_gguf(tmp_path / "qwen.gguf", toy_model(), "qwen2")
    borrowed = pretrained.Pretrained(from_gguf.model, from_gguf.tokenizer, str(qwen), from_gguf.folder)
    with pytest.raises(ia.IntarsiaError, match=r"has the architecture 'qwen2'; merged files are written for llama"):
        interop.write_gguf(trained(from_gguf.model, METHODS["elements"]), borrowed, tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()


def _deeper() -> Any:
    from transformers import LlamaForCausalLM

    config = toy_model().config
    config.num_hidden_layers = 3
    return LlamaForCausalLM(config)


def test_the_gguf_file_of_a_name(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert pretrained.gguf_file(tmp_path / "x.gguf") == tmp_path / "x.gguf"
    assert pretrained.gguf_file(tmp_path) is None
    assert pretrained.gguf_file("organisation/name") is None
    monkeypatch.setitem(pretrained.ALIASES, "toy", pretrained.Alias("no_such_package", "", "organisation/toy"))
    assert pretrained.gguf_file("toy") is None


def test_a_head_that_is_tied_is_one_tensor_in_a_merged_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))
    tied = toy_model(tie_word_embeddings=True)
    base = pretrained.load(write_gguf(tmp_path / "tied.gguf", tied))
    adapter = trained(base.model, ia.Lora(rank=2), targets=["embed_tokens", "k_proj"])
    interop.write_gguf(adapter, base, tmp_path / "merged.gguf")
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    same_bits(pretrained.load(tmp_path / "merged.gguf").model.state_dict(), in_a_deck(base.model, adapter))
