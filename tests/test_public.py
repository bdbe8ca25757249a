"""What others rely on: the public names, what an import costs, and methods from other packages."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

import intarsia as ia
from intarsia import contract, registry
from small import SITES, small_net, some_input

# A name that is added, renamed or removed is a change of the interface: edit this list and the changelog with it.
PUBLIC = {
    "Adapter", "Deck", "Dora", "IntarsiaError", "Lora", "Method", "Paca", "Prefix", "Prompt", "S2ft", "Shira", "__version__",
    "activate",
    "active_names", "adapter_state", "attach", "attached_names", "detach", "digest", "export", "load",
    "load_adapter_state", "load_checkpoint", "lottery", "optim", "read", "register", "registry", "regrow", "replicate", "rows", "save",
    "save_checkpoint", "scorer", "shard", "sync",
}  # fmt: skip

SIGNATURES = {
    "attach": "model, method, targets, name, exclude, avoid, data, loss, seed, progress, gathered, original",
    "lottery": "model, method, train, targets, name, exclude, avoid, iterations, seed",
    "regrow": "model, name, optimizer, data, share, scorer, loss",
    "activate": "model, names",
    "detach": "model, name",
    "rows": "model, names",
    "save": "model, folder, name, note, overwrite, coding, values",
    "load": "model, folder, name, any_base",
    "shard": "model, blocks, options",
    "replicate": "model, options",
    "save_checkpoint": "model, folder, optimizer, name, extra",
    "load_checkpoint": "model, folder, optimizer, name",
    "read": "folder",
    "digest": "model",
    "Shira": "density, scorer, granularity, width, scale, offset, budget, schedule, every, swap",
    "Paca": "rank, alpha, select, parameterization",
    "Lora": "rank, alpha, scaling, start",
    "Dora": "inner, detach_norm",
}


def test_the_public_names():
    assert set(ia.__all__) == PUBLIC
    for name in PUBLIC:
        assert hasattr(ia, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_names_of_arguments(name):
    assert ", ".join(inspect.signature(getattr(ia, name)).parameters) == SIGNATURES[name]


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__", "registry"}))
def test_every_public_name_is_explained(name):
    thing = getattr(ia, name)
    if isinstance(thing, type) and issubclass(thing, ia.Method) and thing is not ia.Method:
        thing = inspect.getmodule(thing)  # a method file holds one method and says at its head what that is
    text = inspect.getdoc(thing)
    assert text
    assert not text.startswith(f"{name}(")  # a dataclass without a docstring is given its own signature


def test_the_names_of_a_deck():
    names = {name for name in dir(ia.Deck) if not name.startswith("_")}
    assert names == {
        "active", "add", "fuse", "names", "off", "prefetch", "remove", "status", "strength", "use", "verify",
    }  # fmt: skip
    deck = ia.Deck(small_net())
    assert deck.last_switch_seconds == 0.0
    assert deck.base_digest == ia.digest(small_net())


def test_an_import_is_light():
    """Nothing that only training, models or plots need; no method's heavy dependency; no model."""
    heavy = [
        "transformers",
        "matplotlib",
        "peft",
        "pydantic",
        "typer",
        "rich",
        "yaml",
        "accelerate",
        "huggingface_hub",
        "gguf",
        "pyarrow",
        "psutil",
    ]
    program = f"import sys, intarsia, intarsia.contract; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


# ------------------------------------------------------------------ registry
@pytest.mark.parametrize(
    ("config", "method"),
    [
        ("shira", ia.Shira()),
        ({"name": "shira", "density": "0.02", "scorer": "snip"}, ia.Shira(density=0.02, scorer="snip")),
        ({"name": "shira", "scale": "2e0"}, ia.Shira(scale=2.0)),
        ({"name": "shira", "scale": 3}, ia.Shira(scale=3.0)),
        ({"name": "lora", "rank": "4", "alpha": 8}, ia.Lora(4, 8.0)),
        ({"name": "lora", "alpha": None}, ia.Lora()),
        ({"name": "dora", "inner": {"name": "paca", "rank": 2}, "detach_norm": "false"}, ia.Dora(ia.Paca(2), False)),
        ({"name": "dora", "inner": "shira"}, ia.Dora(ia.Shira())),
        ("rslora", ia.Lora(scaling="rslora")),
        ({"name": "dora", "inner": {"name": "rslora", "rank": 3}}, ia.Dora(ia.Lora(3, scaling="rslora"))),
    ],
    ids=str,
)
def test_methods_are_built_from_plain_configs(config, method):
    built = registry.build(config)
    assert built == method
    assert {k: type(v) for k, v in vars(built).items()} == {k: type(v) for k, v in vars(method).items()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("shirra", "unknown method 'shirra'; did you mean 'shira'"),
        ({"name": "zzz"}, "known: alora, bat, bone, bottleneck, "),
        ({"name": "shira", "densty": 0.1}, "shira has no field 'densty'; did you mean 'density'"),
        ({"name": "shira", "density": "much"}, "density='much' is a str; expected float"),
        ({"name": "shira", "density": None}, "density=None is a None; expected float"),
        ({"name": "shira", "density": True}, "density=True is a bool; expected float"),
        ({"name": "lora", "rank": 2.5}, "rank=2.5 is a float; expected int"),
        ({"name": "lora", "rank": "2.5"}, "rank='2.5' is a str; expected int"),
        ({"name": "lora", "rank": True}, "rank=True is a bool; expected int"),
        ({"name": "lora", "rank": [2]}, "is a list; expected int"),
        ({"name": "lora", "alpha": 10**400}, "alpha is too large a number"),
        ({"name": "lora", "alpha": "1e400"}, "alpha=inf must be positive"),
        ({"name": "rslora", "scaling": "lora"}, "rslora is lora with scaling='rslora', so scaling cannot be given"),
        ({"name": "dora", "inner": 3}, "a method is given as"),
        ({"name": "dora", "inner": {"name": "lora", "rnk": 2}}, "lora has no field 'rnk'; did you mean 'rank'"),
        ({"density": 0.1}, "a method is given as .name: ..., field: value.; found"),
        ({"name": 3}, "a method is given as"),
        (None, "a method is given as"),
    ],
    ids=str,
)
def test_configs_that_make_no_method_are_refused(config, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        registry.build(config)


def test_a_name_is_given_once():
    with pytest.raises(ia.IntarsiaError, match="the method name 'lora' of .* is taken by intarsia.methods.lora"):

        @ia.register
        class Mine(ia.Lora):
            pass

    assert registry.find("lora") is ia.Lora


# ------------------------------------------------------------------ methods of other packages
ROWS = '''
"""Rowwise: a learned factor for every output.    W' = (1 + g) W

A worked example of a method in another package, arXiv:2205.05638 in spirit.
Trained: O numbers a weight.  g = 0 at the start.
"""

from dataclasses import dataclass

import torch
from intarsia.edits import Rescaled, LowRank, row_norms
from intarsia.forms import Delta
from intarsia.method import option


@dataclass(frozen=True)
class Rowwise(Delta):
    size: float = option(1.0, "factor in front of g")

    name, title, paper = "rowwise", "Rowwise", "arXiv:2205.05638"
    formula, trained = "W' = (1 + g) W", "O"
    default_lr = 1e-2
    small = ({}, {"size": 0.5})
    BROKEN = False

    def init(self, site, start):
        wide = torch.promote_types(site.weight.dtype, torch.float32)
        W = site.weight.detach().to(wide)
        return {"g": torch.nn.Parameter(torch.zeros(site.shape[0], 1, dtype=wide)), "W": W.clone()}

    def trained_count(self, shape):
        return shape[0] + self.BROKEN

    def delta(self, p):
        return self.size * p.g * p.W

    def edit(self, p):
        eye = torch.eye(p.shape[1], dtype=p.W.dtype)
        return LowRank(p.shape, (self.delta(p)).detach().clone(), eye, 1.0)

    def restore(self, edit, site):
        wide = torch.promote_types(site.weight.dtype, torch.float32)
        W = site.weight.detach().to(wide).clone()
        pick = W.abs().argmax(1, keepdim=True)
        g = edit.B.gather(1, pick) / W.gather(1, pick) / self.size
        return {"g": torch.nn.Parameter(g.to(wide)), "W": W}
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that offers a method: a module and the metadata that an installer leaves."""
    (tmp_path / "rowwise_adapters.py").write_text(ROWS)
    info = tmp_path / "rowwise_adapters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rowwise-adapters\nVersion: 1.0\n")
    entry = "[intarsia.methods]\nrowwise = rowwise_adapters:Rowwise\n"
    (info / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(tmp_path)
    registry.methods()  # ours are registered once a process, and are wanted in the copy
    monkeypatch.setattr(registry.METHODS, "classes", dict(registry.METHODS.classes))
    monkeypatch.setattr(registry.METHODS, "complete", False)
    yield info
    sys.modules.pop("rowwise_adapters", None)


def test_a_method_of_another_package_is_found_and_used(package, tmp_path):
    assert "rowwise" in registry.methods()
    method = registry.build({"name": "rowwise", "size": 2})
    model = small_net()
    ia.attach(model, method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 24 + 16 + 24
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    ia.save(model, tmp_path / "a")
    deck = ia.Deck(small_net())
    deck.add(tmp_path / "a")
    deck.use("a")
    torch.testing.assert_close(deck.model(some_input()), model(some_input()))
    other = small_net()
    ia.load(other, tmp_path / "a")
    torch.testing.assert_close(other(some_input()), model(some_input()))


def test_the_contract_runs_on_a_method_of_another_package(package):
    results = contract.check("rowwise_adapters:Rowwise")
    assert len(results) == 2 * len(contract.LAWS)
    # Its restore divides, so it is not exact to the bit: a law that the worked example knowingly breaks.
    broken = {result.law for result in results if result.state == "broken"}
    assert broken <= {"edit is the fold", "saves and loads exactly", "sums are exact"}, "\n".join(map(str, results))
    assert "holds" in str(results[0])


def test_a_method_without_its_package_is_named_on_loading(package, tmp_path, monkeypatch):
    model = small_net()
    ia.attach(model, registry.build("rowwise"))
    ia.save(model, tmp_path / "a")
    monkeypatch.setattr(registry.METHODS, "classes", {"lora": ia.Lora})
    with pytest.raises(ia.IntarsiaError, match="unknown method 'rowwise'"):
        ia.load(small_net(), tmp_path / "a")
    ia.Deck(small_net()).add(tmp_path / "a")  # what is finished needs no method


@pytest.mark.parametrize(
    "target",
    ["rowwise_adapters:Missing", "no_such_module:Rowwise", "rowwise_adapters:torch", "rowwise_adapters:dataclass"],
)
def test_a_broken_package_is_named(target, package):
    (package / "entry_points.txt").write_text(f"[intarsia.methods]\nrowwise = {target}\n")
    with pytest.raises(ia.IntarsiaError, match="the package rowwise-adapters offers the method 'rowwise', but loading"):
        registry.methods()


# ------------------------------------------------------------------ the contract itself
def _tampered(**changes):
    """LoRA with some functions replaced."""
    return type("Tampered", (ia.Lora,), {"__module__": __name__, **changes})(rank=2)


def test_a_law_that_does_not_hold_is_found():
    wrong = _tampered(branch=lambda self, p, x: 1.01 * ia.Lora.branch(self, p, x))
    result = contract.judge("forward is the fold", wrong)
    assert result.state == "broken"
    assert "forward against fold" in result.note
    assert contract.judge("counts what it trains", wrong).state == "holds"


def test_a_declared_exception_is_taken_at_its_word_and_no_further():
    reason = {"forward is the fold": "a test", "counts what it trains": "a test"}
    wrong = _tampered(branch=lambda self, p, x: 1.01 * ia.Lora.branch(self, p, x), expected=reason)
    assert contract.judge("forward is the fold", wrong).state == "expected"
    result = contract.judge("counts what it trains", wrong)
    assert result.state == "broken"
    assert "remove that entry" in result.note


def test_an_unknown_law_in_expected_is_found():
    wrong = _tampered(expected={"no such law": "a test"})
    result = contract.judge("explains itself", wrong)
    assert result.state == "broken"
    assert "no such law" in result.note


def test_the_contract_refuses_what_is_no_method():
    refused: dict[Any, str] = {
        "math:pi": "expected a method",
        "nothing": "module:Class",
        "no_module:X": "No module named",
        "intarsia.methods.lora:Loro": "no attribute",
        3: "expected a method",
    }
    for subject, message in refused.items():
        with pytest.raises(ia.IntarsiaError, match=message):
            contract.settings(subject)
    with pytest.raises(ia.IntarsiaError, match="unknown law 'x'"):
        contract.check(ia.Lora, ["x"])


@pytest.mark.parametrize("law", contract.LAWS)
def test_every_law_is_explained(law):
    assert (inspect.getdoc(contract.LAWS[law]) or "").rstrip().endswith(".")


def test_laws_can_be_run_without_pytest():
    program = textwrap.dedent("""
        import sys
        from intarsia import contract
        results = contract.check("paca", ["starts as the base", "counts what it trains"])
        assert all(result.state == "holds" for result in results) and len(results) == 8, results
        assert not {"pytest", "peft", "hypothesis"} & set(sys.modules)
    """)
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_sites_of_the_small_net():
    assert [name for name, m in small_net().named_modules() if isinstance(m, torch.nn.Linear)] == list(SITES)
