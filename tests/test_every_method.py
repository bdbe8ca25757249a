"""Every method, optimizer and allocator by the same road: trained from one config, saved, loaded, and switched in one deck."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import intarsia as ia
from intarsia import allocators, optim, registry, store
from intarsia.train.config import make_config
from intarsia.train.trainer import train
from toy import save_toy, toy_model, toy_tokenizer

# What a setting for the contract's small net leaves out, or makes otherwise, on a language model.
MORE: dict[str, dict[str, Any]] = {
    "s2ft": {"layout": "family"},
    "tokens": {"tokens": [15, 16, 17]},  # digits
    "alora": {"invocation": [25]},  # ":"
}
TARGETS = {"tokens": "embed_tokens"}  # others sit at every linear layer, or find their place by themselves


def base():
    """A model that was compressed, so that there is something to repair: numbers of fewer bits."""
    return toy_model().to(torch.bfloat16).float()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("every")
    save_toy(folder / "original")
    base().save_pretrained(folder / "m")
    toy_tokenizer().save_pretrained(folder / "m")
    rows = [{"prompt": f"{i}:", "completion": f" {str(i)[::-1]}"} for i in range(24)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(place: Path, method: dict[str, Any], output: str, **more: Any) -> Path:
    """Three steps by a config like any other. -> the adapter's folder."""
    tree = {
        "model": str(place / "m"),
        "data": str(place / "d.jsonl"),
        "method": method,
        "targets": TARGETS.get(method["name"], "all-linear"),
        "output": str(place / output),
        "overwrite": True,
        "original": str(place / "original") if "original" in registry.build(method).needs() else None,
    } | more
    tree["train"] = {"steps": 3, "batch_size": 8, "lr": 1e-2} | more.get("train", {})
    outcome = train(make_config(tree))
    assert outcome.steps == 3
    assert outcome.eval_loss is None or outcome.eval_loss > 0
    return place / output


def config_of(name: str) -> dict[str, Any]:
    return {"name": name} | dict(registry.find(name).small[0]) | MORE.get(name, {})


@pytest.fixture(scope="module")
def trained(place):
    """The folder of a method's adapter, which is trained when it is first asked for."""
    return functools.cache(lambda name: run(place, config_of(name), name))


@pytest.mark.parametrize("name", registry.methods())
def test_it_is_trained_saved_and_loaded(name, trained):
    model = base()
    before = ia.digest(model)
    ia.load(model, trained(name), "it")
    assert ia.digest(model) == before
    ids = torch.arange(10, 30)[None]
    learned = model.eval()(ids).logits
    ia.activate(model)
    assert not torch.equal(learned, model(ids).logits)


def test_one_deck_switches_them_all(trained):
    model = base().eval()
    ids = torch.arange(10, 30)[None]
    deck = ia.Deck(model)
    deck.add(**{name: trained(name) for name in registry.methods()})
    alone = model(ids).logits
    for name in [*registry.methods(), *reversed(registry.methods())]:
        deck.use(name)
        other = base().eval()
        ia.load(other, trained(name), "it")
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4, msg=name)
    deck.off()
    assert torch.equal(model(ids).logits, alone)
    assert deck.verify() == store.read(trained("lora")).base.digest


@pytest.mark.parametrize("optimizer", optim.optimizers())
def test_every_optimizer_trains_from_a_config(optimizer, place):
    method = config_of("lora" if optim.optimizers()[optimizer].needs_pairs else "full")
    folder = run(place, method, f"by-{optimizer}", train={"optimizer": optimizer, "lr": 1e-3})
    ia.load(base(), folder)


@pytest.mark.parametrize("allocator", allocators.known())
def test_every_allocator_trains_from_a_config(allocator, place):
    folder = run(place, config_of("lora"), f"with-{allocator}", allocator={"name": allocator})
    ia.load(base(), folder)
