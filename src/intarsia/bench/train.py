"""What a training step costs: every contender on one base, in one run, in alternating order.

In every round each contender has one visit, in an order shuffled anew by a fixed seed: one step that is not timed, then
some that are. Times are compared within a round, and the median of those ratios is what is reported, so that a machine
that grows slower or busier hits all alike. Memory is measured once, before the timing.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia import pretrained
from intarsia.bench import contenders as ours
from intarsia.bench import others
from intarsia.bench.contenders import Base, Contender, Subject, Unavailable
from intarsia.bench.costs import Cost, Costs
from intarsia.bench.machine import machine
from intarsia.bench.memory import Peak, kept_bytes, storage_bytes
from intarsia.bench.models import random_llama, ready, size_of
from intarsia.bench.wanted import method_config
from intarsia.errors import IntarsiaError, nearest
from intarsia.train.progress import Progress, clock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """What is timed, and how often.

    Attributes:
        size: of a Llama of random weights; see :data:`intarsia.bench.models.SIZES`.
        model: a model by name instead, as :func:`intarsia.pretrained.load` knows it.
        dtype: float32, bfloat16, or both, one after the other.
        device: cpu or cuda; by default CUDA where there is one.
        only: names or globs of contenders, all by default.
        methods: further contenders, as ``"shira density=0.02 granularity=tile"``.
        rounds: visits of each contender that are timed.
        steps: timed steps in a visit, after one that is not.
        attach_rounds: how often each is attached, for the time of it.
        longest: find the longest sequence that fits too, which needs a GPU.
    """

    size: str = "47m"
    model: str | None = None
    dtype: str = "both"
    device: str | None = None
    batch: int = 2
    length: int = 256
    rounds: int = 9
    steps: int = 2
    attach_rounds: int = 3
    threads: int = 2
    only: Sequence[str] = ()
    methods: Sequence[str] = ()
    longest: bool = False
    seed: int = 0


def known() -> list[Contender]:
    """Everybody who can be named."""
    return [*ours.ours(), *others.contenders()]


def run(setup: Setup, progress: Progress | None = None) -> Costs:
    """Measure, and come back with what was measured, also when Ctrl-C ended it (``interrupted`` is set then).

    Raises:
        IntarsiaError: for an unknown name, before anything is loaded; when nobody could be measured at all.
    """
    progress = progress or Progress()
    dtypes = _dtypes(setup.dtype)
    device = _device(setup.device)
    if setup.model is None:
        size_of(setup.size)
    if setup.longest and device.type != "cuda":
        raise IntarsiaError("the longest sequence that fits is looked for on a GPU only; leave --longest out")
    taking_part = ours.chosen([*known(), *(ours.added(method_config(m)) for m in setup.methods)], _wanted(setup))
    with progress, _threads(setup.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of other libraries on their own methods
        costs = Costs(_about(setup, device), [], [], ours.AGAINST)
        try:
            for dtype in dtypes:
                _Run(setup, taking_part, dtype, device, costs, progress).go()
        except KeyboardInterrupt:
            costs.interrupted = True
    if not any(cost.times for cost in costs.rows) and not costs.interrupted:
        why = "\n".join(f"  {one['subject']}: {one['why']}" for one in costs.skipped)
        raise IntarsiaError(f"none of the contenders could be measured:\n{why}")
    return costs


def _wanted(setup: Setup) -> list[str]:
    """The patterns; methods that are added by hand are wanted in any case."""
    return [*setup.only, *(ours.added(method_config(m)).name for m in setup.methods)] if setup.only else []


def _dtypes(name: str) -> list[str]:
    if name == "both":
        return list(DTYPES)
    if name not in DTYPES:
        raise IntarsiaError(f"no dtype {name!r}; {nearest(name, [*DTYPES, 'both'])}")
    return [name]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise IntarsiaError(f"no device {name!r}; {nearest(name, ['cpu', 'cuda'])}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise IntarsiaError(f"device {name!r}: there is no CUDA device here; try cpu")
    return device


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _about(setup: Setup, device: torch.device) -> dict[str, Any]:
    about = machine(device)
    named = setup.model or f"llama-{setup.size.lower()}"
    about["settings"] = {
        "model": f"{named}, {setup.batch} x {setup.length}",
        "shape": None if setup.model else str(size_of(setup.size)),
        "rounds": setup.rounds,
        "steps": setup.steps,
        "seed": setup.seed,
    }
    return about


class _Run:
    """One dtype."""

    def __init__(
        self,
        setup: Setup,
        contenders: Sequence[Contender],
        dtype: str,
        device: torch.device,
        costs: Costs,
        progress: Progress,
    ) -> None:
        self.setup, self.contenders, self.dtype, self.device = setup, contenders, dtype, device
        self.costs, self.progress = costs, progress
        self.dice = random.Random(setup.seed)
        self.subjects: dict[str, Subject] = {}
        self.rows: dict[str, Cost] = {}

    def go(self) -> None:
        self.base = self._base()
        self.progress.say(
            f"{self.dtype}: {sum(p.numel() for p in self.base.model.parameters()):,} weights, {len(self.base.sites)} of "
            f"them matrices that are adapted, {len(self.contenders)} contenders"
        )
        try:
            self._attach()
            self._each("memory", self._memory)
            self._time()
            if self.setup.longest:
                self._each("longest sequence", self._longest)
        finally:
            self.subjects.clear()
            del self.base
            _free(self.device)

    def _base(self) -> Base:
        setup = self.setup
        dtype = DTYPES[self.dtype]
        if setup.model is None:
            self.progress.say(f"making a Llama of random weights: {size_of(setup.size)}")
            model = random_llama(size_of(setup.size), dtype, self.device)
        else:
            loaded = pretrained.load(setup.model, dtype=dtype, device=self.device, progress=self.progress.say)
            model = ready(loaded.model)
        dice = torch.Generator().manual_seed(setup.seed)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, vocabulary, (setup.batch, setup.length), generator=dice).to(self.device)
        return Base(model, ids)

    # ------------------------------------------------------------------ attaching
    def _attach(self) -> None:
        times: dict[str, list[float]] = {}
        for number in range(self.setup.attach_rounds):
            for done, contender in enumerate(self._shuffled(self.contenders)):
                self.progress.work(done, len(self.contenders), f"{self.dtype}: attaching, {contender.name}")
                if subject := self.subjects.pop(contender.name, None):
                    subject.drop()
                    del subject
                if number and contender.name not in times:
                    continue  # it cannot run here, or has nothing to attach
                made = self._made(contender)
                if made and made.attach_s is not None:
                    times.setdefault(contender.name, []).append(made.attach_s)
                elif made and number == 0:
                    times[contender.name] = []
        for contender in self.contenders:  # in their own order
            if subject := self.subjects.get(contender.name):
                count = sum(p.numel() for p in subject.trained)
                sites = sum(rows * columns for rows, columns in self.base.sites.values())
                self.rows[contender.name] = Cost(
                    contender.name, contender.title, self.dtype, count, count / sites, subject.setting
                )
                self.rows[contender.name].attach_s = times.get(contender.name, [])
                self.costs.rows.append(self.rows[contender.name])

    def _made(self, contender: Contender) -> Subject | None:
        try:
            with torch.random.fork_rng():
                self.subjects[contender.name] = contender.make(self.base)
        except (Unavailable, torch.OutOfMemoryError) as error:
            self._skip(contender.name, "does not fit into memory" if _is_memory(error) else str(error))
            return None
        return self.subjects[contender.name]

    def _skip(self, name: str, why: str) -> None:
        self.progress.warn(f"{self.dtype}: {name} is left out: {why}")
        self.costs.skipped.append({"subject": name, "dtype": self.dtype, "why": why})
        self.subjects.pop(name, None)
        if (row := self.rows.pop(name, None)) is not None:
            self.costs.rows.remove(row)
        _free(self.device)

    # ------------------------------------------------------------------ memory
    def _memory(self, name: str, subject: Subject) -> None:
        row = self.rows[name]
        with self._entered(subject):
            row.kept_bytes = kept_bytes(subject.model, subject.loss)
            _clear(subject)
            optimizer = _optimizer(subject)
            self._step(subject, optimizer)  # makes the optimizer's state
            _clear(subject)
            row.optimizer_bytes = optimizer_bytes(optimizer)
            with Peak(self.device) as peak:
                self._step(subject, optimizer)
            held = storage_bytes([*self.base.model.parameters(), *self.base.model.buffers(), *subject.own])
            row.peak_bytes = None if peak.bytes is None else peak.bytes + held + row.optimizer_bytes

    # ------------------------------------------------------------------ time
    def _time(self) -> None:
        rounds, begun = self.setup.rounds, time.monotonic()
        for number in range(rounds):
            names = self._shuffled(list(self.subjects))
            gc.collect()
            for done, name in enumerate(names):
                visits = number * len(names) + done
                left = (time.monotonic() - begun) / visits * (rounds * len(names) - visits) if visits else None
                more = f", about {clock(left)} left" if left is not None else ""
                self.progress.work(number + 1, rounds, f"{self.dtype}: timing {name}{more}; round")
                self.rows[name].times[number] = self._visit(self.subjects[name])

    def _visit(self, subject: Subject) -> tuple[float, float]:
        """Seconds of (forward and backward, optimizer step), each the median of the visit's timed steps."""
        with self._entered(subject):
            optimizer = _optimizer(subject)
            self._step(subject, optimizer)
            gc.disable()
            try:
                found = [self._step(subject, optimizer) for _ in range(self.setup.steps)]
            finally:
                gc.enable()
        return statistics.median(a for a, _ in found), statistics.median(b for _, b in found)

    def _step(self, subject: Subject, optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
        _clear(subject)
        self._wait()
        start = time.perf_counter()
        subject.loss().backward()
        self._wait()
        middle = time.perf_counter()
        if optimizer is not None:
            optimizer.step()
            self._wait()
        return middle - start, time.perf_counter() - middle

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------ length
    def _longest(self, name: str, subject: Subject) -> None:
        """The longest single row, in steps of 256 tokens, with which one whole step fits."""
        ids = self.base.ids
        vocabulary = self.base.model.get_input_embeddings().weight.shape[0]

        def fits(length: int) -> bool:
            dice = torch.Generator().manual_seed(self.setup.seed)
            self.base.ids = torch.randint(0, vocabulary, (1, length), generator=dice).to(self.device)
            try:
                with self._entered(subject):
                    optimizer = _optimizer(subject)
                    self._step(subject, optimizer)
                    self._step(subject, optimizer)
            except torch.OutOfMemoryError:
                return False
            finally:
                _free(self.device)
            return True

        try:
            self.rows[name].longest = longest(fits, 256)
        finally:
            self.base.ids = ids

    # ------------------------------------------------------------------ pieces
    def _each(self, what: str, measure: Callable[[str, Subject], None]) -> None:
        """One measurement of all; who runs out of memory is left out from there on."""
        for done, (name, subject) in enumerate(list(self.subjects.items())):
            self.progress.work(done, len(self.subjects), f"{self.dtype}: {what}, {name}")
            try:
                measure(name, subject)
            except torch.OutOfMemoryError:
                del subject
                self._skip(name, "does not fit into memory")

    def _shuffled(self, items: Sequence[Any]) -> list[Any]:
        return self.dice.sample(items, len(items))

    @contextmanager
    def _entered(self, subject: Subject) -> Iterator[None]:
        """Within the block this contender acts, and nobody else; nothing of a step is left behind."""
        subject.enter()
        self.base.model.requires_grad_(subject.trains_base)
        try:
            yield
        finally:
            _clear(subject)
            self.base.model.requires_grad_(False)
            subject.leave()


def longest(fits: Callable[[int], bool], step: int, most: int = 2**20) -> int:
    """The largest multiple of ``step`` that fits, up to ``most``; 0 where not even one step does."""
    low, high = 0, step
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + step)
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of an optimizer's state, its step counters aside."""
    states = optimizer.state.values() if optimizer else ()
    return storage_bytes(t for state in states for t in state.values() if isinstance(t, Tensor) and t.ndim)


def _optimizer(subject: Subject) -> torch.optim.Optimizer | None:
    # Fused, as the trainers' default is: one pass over a tensor and its state, on CPUs too.
    return torch.optim.AdamW(subject.trained, lr=0.0, weight_decay=0.0, fused=True) if subject.trained else None


def _clear(subject: Subject) -> None:
    for parameter in subject.trained:
        parameter.grad = None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _is_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError)
