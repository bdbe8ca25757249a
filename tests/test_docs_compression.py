"""The pages about compressed bases: every block runs, in order."""

from __future__ import annotations

from pathlib import Path

import torch

import intarsia as ia
from intarsia import model as models
from intarsia import pretrained, registry
from test_docs import ROOT, blocks, run
from toy import toy_model, toy_tokenizer


def _batches():
    return [
        {"input_ids": torch.randint(1, 60, (4, 16), generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)
    ]


def test_a_rule_a_repair_and_an_observer(tiny_llama, monkeypatch):
    monkeypatch.setattr(registry.METHODS, "classes", dict(registry.methods()))
    page, model = ROOT / "docs" / "add-a-base-compression.md", tiny_llama()
    names = {"model": model, "batches": _batches()}
    rule, repair, observer = blocks(page, "python")
    whole = {name: module.weight.detach().clone() for name, module in model.named_modules() if name.endswith("_proj")}
    run(rule, names, page)
    assert all(torch.equal(names["before"][name], W) for name, W in whole.items())
    assert all(len(W.abs().unique(dim=1)[0]) == 1 for W in (model.get_submodule(name).weight for name in whole))
    run(repair, names, page)
    layer = "model.layers.0.self_attn.q_proj"  # the first layer's inputs are those of the whole model: their mean output is as it was
    seen = []
    hook = model.get_submodule(layer).register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
    for batch in names["batches"]:
        model(**batch)
    hook.remove()
    x, y = (torch.cat([pair[i].flatten(0, 1) for pair in seen]) for i in (0, 1))
    torch.testing.assert_close(y.mean(0), whole[layer] @ x.mean(0), atol=1e-4, rtol=0)
    run(observer, names, page)
    assert set(models.states(model, "default")) == set(whole)


def test_repair_and_thin_layers(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "compensation.md"
    names = {"ia": ia, "model": toy_model(), "plain": toy_model(), "tokenizer": toy_tokenizer(), "batches": _batches()}
    for block in blocks(page, "python"):
        run(block, names, page)
    assert ia.read("out/repaired").method == {"name": "eora", "rank": 8, "weighting": "gram"}
    assert names["done"].thin
    assert pretrained.load("out/thin").model.dtype == names["plain"].dtype
