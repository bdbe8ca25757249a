"""Training on top of transformers.Trainer. Ours are: what a checkpoint holds, how it is written, and what is reported.

A run that is killed at any moment and started again by the same command ends in the same adapter, to the bit, as the
run that was never killed: a checkpoint holds the adapter with its support, the optimizer, the schedule, the random
generators and the place in the data.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from intarsia import distributed, processes, store
from intarsia.allocators import Turns, told
from intarsia.calibrate import GATHERED, model_loss
from intarsia.errors import IntarsiaError
from intarsia.evaluate import answer_loss, answer_sums
from intarsia.model import activate, adapter_state, attach, attached_names, detach, export, load_adapter_state
from intarsia.pretrained import Pretrained
from intarsia.pretrained import load as load_pretrained
from intarsia.ticket import lottery
from intarsia.train import first as first_training
from intarsia.train.allocation import Allocation
from intarsia.train.config import Config
from intarsia.train.data import Example, collator
from intarsia.train.moving import MovingSupport
from intarsia.train.plan import Plan, original_name, plan
from intarsia.train.plots import loss_curve
from intarsia.train.progress import Log, Pace, Progress, clock
from intarsia.train.shares import Shares, blank
from intarsia.train.snapshots import FOLDER, put_in_place, smoothed_loss, snapshot_name
from intarsia.train.unfinished import LOG, Unfinished, step_of

ADAPTER = "default"  # its name on the model while it is trained
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "sgd": "sgd"}
REPORT, CURVE, CONFIG = "report.json", "loss.png", "config.yaml"


class TrainingStopped(KeyboardInterrupt):
    """A run that was asked to stop (Ctrl-C, SIGTERM) and has saved a checkpoint. ``exit_code``: as a shell gives it."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}; a checkpoint is saved, the same command goes on from there")
        self.step, self.exit_code = step, 128 + signal_number


class TrainingDiverged(IntarsiaError):
    """A run whose loss is no longer a finite number."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to. Losses are nats a trained token, over all held-out rows."""

    output: str
    digest: str  # of the adapter
    steps: int
    resumed_from: int | None  # step
    train_loss: float  # of the last step
    base_loss: float | None
    eval_loss: float | None
    trained: int  # numbers
    share: float  # of the base's numbers
    lr: float
    tokens: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)  # folders

    def __str__(self) -> str:
        held = (
            f", held-out loss {self.base_loss:.4f} -> {self.eval_loss:.4f}" if self.base_loss and self.eval_loss else ""
        )
        return f"{self.output}: {self.steps} steps in {clock(self.seconds)}{held}"


def train(
    config: Config,
    *,
    pretrained: Pretrained | None = None,
    progress: Progress | None = None,
    resume: Literal["auto", "never"] = "auto",
) -> Outcome:
    """Train one adapter and write it to ``config.output``, with the log, the loss curve, the config and a report.

    Started by torchrun or ``accelerate launch``, the processes share each batch, so that the adapter is that of one process up
    to rounding; the first one writes and shows progress, all of them call this and get the outcome.

    A run that was cut short is gone on with if ``<output>.unfinished`` holds its checkpoint; ``resume="never"`` begins
    anew. The global random generators are left as they were.

    Args:
        pretrained: a loaded model without adapters to train on, instead of loading the config's; given back as it was.

    Raises:
        IntarsiaError: for a mistake in the config, the data or the output, found before anything is written; for a
            checkpoint or an adapter that could not be written; for a loss that is not finite.
        TrainingStopped: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    _join()
    progress = progress if progress and processes.rank() == 0 else Progress()
    with progress, _own_randomness(), _quiet_libraries():
        ready = processes.first_then_all(lambda: plan(config, pretrained, progress))
        state = Unfinished(config.output)
        restart = resume == "never"
        processes.first_does(
            lambda: state.check(ready.settings, config.overwrite, restart, ready.estimate.checkpoint_bytes)
        )
        progress.say(str(ready.estimate))
        for warning in ready.warnings():
            progress.warn(warning)
        checkpoint = None if restart else processes.first_does(state.checkpoint)
        with _attached(ready, progress, checkpoint), processes.first_within(state.held(ready.settings, restart)):
            outcome = _Run(ready, state, progress).go()
        processes.first_does(state.remove)
        progress.say(str(outcome))
        return outcome


def _join() -> None:
    """Let the processes of a launcher know of each other, if nobody has done so yet."""
    if processes.launched() and not processes.started():
        PartialState(cpu=not torch.cuda.is_available())
    if (
        processes.started()
        and (seen := PartialState(cpu=not torch.cuda.is_available()).num_processes) != processes.count()
    ):
        raise IntarsiaError(
            f"accelerate sees {seen} process(es) where there are {processes.count()}; start them with torchrun or accelerate "
            "launch, or set RANK, LOCAL_RANK and WORLD_SIZE before the process group is made"
        )


class _Run:
    """The part of a run that writes."""

    def __init__(self, ready: Plan, state: Unfinished, progress: Progress) -> None:
        self.ready, self.state, self.progress = ready, state, progress
        self.model: nn.Module = ready.pretrained.model
        self.collate = collator(ready.pretrained.tokenizer)
        self.steps = ready.estimate.steps
        self.checkpoint: Path | None = processes.first_does(state.checkpoint)
        self.first = step_of(self.checkpoint) if self.checkpoint else 0
        processes.first_does(lambda: Log(state.folder / LOG).keep_until(self.first))
        self.log = Log(state.folder / LOG, writes=processes.rank() == 0)
        allocator = ready.allocator
        self.turns = Turns(self.model, ADAPTER, allocator, ready.config.seed) if allocator else None

    def go(self) -> Outcome:
        checkpoint, first = self.checkpoint, self.first
        base_loss = self._held_out(0, "base, held out") if self.ready.method.starts_as_identity else self._base_loss()
        if checkpoint:
            self.progress.say(f"going on from the checkpoint of step {first}")
            load_adapter_state(self.model, ADAPTER, load_file(checkpoint / "adapter.safetensors"))
            if self.turns is not None:
                self.turns.load_state_dict(load_file(checkpoint / "allocator.safetensors"))
            if first in self.ready.snapshots:  # the run may have ended between checkpoint and snapshot
                self.take_snapshot(first)
        if first < self.steps:
            self._steps(checkpoint, first)
        eval_loss = self._held_out(self.steps, "held out")
        return self._finish(base_loss, eval_loss, first or None)

    def scoring_loss(self, step: int) -> float:
        """The loss by which an allocator measures layers before a step: rows of the training data, drawn anew for every step."""
        rows, turns = self.ready.train, self.turns
        assert turns is not None
        chosen = turns.draws.some([1.0] * len(rows), turns.allocator.rows(), "rows", step)
        device = next(self.model.parameters()).device
        batch = {key: t.to(device) for key, t in self.collate([rows[number] for number in chosen]).items()}
        return float(model_loss(self.model, batch))

    def dealt(self, step: int, counts: Mapping[str, int]) -> None:
        """Say and log what the method has dealt out after a step."""
        what = self.ready.method.allots
        self.log.write("allocation", step=step, what=what, counts=dict(counts))
        self.progress.say(f"step {step}: {told(counts, what)}")

    def _steps(self, checkpoint: Path | None, first: int) -> None:
        with _Signals(self.progress) as signals, contextlib.ExitStack() as stack:
            if self.turns is not None:
                stack.callback(self.turns.end)
            trainer = AdapterTrainer(self, signals, first)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if signals.caught is not None:
                raise TrainingStopped(trainer.state.global_step, signals.caught)

    def _base_loss(self) -> float | None:
        activate(self.model)
        try:
            return self._held_out(0, "base, held out")
        finally:
            activate(self.model, ADAPTER)

    def _held_out(self, step: int, what: str) -> float | None:
        """The held-out loss after a step: from the log if it is known, otherwise computed and logged."""
        if not self.ready.held_out:
            return None
        known = [e["eval_loss"] for e in self.log.events if e["event"] == "eval" and e["step"] == step]
        if known:
            return float(known[-1])
        self.progress.work(0, len(self.ready.held_out), "evaluating")
        ready = self.ready
        loss = answer_loss(*self._answers(ready.held_out))
        self.log.write("eval", step=step, eval_loss=loss)
        self.progress.say(f"step {step}: {what} loss {loss:.4f}")
        return loss

    def _answers(self, examples: list[Example]) -> tuple[float, int]:
        """(summed loss, tokens) over all processes, each of which takes its share and makes as many forward passes."""
        size, count = self.ready.config.train.batch_size, processes.count()
        if count > 1:
            examples = sorted(examples, key=lambda e: len(e.input_ids))
            examples = [*examples, *[blank(examples[0])] * (-len(examples) % count)][processes.rank() :: count]
        loss, tokens = processes.summed(*answer_sums(self.model, self.ready.pretrained.tokenizer, examples, size))
        return loss, int(tokens)

    def take_snapshot(self, step: int) -> None:
        """Keep the adapter as it is after this step; see :mod:`intarsia.train.snapshots`."""
        begin = int(self.ready.config.train.snapshots_from * self.steps)
        after = max([begin, *(other for other in self.ready.snapshots if other < step)])
        note: dict[str, Any] = {"step": step, "loss": smoothed_loss(self.log.events, after, step)}
        eval_loss = self._held_out(step, "held out")
        note |= {} if eval_loss is None else {"eval_loss": eval_loss}
        adapter = self._adapter(snapshot_name(step), note)
        folder = self.state.folder / FOLDER / adapter.name
        processes.first_does(lambda: self._store(adapter, folder))
        self.progress.say(f"step {step}: snapshot, training loss {note['loss']:.4f}")

    def _adapter(self, called: str, note: dict[str, Any]) -> store.Adapter:
        adapter = export(self.model, ADAPTER, called=called, note=note)
        values = self.ready.config.save.values
        return adapter if values == "exact" else adapter.rounded(values)

    def _store(self, adapter: store.Adapter, folder: Path) -> None:
        try:
            store.write(adapter, folder, overwrite=True, coding=self.ready.config.save.coding)
        except IntarsiaError as error:
            raise IntarsiaError(f"{error}{self.state.after_failure()}") from error

    def _finish(self, base_loss: float | None, eval_loss: float | None, resumed_from: int | None) -> Outcome:
        ready, log = self.ready, self.log
        output = Path(ready.config.output)
        last = next(e for e in reversed(log.events) if e["event"] == "step")
        note = {
            "steps": self.steps,
            "learning rate": ready.estimate.lr,
            "rows trained on": len(ready.train),
            "shape of the rows": ready.reports[0].format,
            "training loss": last["loss"],
            **({"held-out loss": eval_loss, "held-out loss of the base": base_loss} if eval_loss is not None else {}),
        }
        adapter = self._adapter(output.name, note)
        outcome = Outcome(
            output=str(output),
            digest=adapter.digest,
            steps=self.steps,
            resumed_from=resumed_from,
            train_loss=last["loss"],
            base_loss=base_loss,
            eval_loss=eval_loss,
            trained=ready.estimate.trained,
            share=ready.estimate.share,
            lr=ready.estimate.lr,
            tokens=last["tokens"],
            seconds=last["seconds"],
            warnings=ready.warnings(),
            snapshots=[str(output / FOLDER / snapshot_name(step)) for step in ready.snapshots],
        )
        log.write("end", step=self.steps, output=str(output), digest=outcome.digest)
        processes.first_does(lambda: self._write(adapter, output, outcome))
        return outcome

    def _write(self, adapter: store.Adapter, output: Path, outcome: Outcome) -> None:
        ready, log = self.ready, self.log
        self.state.begin_saving(ready.settings)
        self._store(adapter, output)
        (output / LOG).write_bytes(log.path.read_bytes())
        (output / CONFIG).write_text(yaml.safe_dump(ready.config.model_dump(mode="json"), sort_keys=False))
        (output / REPORT).write_text(
            json.dumps(asdict(outcome) | {"data": [asdict(report) for report in ready.reports]}, indent=2) + "\n"
        )
        put_in_place(self.state.folder / FOLDER, output, ready.snapshots)
        loss_curve(log.events, output / CURVE, f"{output.name}: {ready.method.title} on {ready.pretrained.name}")


class AdapterTrainer(Trainer):
    """transformers.Trainer, whose checkpoints hold the adapter and nothing of the base, written whole or not at all."""

    def __init__(self, run: _Run, signals: _Signals, first: int) -> None:
        self.run, self.signals = run, signals
        self.aside: Path | None = None
        self.batch: dict[str, Any] = {}  # the last that was trained on
        self.pace = Pace(run.steps, first)
        self.counted = 0  # tokens of this process
        before = [e for e in run.log.events if e["event"] == "step"]
        self.tokens_before: int = before[-1]["tokens"] if before else 0
        self.seconds_before: float = before[-1]["seconds"] if before else 0.0
        self.begun = time.monotonic()
        super().__init__(
            model=run.model,
            args=_arguments(run),
            data_collator=run.collate,
            train_dataset=run.ready.train,
            eval_dataset=run.ready.held_out or None,
            callbacks=[
                Allocation(run.model, ADAPTER, turns=run.turns, loss=run.scoring_loss, report=run.dealt),
                MovingSupport(run.model, ADAPTER, lambda: [self._prepare_inputs(self.batch)]),
                _AfterStep(self),
            ],
        )
        self.remove_callback(PrinterCallback)

    # --- what a checkpoint holds, and how it is written and read

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        last = processes.first_does(self.run.state.checkpoint)
        if last and step_of(last) == step:
            return
        with processes.first_within(self.run.state.new_checkpoint(step)) as aside:
            self.aside = aside
            inner = aside / f"checkpoint-{step}"
            try:
                processes.all_do(lambda: self._save_part(model, trial))
                processes.first_does(lambda: _unpack(inner, aside))
            finally:
                self.aside = None

    def _save_part(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.aside or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: t.cpu().contiguous() for k, t in adapter_state(self.run.model, ADAPTER).items()}
        save_file(state, folder / "adapter.safetensors")
        if self.run.turns is not None:
            save_file(self.run.turns.state_dict(), folder / "allocator.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # _Run has loaded the adapter already

    # --- which rows a process gets

    def get_train_dataloader(self) -> Any:
        if processes.count() == 1:
            return super().get_train_dataloader()
        rows, config = self.run.ready.train, self.run.ready.config.train
        sampler = Shares(self._get_train_sampler(rows), config.batch_size, processes.rank(), processes.count())
        loader: Any = DataLoader(
            [*rows, blank(min(rows, key=lambda row: len(row.input_ids)))],  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self.run.collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(  # as for one process: the rows are shared already
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )

    # --- what is reported

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.counted += int(inputs["attention_mask"].sum())
        self.batch = dict(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:  # the summary at the end; ours is the report
            return
        step, loss = self.state.global_step, logs["loss"]
        self.pace.tokens = int(processes.summed(self.counted)[0])
        status = self.pace.after(step, loss=loss, lr=logs["learning_rate"])
        self.run.log.write(
            "step",
            step=step,
            loss=loss,
            lr=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens=self.tokens_before + self.pace.tokens,
            tokens_per_second=status.tokens_per_second,
            memory_bytes=status.memory,
            seconds=self.seconds_before + time.monotonic() - self.begun,
        )
        self.run.progress.step(status)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the loss is {loss} at step {step}: the training diverged. Lower train.lr (it is "
                f"{self.run.ready.estimate.lr:g}) and begin anew with resume='never' (--restart)"
            )

        if self.is_due() and not self.run.ready.held_out:  # otherwise after the evaluation that is to come
            self.run.take_snapshot(step)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        loss = self.run._held_out(self.state.global_step, "held out")
        if self.is_due():
            self.run.take_snapshot(self.state.global_step)
        return {"eval_loss": loss or math.nan}

    def is_due(self) -> bool:
        """Whether a snapshot is to be taken after this step."""
        return self.state.global_step in self.run.ready.snapshots

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        recipe, config = self.run.ready.optimizer, self.run.ready.config.train
        if recipe is not None and getattr(self, "optimizer", None) is None:
            self.optimizer = recipe.build(self.run.model, self.args.learning_rate, config.weight_decay)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        config = self.run.ready.config.train
        factor = functools.partial(schedule, steps=self.run.steps, warmup=config.warmup, kind=config.schedule)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # nobody reads it, and counting goes over all parameters at every step


class _AfterStep(TrainerCallback):
    """Moves the live line, and ends the run after a step if a signal came."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if state.global_step >= state.max_steps or trainer.is_due():
            control.should_log = True
        if trainer.is_due():
            control.should_evaluate = bool(trainer.run.ready.held_out)
        if not control.should_log:  # otherwise the line comes with the loss
            trainer.run.progress.step(trainer.pace.after(state.global_step))
        if trainer.signals.agree() is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class _Signals:
    """Within the block, Ctrl-C and SIGTERM are noted instead of obeyed; a second one is obeyed at once."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.caught: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agree(self) -> int | None:
        """The signal that any process has caught; from now on all of them have."""
        self.caught = processes.most(self.caught or 0) or None
        return self.caught

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number
        self.progress.warn("stopping after this step with a checkpoint; once more: stop at once, without one")


def _unpack(inner: Path, folder: Path) -> None:
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()


def _arguments(run: _Run) -> TrainingArguments:
    config = run.ready.config.train
    recompute = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else None
    recompute = recompute or "gradient_checkpointing"
    options = (
        {recompute: True, f"{recompute}_kwargs": {"use_reentrant": False}} if config.gradient_checkpointing else {}
    )
    arguments = TrainingArguments(
        output_dir=str(run.state.folder),
        max_steps=run.steps,
        per_device_train_batch_size=math.ceil(config.batch_size / processes.count()),
        gradient_accumulation_steps=config.accumulate,
        learning_rate=run.ready.estimate.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=OPTIMIZERS[
            config.optimizer if isinstance(config.optimizer, str) and not run.ready.optimizer else "adamw"
        ],
        seed=run.ready.config.seed,
        data_seed=run.ready.config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if run.ready.held_out else "no",
        eval_steps=config.eval_every or math.ceil(run.steps / 4),
        save_strategy="steps",
        save_steps=config.save_every or math.ceil(run.steps / 10),
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=next(run.model.parameters()).device.type == "cpu",
        ddp_find_unused_parameters=False,
        **options,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel copies modules, and a copy of a live weight is nobody's
    return arguments


def schedule(step: int, *, steps: int, warmup: float, kind: str) -> float:
    """The share of the highest learning rate in step 0, 1, ... No step is wasted at rate 0, as in common warmups."""
    rising = math.ceil(steps * warmup) if warmup < 1 else int(warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = min(1.0, (step - rising) / max(1, steps - rising))
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]


def calibration_batches(ready: Plan) -> list[dict[str, torch.Tensor]]:
    """Batches for methods that choose by gradients or inputs: rows taken evenly from the training data."""
    config = ready.config.train
    device = next(ready.pretrained.model.parameters()).device
    wanted = min(len(ready.train), config.batch_size * config.calibration_batches)
    rows = [ready.train[i * len(ready.train) // wanted] for i in range(wanted)]
    collate = collator(ready.pretrained.tokenizer)
    chunks = [rows[i : i + config.batch_size] for i in range(0, wanted, config.batch_size)]
    return [{k: t.to(device) for k, t in collate(chunk).items()} for chunk in chunks]


@contextlib.contextmanager
def _attached(ready: Plan, progress: Progress, checkpoint: Path | None) -> Iterator[None]:
    """Within the block the adapter is on the model; afterwards the model is as it came."""
    model = ready.pretrained.model
    caching, training = model.config.use_cache, model.training
    try:
        _attach(ready, progress, checkpoint)
        distributed.share_first(model)
        if ready.config.train.shard:
            distributed.shard(model)
        yield
    finally:
        if ADAPTER in attached_names(model):
            detach(model, ADAPTER)
        model.config.use_cache = caching
        model.train(training)


def _attach(ready: Plan, progress: Progress, checkpoint: Path | None) -> None:
    model, config = ready.pretrained.model, ready.config
    given: dict[str, Any] = {"name": ADAPTER, "exclude": config.exclude, "avoid": ready.avoid, "seed": config.seed}
    if "movement" not in ready.method.needs():
        data = calibration_batches(ready) if ready.method.needs() & GATHERED else None
        attach(
            model,
            ready.method,
            config.targets,
            **given,
            data=data,
            progress=progress.work,
            original=_original(ready, progress),
        )
    elif processes.count() > 1:
        raise IntarsiaError(
            f"{ready.method.name} by movement trains densely first, which works in one process only so far"
        )
    elif checkpoint:  # the first training lies behind it
        with first_training.marked(ready, checkpoint) as gathered:
            attach(model, ready.method, config.targets, **given, gathered=gathered, progress=progress.work)
    else:
        with torch.random.fork_rng():  # dropout, if there is any
            torch.manual_seed(config.seed)
            lottery(
                model, ready.method, lambda m: first_training.train_densely(ready, m, progress), config.targets, **given
            )


def _original(ready: Plan, progress: Progress) -> nn.Module | None:
    """The model before it was compressed, where the method computes from it; gone again when the adapter is attached."""
    name = original_name(ready.config)
    if "original" not in ready.method.needs() or name is None:
        return None
    model: nn.Module = load_pretrained(name, dtype=ready.config.dtype, progress=progress.say).model
    return model


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Whatever happens within, the global random generators are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """transformers and accelerate say nothing but errors."""
    level, accelerate = transformers_logging.get_verbosity(), logging.getLogger("accelerate")
    before = accelerate.level
    transformers_logging.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        accelerate.setLevel(before)
