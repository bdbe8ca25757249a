"""Optimizers by name in a config, in a run that is killed, and in transformers' Trainer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

import intarsia as ia
from intarsia import optim, registry
from intarsia.distributed import load_checkpoint, save_checkpoint
from intarsia.methods import Snella
from intarsia.optim.parts import parts
from intarsia.train import trainer, unfinished
from intarsia.train.config import Config, load_config, make_config
from intarsia.train.plan import plan
from intarsia.train.trainer import train
from small import small_net, some_input, some_loss, state_of, stir, trained
from toy import save_toy, toy_model

STEPS = 11


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    save_toy(folder / "m")
    rows = [{"prompt": f"{i}:", "completion": f" {str(i)[::-1]}"} for i in range(60)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def tree(place, tmp_path):
    def make(optimizer: Any, method: Any = "full", out: str = "out", **keys: Any) -> dict[str, Any]:
        given = {"steps": STEPS, "batch_size": 12, "save_every": 3, "eval_every": 50, "optimizer": optimizer} | keys
        return {
            "model": str(place / "m"),
            "data": str(place / "d.jsonl"),
            "method": method,
            "output": str(tmp_path / out),
            "train": given,
        }

    return make


# --- configs


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d.jsonl\nmethod: full\noutput: o\ntrain: {optimizer: galore}\n")
    return path


def test_an_optimizer_is_a_name_or_a_mapping_and_overrides_reach_into_it(file):
    assert load_config(file).train.optimizer == "galore"
    assert load_config(file, ["train.optimizer=sgd"]).train.optimizer == "sgd"
    assert load_config(file, ["train.optimizer={name: adafactor}"]).train.optimizer == "adafactor"
    config = load_config(file, ["train.optimizer.rank=4", "train.optimizer.inner=adamw"])
    assert config.train.optimizer == {"name": "galore", "rank": 4, "inner": "adamw"}
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer=galor", "train.optimizer: unknown optimizer 'galor'; did you mean 'galore'"),
        ("train.optimizer=adamm", "unknown optimizer 'adamm'; did you mean 'adamw'"),
        ("train.optimizer.rnk=4", "train.optimizer: galore has no field 'rnk'; did you mean 'rank'"),
        ("train.optimizer.lr=4", "galore has no field 'lr'; it is train.lr"),
        ("train.optimizer.rank=0", "galore: rank=0 must be a whole number, 1 or more"),
        ("train.optimizer={rank: 4}", "an optimizer needs a name: optimizer: {name: galore, rank: 8}"),
        ("train.optimizer={name: adamw, rank: 4}", "adamw has no fields here; write optimizer: adamw"),
        ("train.optimizer=3", "train.optimizer"),
    ],
)
def test_a_mistake_is_told_with_its_key(file, override, message):
    with pytest.raises(ia.IntarsiaError, match=message):
        load_config(file, [override])


def test_what_a_run_takes_is_known_before_it(tree):
    ready = plan(make_config(tree({"name": "galore", "rank": 4})))
    assert ready.optimizer == optim.GaloreRecipe(rank=4)
    assert ready.estimate.lr == pytest.approx(1e-4 / 0.25)
    sizes = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)] * 2
    assert ready.estimate.optimizer_bytes == 4 * sum(optim.GaloreRecipe(rank=4).numbers(size) for size in sizes)
    assert ready.settings["train.optimizer.gap"] == 200
    assert plan(make_config(tree("lora-plus", "lora"))).estimate.lr == pytest.approx(4e-3 / 4)
    assert plan(make_config(tree("sgd"))).optimizer is None
    with pytest.raises(
        ia.IntarsiaError, match=r"lora-rite is for methods with pairs of factors, and full has none; .*lora"
    ):
        plan(make_config(tree("lora-rite")))


def test_the_methods_page_has_them():
    systems = registry.systems()
    for name, recipe in optim.optimizers().items():
        assert (systems[name].kind, systems[name].title) == ("optimizer", recipe.title)
        assert systems[name].facts["default_lr"] == recipe.default_lr
        assert all(field.metadata["help"] for _, field in systems[name].fields)
        assert str(sys.modules[systems[name].about].__doc__).startswith(f"{recipe.title}: ")


# --- runs

RUNS = [
    ({"name": "fira", "rank": 4, "gap": 4}, "full"),
    ({"name": "frugal", "gap": 4}, "full"),
    ({"name": "lora-rite"}, {"name": "dora", "inner": {"name": "lora", "rank": 3}}),
]


@pytest.mark.parametrize(("optimizer", "method"), RUNS, ids=lambda x: x.get("name") if isinstance(x, dict) else x)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tree, monkeypatch, optimizer, method):
    def stop(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        usual(self, args, state, control, **more)
        control.should_save = control.should_training_stop = state.global_step == 6
        if state.global_step == 6:
            self.trainer.signals.caught = signal.SIGINT

    whole = train(make_config(tree(optimizer, method, "whole")))
    assert whole.eval_loss is not None
    assert whole.base_loss is not None
    assert whole.eval_loss < whole.base_loss
    usual = trainer._AfterStep.on_step_end
    monkeypatch.setattr(trainer._AfterStep, "on_step_end", stop)
    with pytest.raises(trainer.TrainingStopped):
        train(make_config(tree(optimizer, method)))
    monkeypatch.undo()
    with pytest.raises(ia.IntarsiaError, match=r"other settings:\n  train.optimizer.* was"):
        train(make_config(tree("adamw", method)))
    outcome = train(make_config(tree(optimizer, method)))
    assert outcome.resumed_from == 6
    assert outcome.digest == whole.digest


CHILD = """
import os, signal, sys
from intarsia.train import trainer
from intarsia.train.config import load_config
trainer.AdapterTrainer.training_step = lambda self, *a, **k: (
    os.kill(os.getpid(), signal.SIGKILL) if self.state.global_step == 8 else trainer.Trainer.training_step(self, *a, **k))
trainer.train(load_config(sys.argv[1]))
"""


def test_after_kill_9_the_same_command_gives_the_same_digest(tree, tmp_path):
    wanted = {"name": "galore", "rank": 4, "gap": 4}
    whole = train(make_config(tree(wanted, out="whole")))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(wanted)))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "run.yaml")], capture_output=True, text=True, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    last = unfinished.Unfinished(tmp_path / "out").checkpoint()
    assert last is not None
    assert unfinished.step_of(last) == 6
    outcome = train(make_config(tree(wanted)))
    assert (outcome.resumed_from, outcome.digest) == (6, whole.digest)


def test_a_distributed_checkpoint_goes_on_to_the_bit(tmp_path):
    def begun() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        net = small_net()
        ia.attach(net, registry.build("full"))
        return net, optim.build({"name": "galore", "rank": 3, "gap": 4}).build(net, 1e-2)

    def go(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            some_loss(net, some_input(seed=step)).backward()
            optimizer.step()

    one, other = begun(), begun()
    go(*one, range(3))
    save_checkpoint(one[0], tmp_path / "c", one[1])
    load_checkpoint(other[0], tmp_path / "c", other[1])
    for each in (one, other):
        go(*each, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(trained(one[0]), trained(other[0]), strict=True))


# --- Trainer


@pytest.mark.parametrize(("name", "fields"), [("galore", {"rank": 4}), ("frugal", {}), ("lora-plus", {"ratio": 4.0})])
def test_transformers_trainer_takes_them_by_name(tmp_path, name, fields):
    model = toy_model()
    ia.attach(model, ia.Lora(rank=2) if name == "lora-plus" else registry.build("full"))
    ids = torch.randint(0, 256, (12, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    with torch.no_grad():
        before = model(input_ids=ids, labels=ids).loss.item()
    given = optim.for_trainer(name, lr=5e-3, **fields)
    teacher = Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=given)
    teacher.train()
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() < before
    rates = sorted({group["initial_lr"] for group in teacher.optimizer.param_groups})
    assert rates == ([5e-3, 2e-2] if name == "lora-plus" else [5e-3])
    assert optim.for_trainer("galore")[1] == {"lr": 1e-2, "weight_decay": 0.0}
    with pytest.raises(ia.IntarsiaError, match="galore has no field 'rnk'"):
        optim.for_trainer("galore", rnk=4)


# --- what a tensor is


def test_a_plain_model_projects_what_attention_and_mlp_multiply_by():
    model = toy_model()
    found = {part.name: part for part in parts(model)}
    assert found["model.layers.0.mlp.up_proj.weight"].role == "matrix"
    assert not found["model.norm.weight"].decays
    projected, *others = optim.build("frugal").build(model, 1e-3, 0.1).param_groups
    assert len(projected["params"]) == 14
    assert sum(len(group["params"]) for group in others) == len(found) - 14
    assert all(group["project"] is False for group in others)
    assert {group["weight_decay"] for group in others} == {0.1, 0.0}
    assert all(p.shape != model.lm_head.weight.shape for p in projected["params"])


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_pairs_are_trained_tensors_of_the_method(name):
    for settings in registry.methods()[name].small:
        method = registry.build({"name": name, **settings})
        net = small_net()
        try:
            ia.attach(net, method, "up", data=[some_input()], loss=some_loss)
        except ia.IntarsiaError:
            continue  # needs a model of a known family, or more
        state = state_of(net, "up")
        for up, down in method.pairs:
            assert (up in state.learned()) == (
                down in state.learned()
            )  # a setting may leave a pair out, never half of one
        assert {part.role for part in parts(net)} >= ({"up", "down"} if method.pairs else set())


def test_what_a_method_gathers_before_a_step_is_gathered_once():
    """The inner optimizer's own hooks do not call it again."""
    seen = []
    for make in (
        lambda ps: torch.optim.AdamW(ps, 1e-3, weight_decay=0.0),
        lambda ps: optim.GaLore(ps, torch.optim.AdamW, 1e-3, rank=99),
    ):
        net = small_net()
        ia.attach(net, Snella(rank=2))
        stir(net)
        optimizer = make(trained(net))
        for step in range(3):
            optimizer.zero_grad()
            some_loss(net, some_input(seed=step)).backward()
            optimizer.step()
        seen.append(state_of(net, "up").importance_A)
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-12)
    assert float(seen[0].abs().max()) > 0
