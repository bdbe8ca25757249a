"""The bridge to PEFT: the statements of PEFT's own test-suite, and the three that it lacks, over methods of several forms."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

import intarsia as ia
from intarsia.interop.bridge import IntarsiaConfig, IntarsiaModel, LayerAdapters

# Of PEFT's own, with this version of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CHECKPOINTING = "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"

METHODS: dict[str, dict[str, Any]] = {
    "shira": {"name": "shira", "density": 0.1},
    "paca": {"name": "paca", "rank": 2},
    "lora": {"name": "lora", "rank": 2},
    "dora": {"name": "dora", "inner": {"name": "lora", "rank": 2}},
    "s2ft": {"name": "s2ft", "o": 0.5, "down": 0.2},
}
SNIP = {"name": "shira", "density": 0.1, "scorer": "snip"}
TOKENS = torch.arange(24).reshape(3, 8) % 60
BATCH = {"input_ids": TOKENS, "labels": TOKENS}
SEEN = {"input_ids": TOKENS}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> dict[str, Any]:
    return METHODS[request.param]


@pytest.fixture
def llama(tiny_llama: Any) -> Any:
    """A model that tiny_llama() makes again."""
    return tiny_llama()


def config(method: dict[str, Any], **given: Any) -> IntarsiaConfig:
    return IntarsiaConfig(method=method, task_type="CAUSAL_LM", **given)


def bridged(base: nn.Module, method: dict[str, Any], **given: Any) -> Any:
    return peft.get_peft_model(base, config(method, **given))


def logits(model: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(**SEEN, **given).logits
    return y


def learn(model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()


def two(base: nn.Module, method: dict[str, Any]) -> Any:
    """Two trained adapters, the first active."""
    model = bridged(base, method, seed=1)
    learn(model)
    model.add_adapter("other", config(method, seed=2))
    model.set_adapter("other")
    learn(model)
    model.set_adapter("default")
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def names_with(model: nn.Module, word: str) -> list[str]:
    return [name for name, _ in model.named_modules() if word in name.split(".")]


# ------------------------------------------------------------------ what it is
def test_it_is_a_peft_model_and_starts_as_the_base(llama: Any, method: dict[str, Any]) -> None:
    before = logits(llama)
    model = bridged(llama, method)
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model.base_model, IntarsiaModel)
    assert torch.equal(logits(model), before) or torch.allclose(logits(model), before, atol=1e-6)
    status = model.get_model_status()
    assert status.peft_types == {"default": "INTARSIA"}
    assert status.requires_grad == {"default": True}
    assert 0 < model.get_nb_trainable_parameters()[0] < model.get_nb_trainable_parameters()[1]


def test_it_is_what_attach_makes(llama: Any, tiny_llama: Any) -> None:
    model = bridged(llama, METHODS["shira"], seed=3)
    other = tiny_llama()
    ia.attach(other, ia.Shira(density=0.1), seed=3)
    learn(model)
    learn(other)
    assert torch.equal(logits(model), logits(other))


def test_only_the_adapter_trains_and_all_of_it(llama: Any, method: dict[str, Any]) -> None:
    base = bits(llama)
    model = bridged(llama, method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model, 3)
    for name, parameter in model.named_parameters():
        if "adapters." in name:
            assert not torch.equal(parameter, before[name]), name
    assert same(get_base_model_state_dict(model), base)


# ------------------------------------------------------------------ off, on, merged
def test_disabling_gives_the_base_and_leaving_gives_back_what_was(llama: Any, method: dict[str, Any]) -> None:
    before = logits(llama)
    model = two(llama, method)
    trained = logits(model)
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    assert model.get_model_status().requires_grad == {"default": True, "other": False}
    model.base_model.set_requires_grad("default", False)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), trained)
    assert model.get_model_status().requires_grad == {"default": False, "other": False}
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert model.get_model_status().merged_adapters == ["default"]


def test_merged_and_unmerged_agree_and_unmerging_gives_back_the_bits(llama: Any, method: dict[str, Any]) -> None:
    base = bits(llama)
    model = two(llama.to(torch.bfloat16), method)
    trained = logits(model)
    for _ in range(3):
        model.merge_adapter()
        assert torch.allclose(logits(model), trained, atol=0.05)
        model.unmerge_adapter()
        assert torch.equal(logits(model), trained)
    with model.disable_adapter():
        now = get_base_model_state_dict(model)
        assert all(torch.equal(now[name], tensor.to(torch.bfloat16)) for name, tensor in base.items())


def test_merging_one_by_one_is_merging_both_and_again_changes_nothing(llama: Any, method: dict[str, Any]) -> None:
    model = two(llama, method)
    model.merge_adapter(["default", "other"])
    both = logits(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter(["default", "other"])
    assert torch.equal(logits(model), both)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert torch.equal(logits(model), both)


def test_a_merge_with_numbers_that_are_not_finite_touches_nothing(llama: Any, method: dict[str, Any]) -> None:
    base = bits(llama)
    model = bridged(llama, method)
    with torch.no_grad():
        list(model.base_model._containers())[-1]["default"].get_parameter(
            next(n for n, _ in model.base_model._containers()[-1]["default"].named_parameters())
        ).fill_(torch.nan)
    with pytest.raises(ia.IntarsiaError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == []
    with model.disable_adapter():
        assert same(get_base_model_state_dict(model), base)


def test_unload_gives_back_the_very_base(llama: Any, method: dict[str, Any]) -> None:
    base, classes = bits(llama), [type(m) for m in llama.modules()]
    flags = [p.requires_grad for p in llama.parameters()]
    model = two(llama, method)
    model.merge_adapter(["other"])
    unloaded = model.unload()
    assert unloaded is llama
    assert same(bits(unloaded), base)
    assert [type(m) for m in unloaded.modules()] == classes
    assert [p.requires_grad for p in unloaded.parameters()] == flags
    assert not any(m._load_state_dict_post_hooks or m._state_dict_hooks for m in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")


def test_merge_and_unload_computes_as_the_adapter_did(llama: Any, method: dict[str, Any]) -> None:
    model = two(llama, method)
    trained = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, LayerAdapters) for m in merged.modules())
    assert torch.allclose(logits(merged), trained, atol=1e-5)


def test_what_acts_beside_the_layer_is_not_merged(llama: Any) -> None:
    model = bridged(llama, {"name": "bottleneck", "width": 4})
    learn(model)
    trained, before = logits(model), bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ia.IntarsiaError, match="default cannot be merged: it is computed beside the layer"):
            merge()
    assert same(bits(model), before)
    assert torch.equal(logits(model), trained)


def test_while_merged_the_base_is_not_taken_for_another(llama: Any) -> None:
    model = two(llama, METHODS["lora"])
    model.merge_adapter()
    with pytest.raises(
        ia.IntarsiaError, match=r"default is set into this model by merge_adapter; call unmerge_adapter\(\)"
    ):
        ia.export(llama, "other")
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("other")
    assert ia.export(llama, "other").edits


# ------------------------------------------------------------------ several adapters
def test_adding_neither_activates_nor_unfreezes(llama: Any, method: dict[str, Any]) -> None:
    model = bridged(llama, method)
    learn(model)
    before = logits(model)
    model.set_requires_grad("default", False)
    model.add_adapter("other", config(method, seed=2))
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), before)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_duplicate_and_an_impossible_name_are_refused_before_any_change(llama: Any) -> None:
    model = bridged(llama, METHODS["shira"])
    before = bits(model)
    for name, error in (("default", "already exists"), ("merged_adapters", "PEFT needs that word"), ("a.b", "no dot")):
        with pytest.raises(ValueError, match=error):
            model.add_adapter(name, config(METHODS["shira"]))
        assert same(bits(model), before)
        assert list(model.peft_config) == ["default"]


def test_switching_gives_each_adapter_its_own_output(llama: Any, method: dict[str, Any]) -> None:
    model = two(llama, method)
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert [n for n, p in model.named_parameters() if p.requires_grad and ".other." in n] == []
    with pytest.raises(ia.IntarsiaError, match="did you mean 'other'"):
        model.base_model.set_adapter("othr")
    assert torch.equal(logits(model), first)


def test_deleting_leaves_no_trace_and_a_merged_one_is_refused(llama: Any, method: dict[str, Any]) -> None:
    base, before = bits(llama), logits(llama)
    model = two(llama, method)
    first = logits(model)
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("other")
    assert "other" in model.peft_config
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert names_with(model, "other") == []
    assert "other" not in model.peft_config
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("other")
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert same(bits(llama), base)
    assert torch.equal(logits(model.base_model), before)


def test_deleting_the_active_adapter_makes_the_first_of_the_rest_act(llama: Any) -> None:
    model = two(llama, METHODS["shira"])
    model.set_adapter("other")
    second = logits(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".other." in n)


def test_rows_of_a_batch_may_have_adapters_of_their_own(llama: Any, method: dict[str, Any]) -> None:
    base = logits(llama)
    model = two(llama, method).eval()
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    mixed = logits(model, adapter_names=["default", "__base__", "other"])
    for row, alone in enumerate((first, base, second)):
        assert torch.allclose(mixed[row], alone[row], atol=1e-5)
    assert torch.equal(logits(model), second)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        logits(model, adapter_names=["default", "__base__", "other"])
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        logits(model, adapter_names=["default", "__base__", "other"])


# ------------------------------------------------------------------ files
@pytest.mark.parametrize("low", [False, True])
def test_saved_and_loaded_computes_the_same(
    llama: Any, tiny_llama: Any, method: dict[str, Any], low: bool, tmp_path: Path
) -> None:
    model = two(llama, method)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(12345)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(logits(loaded), trained)
    assert not any(p.requires_grad for p in loaded.parameters())
    model.set_adapter("other")
    loaded.load_adapter(tmp_path / "other", "second", low_cpu_mem_usage=low)
    assert torch.equal(logits(loaded), trained)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(model))
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    learn(again)
    assert not torch.equal(logits(again), trained)


def test_only_the_asked_adapter_is_saved_and_keys_do_not_hold_its_name(llama: Any, tmp_path: Path) -> None:
    model = bridged(llama, METHODS["shira"])
    for name in ("default2", "other_default", "efaul"):
        model.add_adapter(name, config(METHODS["shira"]))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == get_peft_model_state_dict(model).keys()
    assert len(saved) == 2 * len([m for m in model.modules() if isinstance(m, LayerAdapters)])
    assert not any("default" in key or "efaul" in key for key in saved)
    assert not any((tmp_path / name).exists() for name in ("default2", "other_default", "efaul"))


def spoil(saved: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    values, index = next(k for k in saved if k.endswith("values")), next(k for k in saved if k.endswith("index"))
    lin = values.removesuffix(".values")
    yield "missing", {k: t for k, t in saved.items() if not k.startswith(lin)}
    yield "expected index, values", {k: t for k, t in saved.items() if k != index}
    yield "does not sit there", saved | {"base_model.model.lm_head.adapters.values": saved[values]}
    yield "unexpected base_model.model.nothing", saved | {"base_model.model.nothing": saved[values]}
    yield "not finite", saved | {values: torch.full_like(saved[values], torch.nan)}
    yield "indices reach", saved | {index: saved[index] + 10**6}
    yield "make no shira adapter|values are", saved | {values: saved[values][:-1]}
    yield "expected \\(", saved | {values: saved[values][:-1], index: saved[index][:-1]}


def test_a_file_that_does_not_fit_is_refused_and_nothing_changes(llama: Any, tiny_llama: Any, tmp_path: Path) -> None:
    model = bridged(llama, METHODS["shira"])
    learn(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    present = bridged(tiny_llama(), METHODS["shira"], seed=9)
    before = bits(present)
    for wrong, spoilt in spoil(saved):
        save_file({k: t.clone() for k, t in spoilt.items()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ia.IntarsiaError, match=wrong):
            present.load_adapter(tmp_path, "default", is_trainable=True)
        assert same(bits(present), before), wrong


@pytest.mark.parametrize("budget", ["weight", "model"])
def test_what_was_chosen_by_data_loads_without_data(llama: Any, tiny_llama: Any, budget: str, tmp_path: Path) -> None:
    method = SNIP | {"budget": budget}
    with pytest.raises(ia.IntarsiaError, match="needs calibration data"):
        bridged(llama, method)
    model = bridged(llama, method, data=[BATCH])
    learn(model)
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=trainable)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.get_nb_trainable_parameters()[0] == trainable * model.get_nb_trainable_parameters()[0]
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert again.method == model.peft_config["default"].method
    with pytest.raises((NotImplementedError, RuntimeError)):  # a choice that nobody has made computes nothing
        logits(peft.get_peft_model(tiny_llama(), again))


def test_a_whole_state_dict_loads_with_the_adapter_set_in(llama: Any, tiny_llama: Any) -> None:
    base = bits(llama)
    model = bridged(llama, METHODS["shira"], seed=1)
    learn(model)
    whole = bits(model)
    other = bridged(tiny_llama(), METHODS["shira"], seed=2)  # of another support
    learn(other)
    other.load_state_dict(whole)
    assert torch.equal(logits(other), logits(model))
    assert same(bits(other.unload()), base)


def test_base_weights_load_under_an_adapter(llama: Any, tiny_llama: Any) -> None:
    model = bridged(llama, METHODS["shira"])
    learn(model)
    with torch.no_grad():
        moved = {name: tensor + 1 for name, tensor in bits(tiny_llama()).items()}
    llama.load_state_dict(moved, strict=False)
    assert same(get_base_model_state_dict(model), moved)
    assert same(bits(model.unload()), moved)


# ------------------------------------------------------------------ whole models
def test_copies_and_pickles_compute_the_same_and_stand_alone(llama: Any, method: dict[str, Any]) -> None:
    model = two(llama, method)
    trained = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), trained)
        learn(copied)
        copied.merge_adapter()
        copied.unmerge_adapter()
        copied.delete_adapter("other")
        assert torch.equal(logits(model), trained)


def test_half_precision_moves_keep_what_was_learned(llama: Any, method: dict[str, Any]) -> None:
    model = bridged(llama, method)
    learn(model)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        half.merge_adapter()
        assert logits(half).isfinite().all()
        half.unmerge_adapter()
        assert {p.dtype for n, p in half.named_parameters() if "adapters." in n} == {torch.float32}


@pytest.mark.filterwarnings(CHECKPOINTING)
def test_gradient_checkpointing_gives_the_same_gradients(llama: Any, method: dict[str, Any]) -> None:
    model = bridged(llama, method).train()
    found = []
    for reentrant in (None, True, False):
        model.zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**BATCH).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    assert all(
        g.keys() == found[0].keys() and all(torch.allclose(g[k], found[0][k], atol=1e-7) for k in g) for g in found
    )


def test_modules_to_save_are_trained_whole_beside_the_adapter(llama: Any, tmp_path: Path) -> None:
    def classifier() -> Any:
        torch.manual_seed(0)
        settings = copy.deepcopy(llama.config)
        settings.pad_token_id = 0
        return LlamaForSequenceClassification(settings)

    model = peft.get_peft_model(classifier(), IntarsiaConfig(method=METHODS["shira"], task_type="SEQ_CLS"))
    assert not any("score" in name and "adapters" in name for name, _ in model.named_parameters())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(input_ids=TOKENS, labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    base = classifier()
    assert same(bits(model.unload()), bits(base))


def test_targets_are_strict(llama: Any) -> None:
    before = bits(llama)
    with pytest.raises(ia.IntarsiaError, match="v_prj.*v_proj"):
        bridged(llama, METHODS["shira"], target_modules=["q_proj", "v_prj"])
    assert same(bits(llama), before)
    model = bridged(llama, METHODS["shira"], target_modules=r".*layers\.0\..*", exclude_modules=["q_proj"])
    names = model.base_model.targeted_module_names
    assert names
    assert all(".0." in name and "q_proj" not in name for name in names)
    ia.attach(model.unload(), ia.Shira(density=0.1))
    with pytest.raises(ia.IntarsiaError, match="detach them before PEFT"):
        bridged(llama, METHODS["shira"])


# ------------------------------------------------------------------ trainers
def training(folder: Path, steps: int, **given: Any) -> dict[str, Any]:
    return dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=2,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **given,
    )


def test_transformers_trainer_saves_and_resumes(
    llama: Any, tiny_llama: Any, method: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    base = bits(llama)
    model = bridged(llama, method)
    Trainer(model, TrainingArguments(**training(tmp_path / "a", 4)), train_dataset=rows).train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = bridged(tiny_llama(), method, seed=7)  # whatever it chose at first
    Trainer(resumed, TrainingArguments(**training(tmp_path / "b", 4)), train_dataset=rows).train(
        resume_from_checkpoint=str(checkpoint)
    )
    assert torch.equal(logits(resumed), logits(model))
    assert same(bits(resumed.unload()), base)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install trl")
def test_trl_trains_it(llama: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are not pinned here
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in TOKENS.repeat(4, 1)])
        base = bits(llama)
        trainer = SFTTrainer(
            llama,
            SFTConfig(**training(tmp_path, 2, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False)),
            train_dataset=rows,
            processing_class=some_tokenizer(),
            peft_config=config(METHODS["shira"]),
        )
        trainer.train()
    model: Any = trainer.model
    assert isinstance(model, peft.PeftModel)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert any(float(p.detach().abs().max()) > 0 for n, p in model.named_parameters() if n.endswith("values"))
    assert same(bits(model.unload()), base)


def some_tokenizer() -> Any:
    """A tokenizer of single words, made on the spot."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{n}": n for n in range(2, 60)}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
