"""Whole runs on a tiny model: what they learn, write, refuse, and how they go on after an end of any kind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import intarsia as ia
from intarsia import pretrained
from intarsia.errors import IntarsiaError
from intarsia.evaluate import held_out_loss
from intarsia.train import first as first_module
from intarsia.train import trainer as trainer_module
from intarsia.train import unfinished
from intarsia.train.config import make_config
from intarsia.train.plan import plan, show_batch
from intarsia.train.progress import Progress
from intarsia.train.trainer import TrainingStopped, schedule, train
from toy import save_toy

STEPS = 11  # with 57 rows in batches of 12, an epoch is 5 steps: the run ends inside the third


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model ``m`` and data ``d.jsonl``."""
    folder = tmp_path_factory.mktemp("training")
    save_toy(folder / "m")
    rows = [{"prompt": f"{i}:", "completion": f" {str(i)[::-1]}"} for i in range(60)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(place, tmp_path):
    def make(method="shira", *, overwrite=False, out="out", data=None, save=None, allocator=None, **train_keys):
        method = {"name": method} if isinstance(method, str) else method
        method = {"name": "shira", "density": 0.1} | method if method["name"] == "shira" else method
        train_keys = {"steps": STEPS, "batch_size": 12, "save_every": 3, "eval_every": 50, "lr": 1e-2} | train_keys
        return make_config(
            {
                "model": str(place / "m"),
                "data": data or str(place / "d.jsonl"),
                "method": method,
                "output": str(tmp_path / out),
                "overwrite": overwrite,
                "train": train_keys,
                "save": save or {},
                "allocator": allocator,
            }
        )

    return make


def after_step(monkeypatch, step: int, act) -> None:
    """Call ``act`` at the end of a step, once."""
    done: list[int] = []
    usual = trainer_module._AfterStep.on_step_end

    def on_step_end(self, args, state, control, **more):
        if state.global_step == step and not done:
            done.append(step)
            act()
        usual(self, args, state, control, **more)

    monkeypatch.setattr(trainer_module._AfterStep, "on_step_end", on_step_end)


class Heard(Progress):
    def __init__(self):
        self.said: list[str] = []
        self.warned: list[str] = []
        self.steps: list[int] = []

    def say(self, text):
        self.said.append(text)

    def warn(self, text):
        self.warned.append(text)

    def step(self, status):
        self.steps.append(status.step)


def losses(outcome) -> list[tuple[int, float]]:
    """(step, training loss) as the log of a finished run has them."""
    lines = (Path(outcome.output) / "log.jsonl").read_text().splitlines()
    return [(e["step"], e["loss"]) for e in map(json.loads, lines) if e["event"] == "step"]


METHODS = [
    {"name": "shira", "scorer": "snip"},
    {"name": "shira", "schedule": "drop-and-grow", "every": 2, "swap": 0.3},
    {"name": "paca", "rank": 3},
    {"name": "lora", "rank": 3},
    {"name": "dora", "inner": {"name": "shira", "density": 0.1}},
]


# --- a whole run


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["name"])
def test_a_run_learns_and_writes_an_adapter_that_gives_the_loss_it_reports(config, place, method):
    wanted = config(method, steps=30)
    outcome = train(wanted)
    assert outcome.eval_loss is not None
    assert outcome.base_loss is not None
    assert outcome.eval_loss < outcome.base_loss - 0.2
    base = pretrained.load(place / "m")
    ready = plan(wanted, base)
    assert held_out_loss(base.model, base.tokenizer, ready.held_out) == pytest.approx(outcome.base_loss, abs=1e-6)
    ia.load(base.model, outcome.output)
    assert held_out_loss(base.model, base.tokenizer, ready.held_out) == pytest.approx(outcome.eval_loss, abs=1e-6)
    assert ia.read(outcome.output).digest == outcome.digest


def test_the_output_folder_holds_adapter_log_curve_config_and_report(config, tmp_path):
    outcome = train(config())
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == {
        *("adapter.json", "adapter.safetensors", "README.md"),
        *("log.jsonl", "loss.png", "config.yaml", "report.json"),
    }
    assert not (tmp_path / "out.unfinished").exists()
    events = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, STEPS + 1))
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory_bytes", "seconds"} <= steps[0].keys()
    assert [e["step"] for e in events if e["event"] == "eval"] == [0, STEPS]
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["digest"] == outcome.digest
    assert report["data"][0]["used"] == 60
    assert "held-out loss of the base" in (tmp_path / "out/README.md").read_text()


def test_the_config_that_is_written_gives_the_same_adapter(config, tmp_path):
    from intarsia.train.config import load_config

    outcome = train(config())
    again = load_config(tmp_path / "out/config.yaml", [f"output={tmp_path / 'again'}"])
    assert train(again).digest == outcome.digest


def test_the_seed_decides_and_the_global_generators_do_not(config):
    torch.manual_seed(1)
    first = train(config(out="a"))
    torch.manual_seed(2)
    random.seed(2)
    assert train(config(out="b")).digest == first.digest
    other = config(out="c").model_copy(update={"seed": 1})
    assert train(other).digest != first.digest


def test_the_global_generators_are_left_as_they_were(config):
    before = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    train(config(steps=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state()) == before[2]


def test_a_given_model_is_given_back_as_it_was(config, place):
    base = pretrained.load(place / "m")
    before = (ia.digest(base.model), base.model.training, base.model.config.use_cache)
    outcome = train(config(), pretrained=base)
    assert (ia.digest(base.model), base.model.training, base.model.config.use_cache) == before
    assert ia.attached_names(base.model) == []
    assert train(config(out="other")).digest == outcome.digest
    ia.attach(base.model, ia.Lora(rank=2))
    with pytest.raises(IntarsiaError, match="has adapters already"):
        train(config(out="third"), pretrained=base)


def test_accumulation_equals_one_large_batch(config):
    large = train(config(out="a", steps=4, batch_size=12, accumulate=1))
    small = train(config(out="b", steps=4, batch_size=3, accumulate=4))
    one, other = ia.read(large.output).tensors(), ia.read(small.output).tensors()
    for name in one:
        assert torch.allclose(one[name], other[name], atol=1e-5), name


def test_gradient_checkpointing_changes_nothing(config):
    usual = train(config(out="a", steps=4))
    assert train(config(out="b", steps=4, gradient_checkpointing=True)).digest == usual.digest


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_other_optimizers_train_too(config, optimizer):
    outcome = train(config(optimizer=optimizer, lr=0.1))
    assert outcome.eval_loss is not None
    assert outcome.base_loss is not None
    assert outcome.eval_loss < outcome.base_loss


def test_progress_hears_every_step_and_the_losses(config):
    heard = Heard()
    outcome = train(config(log_every=4), progress=heard)
    assert [step for step, _ in losses(outcome)] == [4, 8, STEPS]
    assert heard.steps == list(range(1, STEPS + 1))
    assert any("numbers trained at 14 weights" in line for line in heard.said)
    assert any(line.startswith(f"step {STEPS}: held out loss") for line in heard.said)
    assert heard.warned == []


def test_a_learning_rate_far_too_low_is_warned_of(config):
    heard = Heard()
    outcome = train(config(lr=1e-4, steps=1), progress=heard)
    assert "40 times below" in heard.warned[0]
    assert outcome.warnings == heard.warned


def test_the_methods_own_learning_rate_is_the_default(config):
    assert plan(config(lr=None)).estimate.lr == ia.Shira.default_lr


def test_the_estimate_is_what_happens(config):
    wanted = config(epochs=2, steps=None)
    estimate = plan(wanted).estimate
    outcome = train(wanted)
    assert (estimate.trained, estimate.steps, estimate.lr) == (outcome.trained, outcome.steps, outcome.lr)
    assert estimate.steps == 10
    assert estimate.tokens == outcome.tokens  # two whole epochs
    assert sum(t.numel() for k, t in ia.read(outcome.output).tensors().items() if "values" in k) == estimate.trained


def test_held_out_rows_are_not_trained_on(config):
    ready = plan(config())
    assert len(ready.train) == 57
    assert len(ready.held_out) == 3
    assert not {e.number for e in ready.train} & {e.number for e in ready.held_out}


def test_an_eval_file_is_used_instead_of_a_share(config, place):
    data = {"train": str(place / "d.jsonl"), "eval": str(place / "d.jsonl"), "eval_rows": 7}
    ready = plan(config(data=data))
    assert (len(ready.train), len(ready.held_out)) == (60, 7)


def test_without_held_out_rows_there_is_no_held_out_loss(config, place):
    outcome = train(config(steps=2, data={"train": str(place / "d.jsonl"), "eval_share": 0.0}))
    assert outcome.eval_loss is None
    assert outcome.base_loss is None


def test_show_batch_shows_the_rows_that_are_trained(config):
    assert "row 1: " in str(show_batch(config()))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_schedule(kind, expected):
    found = [schedule(i, steps=6, warmup=2, kind=kind) for i in range(6)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert schedule(0, steps=6, warmup=0.3, kind=kind) == pytest.approx(1 / 3)  # a share: 2 of 6
    assert schedule(0, steps=6, warmup=0, kind=kind) == 1


# --- ends of all kinds


def test_a_checkpoint_holds_nothing_of_the_base(config, monkeypatch, tmp_path):
    sizes = {}

    def look():
        folder = tmp_path / "out.unfinished/checkpoint-6"
        sizes.update({p.name: p.stat().st_size for p in folder.iterdir()})
        with safe_open(folder / "adapter.safetensors", "pt") as file:
            sizes["names"] = list(file.keys())

    after_step(monkeypatch, 8, look)
    outcome = train(config())
    names = sizes.pop("names")
    assert all(name.endswith(("/values", "/index")) for name in names)
    assert sum(sizes.values()) < 8 * 8 * outcome.trained  # values, indices, two moments; far below the base
    assert {"adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} == set(sizes)


STATEFUL = [  # what a step does depends on the steps before it
    ({"name": "mosa-sparse-adapters", "rank": 3}, 5),
    ({"name": "snella", "rank": 4, "sparsity": 0.6, "every": 4}, 6),
    ({"name": "sora", "rank": 4, "lam": 5.0, "stages": 3, "last": 20.0}, 5),
    ({"name": "s2-lora", "rank": 4}, 5),
    ({"name": "dylora", "rank": 4, "update": "frozen"}, 5),
    ({"name": "increlora", "target": 2, "top": 3, "warm": 4}, 5),
]


@pytest.mark.parametrize(  # in an epoch, at its end, at the end of the next, at the end of all
    ("method", "step"),
    [*zip(METHODS, (2, 5, 5, 10, STEPS), strict=True), (METHODS[0], 5), (METHODS[0], STEPS), *STATEFUL],
)
def test_ctrl_c_saves_a_checkpoint_and_the_same_command_ends_as_if_nothing_had_been(config, monkeypatch, method, step):
    whole = train(config(method, out="whole"))
    after_step(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
    heard = Heard()
    with pytest.raises(TrainingStopped, match=f"stopped after step {step}; .*same command") as stopped:
        train(config(method), progress=heard)
    assert stopped.value.exit_code == 130
    assert "stopping after this step" in heard.warned[0]
    assert not Path(config(method).output).exists()
    outcome = train(config(method))
    assert outcome.resumed_from == step
    assert outcome.digest == whole.digest
    assert (outcome.tokens, outcome.eval_loss, outcome.base_loss) == (whole.tokens, whole.eval_loss, whole.base_loss)
    assert losses(outcome) == losses(whole)


def test_ctrl_c_does_not_wait_for_an_evaluation(config, monkeypatch):
    after_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    heard = Heard()
    with pytest.raises(TrainingStopped) as stopped:
        train(config(eval_every=2), progress=heard)
    assert stopped.value.exit_code == 143
    assert [line.split(":")[0] for line in heard.said if "held out" in line and "loss" in line] == ["step 0", "step 2"]


def test_a_second_ctrl_c_stops_at_once(config, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after_step(monkeypatch, 5, twice)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(config())
    assert not isinstance(stopped.value, TrainingStopped)
    monkeypatch.undo()
    assert train(config()).resumed_from == 3


def test_the_usual_signal_handlers_are_back_afterwards(config):
    before = signal.getsignal(signal.SIGINT)
    train(config(steps=1))
    assert signal.getsignal(signal.SIGINT) is before


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from intarsia.train import trainer, unfinished
from intarsia.train.config import load_config

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "writing":  # half of the second checkpoint's files are there
    usual, count = unfinished._flush, [0]
    def flush(path):
        count[0] += 1
        die() if count[0] == 10 else usual(path)
    unfinished._flush = flush
else:
    trainer.AdapterTrainer.training_step = lambda self, *a, **k: (
        die() if self.state.global_step == 8 else trainer.Trainer.training_step(self, *a, **k))
trainer.train(load_config(sys.argv[2]))
"""


def test_after_kill_9_the_same_command_gives_the_same_digest(config, tmp_path):
    import yaml

    wanted = config({"name": "shira", "scorer": "snip"})
    whole = train(config({"name": "shira", "scorer": "snip"}, out="whole"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    state = unfinished.Unfinished(wanted.output)
    for moment, kept in (("writing", 3), ("stepping", 6)):
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "run.yaml"), moment]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        assert child.returncode == -signal.SIGKILL, child.stderr
        last = state.checkpoint()
        assert last is not None
        assert unfinished.step_of(last) == kept
        assert (state.folder / "writing").exists() == (moment == "writing")
        assert not Path(wanted.output).exists()
    outcome = train(wanted)
    assert outcome.resumed_from == 6
    assert outcome.digest == whole.digest
    assert losses(outcome) == losses(whole)


def test_a_kill_between_saving_and_cleaning_up_is_gone_on_from(config, monkeypatch):
    monkeypatch.setattr(unfinished.Unfinished, "remove", lambda self: None)
    first = train(config())
    monkeypatch.undo()
    again = train(config())  # no overwrite: the output is this run's own
    assert again.digest == first.digest
    assert again.resumed_from == STEPS
    with pytest.raises(IntarsiaError, match="exists already"):
        train(config())


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch", "save"), ("intarsia.train.trainer", "save_file"), ("intarsia.train.unfinished", "_flush")],
)
def test_a_full_disk_while_writing_a_checkpoint_keeps_the_one_before(config, monkeypatch, module, name):
    whole = train(config(out="whole"))
    after_step(monkeypatch, 5, lambda: monkeypatch.setattr(sys.modules[module], name, full_disk))
    with pytest.raises(IntarsiaError, match=r"step 6 could not be written .*No space left.* step 3 is whole"):
        train(config())
    monkeypatch.undo()
    state = unfinished.Unfinished(config().output)
    last = state.checkpoint()
    assert last is not None
    assert unfinished.step_of(last) == 3
    assert not (state.folder / "writing").exists()
    outcome = train(config())
    assert outcome.resumed_from == 3
    assert outcome.digest == whole.digest


TURNS = {"name": "ist", "share": 0.5, "interval": 2, "candidates": 2, "batch": 6}


@pytest.mark.parametrize(
    "method", [{"name": "lora", "rank": 3}, {"name": "shira", "scorer": "snip"}], ids=lambda m: m["name"]
)
def test_a_run_with_an_allocator_ends_as_if_it_had_never_been_stopped(config, monkeypatch, method):
    whole = train(config(method, out="whole", allocator=TURNS))
    assert whole.digest != train(config(method, out="all")).digest
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingStopped):
        train(config(method, allocator=TURNS))
    with pytest.raises(IntarsiaError, match=r"allocator\.share was 0\.5, is now 0\.25"):
        train(config(method, allocator=TURNS | {"share": 0.25}))
    outcome = train(config(method, allocator=TURNS))
    assert outcome.resumed_from == 5
    assert outcome.digest == whole.digest
    assert losses(outcome) == losses(whole)


def test_what_a_method_deals_out_is_logged(config):
    heard = Heard()
    outcome = train(config({"name": "snella", "rank": 2, "every": 4}), progress=heard)
    lines = (Path(outcome.output) / "log.jsonl").read_text().splitlines()
    dealt = [e for e in map(json.loads, lines) if e["event"] == "allocation"]
    assert [e["step"] for e in dealt] == [1, 4, 8, STEPS]
    assert dealt[-1]["what"] == "entries"
    assert sum(dealt[-1]["counts"].values()) == round(
        0.1 * sum(layer.shape[0] * layer.shape[1] for layer in ia.read(outcome.output).edits.values())
    )
    assert any(said.startswith("step 4: ") and "entries" in said for said in heard.said)


def test_the_adapter_is_written_as_the_config_says(config):
    exact = ia.read(train(config(steps=2)).output)
    outcome = train(config(steps=2, out="small", save={"values": "bfloat16", "coding": "plain"}))
    rounded = ia.read(outcome.output)
    assert rounded.digest == outcome.digest == exact.rounded("bfloat16").digest
    assert rounded.about["rounded"] == "bfloat16"
    assert json.loads((Path(outcome.output) / "adapter.json").read_text())["codings"] == {}


def test_a_full_disk_while_saving_the_adapter_keeps_the_one_before_and_the_training(config, monkeypatch):
    from intarsia.store import writing as store

    first = train(config())
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", full_disk)
        with pytest.raises(IntarsiaError, match=r"No space left.*step 4 is whole; the same command goes on"):
            train(config(overwrite=True, steps=4))
    assert ia.read(first.output).digest == first.digest
    outcome = train(config(overwrite=True, steps=4))
    assert outcome.resumed_from == 4
    assert outcome.digest != first.digest


def test_too_little_space_is_said_before_the_run(config, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(IntarsiaError, match="1,000 bytes are free"):
        train(config())
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_stops_and_says_so(config):
    with pytest.raises(IntarsiaError, match=r"diverged. Lower train.lr \(it is 1e\+30\)"):
        train(config("lora", lr=1e30))


# --- refusals: before anything is written


def test_an_output_that_exists_is_refused_unless_told(config, tmp_path):
    first = train(config())
    kept = (tmp_path / "out/adapter.json").read_bytes()
    with pytest.raises(IntarsiaError, match=r"out' exists already.*--overwrite"):
        train(config(steps=2))
    assert (tmp_path / "out/adapter.json").read_bytes() == kept
    assert train(config(steps=2, overwrite=True)).digest != first.digest


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_adapter_is_never_overwritten(config, tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(IntarsiaError, match="exists already|is not an adapter folder"):
        train(config(overwrite=overwrite))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_other_settings_do_not_go_on_with_an_unfinished_run(config, monkeypatch, tmp_path):
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingStopped):
        train(config())
    with pytest.raises(IntarsiaError, match=r"train.lr was 0.01, is now 0.02\n.*--restart") as caught:
        train(config(lr=2e-2))
    assert str(caught.value).count(", is now ") == 1
    fresh = train(config(lr=2e-2), resume="never")
    assert fresh.resumed_from is None
    assert fresh.digest == train(config(lr=2e-2, out="whole")).digest


def test_changed_data_does_not_go_on_with_an_unfinished_run(config, monkeypatch, place, tmp_path):
    data = tmp_path / "own.jsonl"
    data.write_bytes((place / "d.jsonl").read_bytes())
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingStopped):
        train(config(data=str(data)))
    data.write_text(data.read_text().replace("1:", "1 :"))
    with pytest.raises(IntarsiaError, match=r"contents of data.train was \w{12}\.\.\., is now \w{12}"):
        train(config(data=str(data)))


def test_what_is_free_may_change_on_the_way(config, monkeypatch):
    whole = train(config(out="whole"))
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingStopped):
        train(config())
    assert train(config(save_every=4, eval_every=2, log_every=3)).digest == whole.digest


def test_two_processes_do_not_train_towards_one_output(config):
    ready = plan(config())
    state = unfinished.Unfinished(config().output)
    with state.held(ready.settings, False), pytest.raises(IntarsiaError, match="another process is training"):
        train(config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"name": "shirra"}}, "did you mean 'shira'"),
        ({"method": {"name": "shira", "densty": 0.1}}, "no field 'densty'"),
        ({"method": {"name": "shira", "density": 0.0}}, "density"),
        ({"method": {"name": "shira", "density": 1e-9}}, "none of the"),
        ({"targets": "*.q_prj"}, "q_prj"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"dtype": "float32", "data": {"train": "absent.jsonl"}}, "absent.jsonl"),
        ({"output": __file__ + "/out"}, "cannot be written to"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(config, tmp_path, change, message):
    tree = config().model_dump(mode="json") | change
    with pytest.raises(IntarsiaError, match=message):
        train(make_config(tree))
    assert list(tmp_path.iterdir()) == []


# --- a lottery


def test_a_lottery_from_a_config_trains_densely_first_and_goes_on_without_it(config, monkeypatch):
    """Cut short and gone on with, it is the same adapter; the dense training is done once, and its steps count."""
    method, calls = {"name": "lt-sft", "density": 0.05}, []
    real = first_module.train_densely

    def train_densely(*given):
        calls.append(1)
        return real(*given)

    monkeypatch.setattr(first_module, "train_densely", train_densely)
    first = {"steps": 3, "lr": 1e-3}
    whole = train(config(method, out="whole", first=first))
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingStopped):
        train(config(method, first=first))
    assert len(calls) == 2
    cut = train(config(method, first=first))
    assert len(calls) == 2
    assert cut.digest == whole.digest
    other = train(config(method, out="other", first={"steps": 1, "lr": 1e-3}))
    assert other.digest != whole.digest
    edits = ia.read(whole.output).edits
    assert sum(edit.touched for edit in edits.values()) == whole.trained


def test_the_dense_training_moves_bfloat16_weights_by_less_than_they_show(place, config):
    """The support comes from float32 masters: steps of 1e-6 leave every bfloat16 weight as it was."""
    given = config("lt-sft", first={"steps": 2, "lr": 1e-7}, steps=1, save_every=1)
    outcome = train(given.model_copy(update={"dtype": "bfloat16"}))
    assert outcome.trained > 0
