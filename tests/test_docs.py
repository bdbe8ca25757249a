"""The documentation runs: its Python blocks, its configs, its generated tables, its links."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import intarsia as ia
from intarsia import allocators, edits, registry
from intarsia.bench.grid import Grid, check_methods
from intarsia.merge import load_recipe
from intarsia.merge import rule as merging
from intarsia.methods import Alora
from intarsia.train.config import load_config, load_tree, validated
from small import stir
from toy import toy_model, toy_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def run(code: str, names: dict[str, Any], where: Path) -> None:
    exec(compile(code, str(where), "exec"), names)


def test_the_quick_start_runs(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(0, 320, (2, 12))
    names: dict[str, Any] = {"model": tiny_llama(), "batch": {"input_ids": ids, "labels": ids}}
    page = ROOT / "docs" / "quick-start.md"
    assert len(blocks(page, "python")) == 5
    for block in blocks(page, "python"):
        run(block, names, page)
    assert names["logits"].shape[0] == 2


def test_the_readme_runs(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(0, 320, (2, 12))
    names: dict[str, Any] = {"model": tiny_llama(), "calibration": [{"input_ids": ids, "labels": ids}]}
    first, second = blocks(ROOT / "README.md", "python")
    run(first, names, ROOT / "README.md")
    names["ia"].save(names["model"], "out/json")
    names["ia"].detach(names["model"], "default")
    run(second, names, ROOT / "README.md")


def test_the_page_of_analyses_runs(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, ids = tiny_llama(), torch.randint(1, 320, (2, 12))
    ia.attach(model, ia.Lora(rank=2), name="json", seed=0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape))
    ia.save(model, "out/json", "json")
    ia.detach(model, "json")
    page = ROOT / "docs" / "analyze.md"
    names: dict[str, Any] = {"model": model, "batch": {"input_ids": ids, "labels": ids}}
    assert len(blocks(page, "python")) == 4
    for block in blocks(page, "python"):
        run(block, names, page)
    assert sum(map(len, names["intruders"].values())) > 0
    assert names["mended"].digest != names["adapter"].digest
    assert torch.equal(names["again"][0][0], names["a"][0][0])


def test_merging_runs(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page, model = ROOT / "docs" / "merging.md", tiny_llama()
    for seed, name in enumerate(("pirate", "json")):
        ia.attach(model, ia.Shira(density=0.1), name=name, seed=seed)
        stir(model, name, seed)
        ia.save(model, f"out/{name}", name)
        ia.detach(model, name)
    (config,) = blocks(page, "yaml")
    Path("both.yaml").write_text(config.replace("json@latest", "out/json"), encoding="utf-8")
    python, own = blocks(page, "python")
    names: dict[str, Any] = {}
    run(python, names, page)
    deck = ia.Deck(model)
    deck.add("out/both")
    deck.use("both")
    assert names["again"].made_of == ia.read("out/both").made_of
    monkeypatch.setattr(merging, "_RULES", dict(merging._RULES))
    run(own, names, page)
    one, half = (names["merge"](["out/json"], rule=rule) for rule in ("sum", "halved"))
    for weight, edit in one.edits.items():
        assert torch.equal(half.edits[weight].tensors()["values"], 0.5 * edit.tensors()["values"])


def test_the_report_of_a_merge_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, model = ROOT / "docs" / "interference.md", toy_model()
    for seed, name in enumerate(("pirate", "json")):
        ia.attach(model, ia.Shira(density=0.1), name=name, seed=seed)
        stir(model, name, seed)
        ia.save(model, f"out/{name}", name)
        ia.detach(model, name)
    names: dict[str, Any] = {"model": model, "tokenizer": toy_tokenizer()}
    (block,) = blocks(page, "python")
    run(block, names, page)
    assert Path("report.png").exists()
    assert names["kept"].shares.keys() == {"pirate", "json"}


def test_the_disjoint_adapters_of_the_guide_are_disjoint(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page, model = ROOT / "docs" / "supports.md", tiny_llama()
    names: dict[str, Any] = {"model": model}
    run(next(block for block in blocks(page, "python") if "avoid=" in block), names, page)
    first, *others = (names["ia"].read(tmp_path / "out" / skill) for skill in "abc")
    assert [len(other.about["avoid"]) for other in others] == [1, 2]
    assert others[1].about["avoid"][0] == {"name": "a", "digest": first.digest}


def written(monkeypatch: pytest.MonkeyPatch, file: Path, source: str) -> ModuleType:
    """A page's method in a file of its own, imported; it is known until the test ends."""
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    monkeypatch.setattr(registry.METHODS, "classes", registry.methods())
    spec.loader.exec_module(module)
    return module


def test_the_method_of_the_guide_passes_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = ROOT / "docs" / "add-a-method.md"
    method, laws = blocks(page, "python")
    module = written(monkeypatch, tmp_path / "lora_fa.py", method)
    run(laws, {"LoraFa": module.LoraFa}, page)


def test_the_allocators_of_the_guide_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    page = ROOT / "docs" / "add-an-allocator.md"
    method, loop, allocator, turns = blocks(page, "python")
    (tmp_path / "thinned.py").write_text(method, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("thinned", tmp_path / "thinned.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "thinned", module)
    monkeypatch.setattr(registry.METHODS, "classes", registry.methods())
    monkeypatch.setattr(allocators.allocator.ALLOCATORS, "classes", allocators.known())
    spec.loader.exec_module(module)
    ids = torch.randint(0, 320, (2, 12))
    names: dict[str, Any] = {"model": tiny_llama(), "batch": {"input_ids": ids, "labels": ids}, "__name__": "thinned"}
    names |= {"ia": ia, "torch": torch, "Thinned": module.Thinned}
    run(loop, names, page)
    assert sum(names["dealt"].values()) == round(0.5 * 8 * len(names["dealt"]))
    assert len(set(names["dealt"].values())) > 1
    run(allocator, names, page)
    run(turns, names, page)
    layers = names["turns"].layers
    assert names["chosen"] == (layers[3 % len(layers)],)
    assert allocators.build({"name": "round", "width": 2}).width == 2  # type: ignore[attr-defined]


def test_the_insert_of_the_guide_passes_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = ROOT / "docs" / "add-an-insert.md"
    method, laws = blocks(page, "python")
    monkeypatch.setitem(edits.INSERTED, "gated bottleneck", None)  # gone again after the test
    module = written(monkeypatch, tmp_path / "gated.py", method)
    run(laws, {"Gated": module.Gated}, page)


def test_the_prompt_of_the_guide_passes_the_contract(
    tiny_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = ROOT / "docs" / "add-a-prompt.md"
    example, method, laws = blocks(page, "python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": tiny_llama()}
    run(example, names, page)
    assert names["deck"].active == {"prompt": 1.0}
    module = written(monkeypatch, tmp_path / "mean_prompt.py", method)
    run(laws, {"MeanPrompt": module.MeanPrompt}, page)


def test_the_mixture_of_the_guide_passes_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = ROOT / "docs" / "add-a-mixture.md"
    method, laws = blocks(page, "python")
    module = written(monkeypatch, tmp_path / "mixture_of_loras.py", method)
    run(laws, {"MixtureOfLoras": module.MixtureOfLoras}, page)


def test_the_bases_cache_serves_activated_adapters_as_the_page_says(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page, model, alone = ROOT / "docs" / "activated.md", tiny_llama(), tiny_llama()
    calls = {"check": torch.tensor([[7, 8, 30]]), "rewrite": torch.tensor([[9, 31]])}
    for seed, (name, invocation) in enumerate((("check", (7, 8)), ("rewrite", (9,)))):
        ia.attach(alone, Alora(invocation, rank=4), "*_proj", name=name, seed=seed)
        stir(alone, name, seed, size=0.3)
        ia.save(alone, f"out/{name}", name)
    names: dict[str, Any] = {"model": model, "prompt": torch.arange(100, 130)[None], "calls": calls}
    (block,) = blocks(page, "python")
    run(block, names, page)
    for name, call in calls.items():
        ia.activate(alone, name)
        whole = torch.cat([names["prompt"], call], dim=1)
        expected = alone.generate(whole, max_new_tokens=8, do_sample=False)
        assert torch.equal(names["answers"][name], expected)
    assert names["cache"].get_seq_length() == 30


def test_the_edit_of_the_guide_is_an_edit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = ROOT / "docs" / "add-an-edit.md"
    monkeypatch.setitem(edits.KINDS, "two_sided", None)  # gone again after the test
    module = ModuleType("two_sided")
    monkeypatch.setitem(sys.modules, "two_sided", module)  # a dataclass asks for the module that it stands in
    for block in blocks(page, "python"):
        run(block, vars(module), page)
    model = toy_model()
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("q_proj.weight"))
    rows, columns = weight.shape
    edit = module.TwoSided((rows, columns), 0.1 * torch.ones(rows), torch.zeros(columns))
    before = weight.detach().clone()
    ia.store.write(ia.Adapter("a", {name: edit}, ia.model.base_of(model, [name])[0], {"name": "any"}), tmp_path / "a")
    deck = ia.Deck(model)
    deck.add(tmp_path / "a")
    deck.use("a")
    torch.testing.assert_close(weight.detach(), 1.1 * before)
    deck.off()
    assert torch.equal(weight.detach(), before)


def test_the_initialiser_of_the_guide_passes_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = ROOT / "docs" / "add-an-initialiser.md"
    start, use = blocks(page, "python")
    (tmp_path / "olora.py").write_text(start, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "olora", raising=False)
    run(use, {}, page)


def test_the_structured_delta_of_the_guide_passes_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = ROOT / "docs" / "add-a-structured-delta.md"
    method, laws, transformed = blocks(page, "python")
    monkeypatch.setitem(edits.KINDS, "diagonals of a circle", None)  # gone again after the test
    module = written(monkeypatch, tmp_path / "circulant.py", method)
    run(laws, {"Circulant": module.Circulant}, page)
    names: dict[str, Any] = {"edits": edits}
    run(transformed, names, page)
    p = SimpleNamespace(shape=(6, 8), A=torch.randn(2, 8), B=torch.randn(6, 2))
    change = names["structure"](None, p).delta(torch.zeros(6, 8))
    torch.testing.assert_close(change.norm(), (p.B @ p.A).norm())
    assert not torch.allclose(change, p.B @ p.A)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_configs_in_the_docs_are_valid(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        if "\nmethods:" in block:  # a comparison
            check_methods(validated(Grid, load_tree(file), page.name))
        elif "merge_method:" in block:
            load_recipe(file)
        else:
            load_config(file)


def test_the_grid_of_masks_is_valid() -> None:
    check_methods(validated(Grid, load_tree(ROOT / "bench" / "masks.yaml"), "masks.yaml"))


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_tables_are_up_to_date() -> None:
    for path, text in tables().expected().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date: python docs/tables.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_the_page_on_smaller_files_runs(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    ia.attach(model, ia.Shira(density=0.3))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    ia.save(model, "out/json")
    page = ROOT / "docs" / "compress.md"
    (block,) = blocks(page, "python")
    names: dict[str, Any] = {}
    run(block, names, page)
    assert 0 < names["lost"] < 1
    assert 0.9 < names["similarity"] <= 1


def test_the_table_of_compressed_adapters_is_that_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("compress_bench", ROOT / "bench" / "compress.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = json.loads((ROOT / "bench" / "results" / "compress.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "compress.md").read_text(encoding="utf-8")
    again = "python bench/compress.py --json bench/results/compress.json --page docs/compress.md"
    assert f"{module.BEGIN}\n{module.table(rows)}\n{module.END}" in page, f"out of date: {again}"
