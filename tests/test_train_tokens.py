"""Runs of methods that watch or count tokens: the invocation as text, rows without it, the balance over an end and a beginning."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
import torch

import intarsia as ia
from intarsia import registry
from intarsia.train import trainer as trainer_module
from intarsia.train.config import make_config
from intarsia.train.plan import plan
from intarsia.train.trainer import TrainingStopped, train
from toy import save_toy, toy_tokenizer

INVOKE = "<|go|>"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model ``m`` and data ``d.jsonl``; three rows of it are not invoked."""
    folder = tmp_path_factory.mktemp("tokens")
    save_toy(folder / "m")
    rows = [{"prompt": f"{i}:{INVOKE if i % 19 else ''}", "completion": f" {str(i)[::-1]}"} for i in range(1, 58)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(place, tmp_path):
    def make(method: dict[str, Any], out: str = "out", **keys: Any) -> Any:
        keys = {"steps": 8, "batch_size": 12, "save_every": 3, "eval_every": 50, "lr": 1e-2} | keys
        data = {"train": str(place / "d.jsonl"), "eval_share": 0.0}
        return make_config(
            {"model": str(place / "m"), "data": data, "method": method, "output": str(tmp_path / out), "train": keys}
        )

    return make


ALORA = {"name": "alora", "rank": 3, "invocation": INVOKE}
SMORA = {"name": "smora", "rank": 6, "active": 2, "speed": 0.01}


def test_the_invocation_may_be_text(config):
    outcome = train(config(ALORA, steps=20))
    ids = toy_tokenizer()(INVOKE, add_special_tokens=False)["input_ids"]
    adapter = ia.read(outcome.output)
    assert list(adapter.method["invocation"]) == ids
    insert: Any = next(iter(adapter.edits.values()))
    assert insert.inserted.invocation == tuple(ids)
    by_numbers = train(config(ALORA | {"invocation": ids}, out="numbers", steps=20))
    assert by_numbers.digest == outcome.digest


def test_rows_without_an_invocation_are_told(config):
    (warning,) = plan(config(ALORA)).warnings()
    assert f"3 of 57 rows to train on do not have {INVOKE!r}" in warning
    assert not plan(config(SMORA)).warnings()


@pytest.mark.parametrize(
    ("method", "words"),
    [(ALORA | {"invocation": ""}, "makes no token"), (ALORA | {"invocation": [-1]}, "invocation="), ({"name": "alora"}, "no invocation"),
     ({"name": "lora", "invocation": "x"}, "no field 'invocation'")],
)  # fmt: skip
def test_what_cannot_be_an_invocation_is_refused(config, method, words):
    with pytest.raises(ia.IntarsiaError, match=words):
        plan(config(method))


def test_texts_stay_texts_where_no_tokens_are_asked_for():
    given = {"name": "lora", "rank": 2, "scaling": "rslora"}
    assert registry.with_tokens(given, lambda text: [1]) == given
    inner = {"name": "dora", "inner": {"name": "lora", "scaling": "none"}}
    assert registry.with_tokens(inner, lambda text: [1]) == inner


@pytest.mark.parametrize("method", [SMORA, ALORA], ids=lambda m: m["name"])
def test_after_ctrl_c_the_same_command_ends_as_if_nothing_had_been(config, monkeypatch, method):
    whole = train(config(method, out="whole"))
    done: list[int] = []
    usual = trainer_module._AfterStep.on_step_end

    def on_step_end(self, args, state, control, **more):
        if state.global_step == 5 and not done:
            done.append(5)
            os.kill(os.getpid(), signal.SIGINT)
        usual(self, args, state, control, **more)

    monkeypatch.setattr(trainer_module._AfterStep, "on_step_end", on_step_end)
    with pytest.raises(TrainingStopped):
        train(config(method))
    outcome = train(config(method))
    assert outcome.resumed_from == 5
    assert outcome.digest == whole.digest


@pytest.mark.parametrize("method", [SMORA, ALORA], ids=lambda m: m["name"])
@pytest.mark.parametrize(
    "keys", [{"batch_size": 3, "accumulate": 4}, {"gradient_checkpointing": True}], ids=lambda k: next(iter(k))
)
def test_however_a_step_is_computed_it_is_the_same(config, method, keys):
    usual, other = train(config(method, out="a", steps=3)), train(config(method, out="b", steps=3, **keys))
    one, two = ia.read(usual.output).tensors(), ia.read(other.output).tensors()
    assert one.keys() == two.keys()
    moved = [name for name in one if name.endswith(".b") and bool(one[name].any())]
    assert bool(moved) == (method is SMORA)
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name
