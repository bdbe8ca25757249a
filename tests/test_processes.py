"""Two processes do what one does: the same adapter, the same files, the base's bits; and what they refuse."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import intarsia as ia
from intarsia import chain
from intarsia.forms import Sensed
from intarsia.train.trainer import train
from small import small_net, some_input, stir
from toy import save_toy
from two_processes import (
    COUNT,
    EVERY,
    LIVE,
    METHODS,
    SCENARIOS,
    STEPS,
    WRAPS,
    config,
    live_bits,
    optimizer_of,
    small_llama,
    stacks,
    train_steps,
    whole_run,
)

HERE = Path(__file__).parent
PATIENCE = 240  # seconds for all scenarios together; they take 15 on two idle cores
CLOSE = 1e-12  # float64, a few steps of Adam: sums of the same terms in another order
CLOSE_SINGLE = 1e-5  # float32, of values up to 1


def environment() -> dict[str, str]:
    """For processes on this machine's CPU."""
    paths = [str(HERE), str(Path(ia.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def together(program: Path, folder: Path) -> None:
    """Run a program in two processes under torchrun, which finds a free port. No process outlives this, whatever happens."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(COUNT), str(program), str(folder)]
    running = subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    try:
        launched, _ = running.communicate(timeout=PATIENCE)
        how = f"torchrun ended with exit code {running.returncode}"
    except subprocess.TimeoutExpired:
        launched, how = b"", f"they have not ended within {PATIENCE} s"
    finally:
        for pid in [*folder.glob("*.pid")]:  # torchrun gives each a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
        running.kill()
        running.wait()
    if running.returncode != 0:
        said = [f"process {path.stem}:\n{path.read_text(errors='replace')}" for path in sorted(folder.glob("?.txt"))]
        pytest.fail("\n\n".join([how, *said, launched.decode(errors="replace")]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have gone through every scenario."""
    folder: Path = tmp_path_factory.mktemp("together")
    save_toy(folder / "m")
    rows = [{"prompt": f"{i}:", "completion": f" {str(i)[::-1]}"} for i in range(60)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    together(HERE / "two_processes.py", folder)
    return folder


def results(place: Path, scenario: str) -> list[Any]:
    """What each process found."""
    assert scenario in [one.__name__ for one in SCENARIOS]
    return [torch.load(place / f"{scenario}.{rank}.pt") for rank in range(COUNT)]


def off(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The greatest difference."""
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


# ------------------------------------------------------------------ training
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_the_adapter_that_one_trains(place: Path, method: str, wrap: str) -> None:
    alone = whole_run(METHODS[method], lambda model: model, 0, 1)
    compare([found[f"{method}, {wrap}"] for found in results(place, "runs")], alone)


@pytest.mark.parametrize("method", EVERY)
def test_every_method_trains_on_a_sharded_base_as_on_a_whole_one(place: Path, method: str) -> None:
    alone = whole_run(EVERY[method], lambda model: model, 0, 1)
    several = [found[method] for found in results(place, "every_method")]
    if isinstance(
        EVERY[method], Sensed
    ):  # a mean over the processes of sums of absolute values, which is no sum over all rows
        for run in (*several, alone):
            run["state"] = {k: t for k, t in run["state"].items() if not k.endswith(("/importance", "/spread"))}
    compare(several, alone)


def compare(several: list[Any], alone: dict[str, Any]) -> None:
    """Each of several processes has what one has alone."""
    first, second = several
    for found in (first, second):
        assert off(found["state"], alone["state"]) < CLOSE
        assert off({"y": found["y"]}, {"y": alone["y"]}) < CLOSE
        assert torch.equal(found["y_base"], alone["y_base"])
        assert found["base"] == found["said"] == alone["base"]
        assert found["live"] == alone["live"]
        assert found["exact"]
    assert off(first["state"], second["state"]) == 0
    assert first["moved"] > 1e-3, "nothing was trained, so nothing was compared"


@pytest.mark.parametrize("kind", LIVE)
def test_values_are_set_into_shards_and_taken_out_to_the_bit(
    place: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ia, "shard", lambda model: model)
    alone = live_bits(0, place)[kind]
    for found in (one[kind] for one in results(place, "live_bits")):
        assert found["exact"]
        assert found["set in"].keys() == alone["set in"].keys()
        assert all(torch.equal(found["set in"][k], alone["set in"][k]) for k in alone["set in"])
        assert torch.equal(found["logits"], alone["logits"])


def test_stacks_and_rows_of_a_sharded_model_are_those_of_a_whole_one(place: Path) -> None:
    alone = stacks(0, place)
    for found in results(place, "stacks"):
        assert off(found, alone) < CLOSE


# ------------------------------------------------------------------ files
def test_a_sharded_model_saves_the_adapter_that_a_whole_one_saves(place: Path) -> None:
    model = small_net(torch.float64)
    ia.attach(model, METHODS["elements"])
    stir(model)
    saved = ia.read(place / "saved")
    assert saved.digest == ia.export(model).digest
    assert [found["digest"] for found in results(place, "saving")] == [saved.digest] * COUNT
    ia.detach(model, "default")
    ia.load(model, place / "saved")  # the base is the same, or this would be refused


@pytest.mark.parametrize("kind", METHODS)
def test_a_checkpoint_of_two_processes_goes_on_in_one(place: Path, kind: str) -> None:
    alone = whole_run(METHODS[kind], lambda model: model, 0, 1)
    model = small_net(torch.float64)
    ia.attach(model, METHODS[kind], seed=1)
    optimizer = optimizer_of(model)
    extra = ia.load_checkpoint(model, place / f"checkpoint {kind}", optimizer)
    train_steps(model, optimizer, some_input(torch.float64, 8, 3, 16), range(extra["step"], STEPS))
    assert off(ia.adapter_state(model, "default"), alone["state"]) < CLOSE
    for found in results(place, "checkpoints"):
        assert off(found[kind], alone["state"]) < CLOSE
    assert len(list((place / f"checkpoint {kind}").glob("*.distcp"))) == COUNT  # each wrote its part


def test_a_checkpoint_of_one_process_goes_on_in_one(tmp_path: Path) -> None:
    x = some_input(torch.float64, 8, 3, 16)
    model = small_net(torch.float64)
    ia.attach(model, METHODS["elements"])
    optimizer = optimizer_of(model)
    train_steps(model, optimizer, x, range(2))
    ia.save_checkpoint(model, tmp_path / "c", optimizer)
    train_steps(model, optimizer, x, range(2, 4))
    other = small_net(torch.float64)
    ia.attach(other, METHODS["elements"], seed=3)
    optimizer = optimizer_of(other)
    assert ia.load_checkpoint(other, tmp_path / "c", optimizer) == {}
    train_steps(other, optimizer, x, range(2, 4))
    assert off(ia.adapter_state(other, "default"), ia.adapter_state(model, "default")) == 0
    with pytest.raises(ia.IntarsiaError, match="exists already"):
        ia.save_checkpoint(other, tmp_path / "c", optimizer)


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model = small_net()
    ia.attach(model, ia.Shira(density=0.1))
    optimizer = optimizer_of(model)
    train_steps(model, optimizer, some_input(), range(1))
    ia.save_checkpoint(model, tmp_path / "with", optimizer)
    ia.save_checkpoint(model, tmp_path / "without")
    before = {k: t.clone() for k, t in ia.adapter_state(model, "default").items()}
    more = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ia.IntarsiaError, match="also trains what does not belong"):
        ia.save_checkpoint(model, tmp_path / "more", more)
    with pytest.raises(ia.IntarsiaError, match="no plain JSON"):
        ia.save_checkpoint(model, tmp_path / "more", extra={"x": object()})
    assert not (tmp_path / "more").exists()
    with pytest.raises(ia.IntarsiaError, match="holds no optimizer state"):
        ia.load_checkpoint(model, tmp_path / "without", optimizer)
    with pytest.raises(ia.IntarsiaError, match="this is SGD"):
        ia.load_checkpoint(model, tmp_path / "with", torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1))
    with pytest.raises(ia.IntarsiaError, match="is not a checkpoint"):
        ia.load_checkpoint(model, tmp_path)
    with pytest.raises(ia.IntarsiaError, match="did you mean 'default'"):
        ia.load_checkpoint(model, tmp_path / "with", name="defualt")
    other = small_net()
    ia.attach(other, ia.Shira(density=0.2))
    with pytest.raises(ia.IntarsiaError, match="holds an adapter of"):
        ia.load_checkpoint(other, tmp_path / "with")
    assert off(ia.adapter_state(model, "default"), before) == 0


# ------------------------------------------------------------------ the trainer
def test_a_run_of_two_processes_is_the_run_of_one(place: Path, tmp_path: Path) -> None:
    alone = config(place, "one")
    outcome = train(alone)
    expected, found = ia.read(outcome.output).tensors(), ia.read(place / "ddp").tensors()
    for k, tensor in expected.items():
        if k.endswith("indices"):
            assert torch.equal(found[k], tensor)
    assert off(found, expected) < CLOSE_SINGLE
    first, second = results(place, "trainings")
    assert first == second
    assert first["losses"] == pytest.approx(
        (outcome.base_loss, outcome.eval_loss, outcome.train_loss, first["losses"][3]), rel=1e-5
    )
    assert outcome.tokens <= first["losses"][3] < 1.1 * outcome.tokens  # rows that weigh nothing are counted too
    assert ia.read(place / "ddp").base == ia.read(outcome.output).base
    steps = [json.loads(line) for line in (place / "ddp" / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in steps if e["event"] == "step"] == list(range(1, 8))  # one process writes


def test_a_sharded_run_that_one_process_was_told_to_stop_goes_on_to_the_same_adapter(place: Path) -> None:
    first, second = results(place, "trainings")
    assert first == second
    assert first["stopped"] == first["resumed from"] == 4
    assert off(ia.read(place / "shard").tensors(), ia.read(place / "ddp").tensors()) < CLOSE_SINGLE
    assert not (place / "shard.unfinished").exists()


def test_one_process_speaks_on_the_command_line(place: Path) -> None:
    first, second = results(place, "command_line")
    assert first["mistake"]["code"] == second["mistake"]["code"] == 2
    assert "cannot move with several processes" in first["mistake"]["messages"]
    assert first["run"]["code"] == second["run"]["code"] == 0
    assert "step 7/7" in first["run"]["messages"]
    assert "sha256" in first["run"]["out"]
    for said in (second["mistake"], second["run"]):
        assert said["out"] == said["messages"] == ""
    assert first["left"]
    assert second["left"]
    assert ia.read(place / "cli").digest == results(place, "trainings")[0]["whole"]


def test_the_page_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = HERE.parent / "docs" / "processes.md"
    _, loading = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert ia.read(place / "out" / "skill").touched  # two processes have run the program
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["load.py", str(place / "m")])
    names: dict[str, Any] = {"AutoModelForCausalLM": AutoModelForCausalLM, "ia": ia, "sys": sys, "torch": torch}
    exec(compile(loading, str(page), "exec"), names)
    assert names["step"] == 1
    assert ia.digest(names["model"]) == ia.read(place / "out" / "skill").base.digest


# ------------------------------------------------------------------ refusals
REFUSED = {
    "sharded first": "up: its weight is sharded over processes already; attach or load first, then call intarsia.shard",
    "sharded first, deck": "its weight is sharded over processes already",
    "other seeds": "these tensors differ between the processes",
    "other seeds, replicate": "adapter default again/index",
    "other bases": "base down.weight",
    "nothing attached": "no adapter is attached",
    "another model's block": "blocks: Linear is not a module inside this Sequential",
    "a layer as a block": "blocks: up is a AdaptedLinear",
    "ignored parameters": "leave these out",
    "sharded twice": "sharded already; attach every adapter first",
    "another adapter": "its weight is sharded over processes already",
    "save over what is there": "exists already",
    "values by hand": "is out of date",
}


def test_what_two_processes_refuse(place: Path) -> None:
    for said in results(place, "refusals"):
        assert said.keys() == REFUSED.keys()
        for name, words in REFUSED.items():
            assert words in said[name], name


def test_one_process_has_nothing_to_shard(tmp_path: Path) -> None:
    model = small_net()
    ia.attach(model, ia.Lora(rank=2))
    for act in (ia.shard, ia.replicate):
        with pytest.raises(ia.IntarsiaError, match=r"needs a process group: start the program with torchrun"):
            act(model)
    save_toy(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ia.IntarsiaError, match=r"train.shard needs several processes"):
        train(config(tmp_path, "out", shard=True))


def test_the_blocks_of_a_transformer_are_found() -> None:
    from intarsia.distributed import _blocks

    model = small_llama()
    assert _blocks(model) == list(model.model.layers)
    model._no_split_modules = None
    assert _blocks(model) == list(model.model.layers)
    assert _blocks(small_net()) == []


# ------------------------------------------------------------------ one process
def test_weights_that_are_written_with_the_same_bits_stay_up_to_date() -> None:
    model = small_net(torch.bfloat16)
    ia.attach(model, ia.Shira(density=0.1))
    stir(model)
    layer: Any = model.get_submodule("up")
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clone())  # as DistributedDataParallel does when it is made
    assert chain.versions(layer) != layer.written
    model(some_input(torch.bfloat16))
    assert chain.versions(layer) == layer.written
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(ia.IntarsiaError, match="out of date"):
        model(some_input(torch.bfloat16))


def test_supports_are_not_sent_around_by_ddp_and_detaching_leaves_no_trace() -> None:
    model: Any = small_net()
    ia.attach(model, ia.Shira(density=0.1))
    assert model._ddp_params_and_buffers_to_ignore == [f"{s}.adapters.default.index" for s in ("up", "down", "again")]
    ia.detach(model, "default")
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    ia.attach(model, ia.Shira(density=0.1))
    assert model._ddp_params_and_buffers_to_ignore[0] == "mine"
    ia.detach(model, "default")
    assert model._ddp_params_and_buffers_to_ignore == ["mine"]
    assert isinstance(model, nn.Sequential)
