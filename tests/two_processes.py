"""What two processes do together, for tests/test_processes.py: ``torchrun --nproc-per-node 2 two_processes.py FOLDER``.

Each scenario leaves its results in FOLDER as ``<name>.<rank>.pt``, and each process what it printed as ``<rank>.txt``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import intarsia as ia
from intarsia import chain, methods, processes, registry
from intarsia.train.config import make_config
from intarsia.train.trainer import TrainingStopped, train
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, stir, trained, weights

COUNT = 2
STEPS, EARLY = 4, 2  # optimizer steps of a run, and after how many its checkpoint is made

METHODS: dict[str, ia.Method] = {
    "low rank": ia.Lora(rank=2),
    "columns": ia.Paca(rank=3),
    "elements": ia.Shira(density=0.1),
    "ranks as experts": methods.Smora(rank=6, active=2),  # whose balance counts over all processes
}
# Every method at its first quick setting, whatever has been added since.
EVERY = {
    name: registry.build({"name": name} | dict(kind.small[0]))
    for name, kind in registry.methods().items()
    if "linear" in kind.kinds  # not those before the tokens, which shard() refuses
}
STORED_OTHERWISE, TARGETS = "tiles of weights stored otherwise", ["c_attn", "c_fc", "wte"]
LIVE: dict[str, ia.Method] = {
    "elements": ia.Shira(density=0.05),
    "rows": ia.Shira(density=0.2, granularity="row"),
    "diagonals": ia.Shira(density=0.2, granularity="diagonal"),
    "lines": ia.Shira(density=0.2, granularity="line", width=8),
    "tiles": ia.Shira(density=0.3, granularity="tile", width=8),
    "columns": ia.Paca(rank=3),
    STORED_OTHERWISE: ia.Shira(density=0.2, granularity="tile", width=5),
}
WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,  # as accelerate makes it
    "replicate": ia.replicate,
    "shard": ia.shard,
}


def rows_of(x: Tensor, rank: int, count: int) -> Tensor:
    """A process's share of the batch."""
    return x.chunk(count)[rank]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2)


def train_steps(
    call: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: range, accumulate: int = 2
) -> None:
    """Some steps, the gradients of each over several passes."""
    for step in steps:
        optimizer.zero_grad()
        for part in range(accumulate):
            (some_loss(call, x * (1 + step / 7 + part)) / accumulate).backward()
        optimizer.step()


def whole_run(method: ia.Method, wrap: Callable[[nn.Module], nn.Module], rank: int, count: int) -> dict[str, Any]:
    """Train, look at everything that is to be the same with any number of processes, and take the adapter off again."""
    model = small_net(torch.float64)
    before = weights(model)
    original = small_net(torch.float64, seed=1)
    ia.attach(model, method, data=[some_input(torch.float64)], loss=some_loss, original=original)
    base = ia.digest(model)
    start = {k: t.clone() for k, t in ia.adapter_state(model, "default").items()}
    call = wrap(model)
    x = some_input(torch.float64, 8, 3, 16)
    train_steps(call, optimizer_of(model), rows_of(x, rank, count), range(STEPS))
    state = {k: t.clone() for k, t in ia.adapter_state(model, "default").items()}
    with torch.no_grad():
        y = model(x)
        ia.activate(model)
        y_base = model(x)
        ia.activate(model, "default")
    live = [layer.live for layer in chain.adapted_layers(model).values()]
    said = ia.export(model).base.digest
    assert ia.digest(model) == base
    ia.detach(model, "default")
    after = {name: processes.whole(layer_of(model, name).weight.detach()) for name in SITES}
    exact = all(torch.equal(before[name], after[name]) for name in SITES)
    found = {"state": state, "y": y, "y_base": y_base, "base": base, "said": said, "live": live, "exact": exact}
    return found | {"moved": max((state[k] - start[k]).abs().max().item() for k in state)}


def small_gpt2() -> GPT2LMHeadModel:
    """Weights stored as (in, out), and a head that shares the embedding's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=65, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
        )
        return GPT2LMHeadModel(config).to(torch.bfloat16)


def small_llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config).to(dtype)


# ------------------------------------------------------------------ scenarios
def runs(rank: int, folder: Path) -> dict[str, Any]:
    """Every method in every wrap."""
    return {
        f"{method}, {wrap}": whole_run(METHODS[method], WRAPS[wrap], rank, COUNT)
        for method in METHODS
        for wrap in WRAPS
    }


def every_method(rank: int, folder: Path) -> dict[str, Any]:
    """Every registered method on a sharded base."""
    return {name: whole_run(method, ia.shard, rank, COUNT) for name, method in EVERY.items()}


def live_bits(rank: int, folder: Path) -> dict[str, Any]:
    """Values set into the rows of a bfloat16 transformer that each process holds, gathered to the whole weights."""
    found = {}
    for name, method in LIVE.items():
        model = small_gpt2() if name == STORED_OTHERWISE else small_llama()
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        ia.attach(model, method, TARGETS if name == STORED_OTHERWISE else "all-linear")
        ia.shard(model)
        stir(model, size=0.5)
        names = [f"{site}.weight" for site in chain.adapted_layers(model)]
        set_in = {n: processes.whole(model.get_parameter(n).detach()).clone() for n in names}
        ids = torch.arange(12).view(1, 12)
        with torch.no_grad():
            logits = model(ids).logits
        ia.detach(model, "default")
        after = {k: processes.whole(p.detach()) for k, p in model.named_parameters()}
        exact = all(torch.equal(before[k], after[k]) for k in before)
        found[name] = {"set in": set_in, "logits": logits, "exact": exact}
    return found


def refusals(rank: int, folder: Path) -> dict[str, str]:
    """What is refused, and with which words."""
    from torch.distributed.fsdp import fully_shard

    said: dict[str, str] = {}

    def refused(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except ia.IntarsiaError as error:
            said[name] = str(error)

    sharded = small_net()
    fully_shard(sharded)
    refused("sharded first", lambda: ia.attach(sharded, ia.Shira(density=0.1)))
    refused("sharded first, deck", lambda: ia.Deck(sharded).add(str(folder / "saved")))
    model = small_net()
    ia.attach(model, ia.Shira(density=0.1), seed=rank)
    refused("other seeds", lambda: ia.shard(model))
    refused("other seeds, replicate", lambda: ia.replicate(model))
    assert not any(processes.is_shard(p) for p in model.parameters())
    ia.detach(model, "default")
    with torch.no_grad():
        model.get_parameter("down.weight")[0, 0] += rank
    ia.attach(model, ia.Shira(density=0.1))
    refused("other bases", lambda: ia.shard(model))
    model = small_net()
    refused("nothing attached", lambda: ia.shard(model))
    ia.attach(model, ia.Shira(density=0.1))
    refused("another model's block", lambda: ia.shard(model, [nn.Linear(2, 2)]))
    refused("a layer as a block", lambda: ia.shard(model, [layer_of(model, "up")]))
    refused("ignored parameters", lambda: ia.shard(model, ignored_params=set()))
    ia.shard(model)
    refused("sharded twice", lambda: ia.shard(model))
    refused("another adapter", lambda: ia.attach(model, ia.Lora(rank=2), name="second"))
    refused("save over what is there", lambda: ia.save(model, folder))
    with torch.no_grad():
        state_of(model, "up").values.add_(1.0)
    refused("values by hand", lambda: model(some_input()))
    ia.sync(model)  # also after a forward that did not come to its end
    model(some_input())
    return said


def stacks(rank: int, folder: Path) -> dict[str, Any]:
    """Two adapters, one after the other and on top of each other, attached before sharding."""
    model = small_net(torch.float64)
    ia.attach(model, ia.Shira(density=0.1), name="low")
    stir(model, "low", seed=1)
    ia.attach(model, ia.Dora(ia.Lora(rank=2)), name="high")
    stir(model, "high", seed=2)
    if processes.count() > 1:
        ia.shard(model)
    x = some_input(torch.float64)
    found = {}
    for names in (("low",), ("high",), ("low", "high"), ("high", "low"), ()):
        ia.activate(model, *names)
        with torch.no_grad():
            found[" ".join(names)] = model(x)
    with ia.rows(model, ["low", None, "high", "low"]), torch.no_grad():
        found["rows"] = model(x)
    return found


def checkpoints(rank: int, folder: Path) -> dict[str, Any]:
    """A checkpoint in the middle of a run, gone on with by the same two processes, from another start."""
    found = {}
    for kind, method in METHODS.items():
        x = rows_of(some_input(torch.float64, 8, 3, 16), rank, COUNT)
        model = small_net(torch.float64)
        ia.attach(model, method)
        ia.shard(model)
        optimizer = optimizer_of(model)
        train_steps(model, optimizer, x, range(EARLY))
        ia.save_checkpoint(model, folder / f"checkpoint {kind}", optimizer, extra={"step": EARLY})
        other = small_net(torch.float64)
        ia.attach(other, method, seed=1)  # another support and start, which the checkpoint's take the place of
        call = ia.replicate(other)
        optimizer = optimizer_of(other)
        extra = ia.load_checkpoint(other, folder / f"checkpoint {kind}", optimizer)
        train_steps(call, optimizer, x, range(extra["step"], STEPS))
        found[kind] = ia.adapter_state(other, "default")
    return found


def saving(rank: int, folder: Path) -> dict[str, Any]:
    """A sharded model, saved by both."""
    model = small_net(torch.float64)
    ia.attach(model, METHODS["elements"])
    ia.shard(model)
    stir(model)
    ia.save(model, folder / "saved")
    return {"digest": ia.export(model).digest}


def config(folder: Path, out: str, shard: bool = False, **train_keys: Any) -> Any:
    return make_config(
        {
            "model": str(folder / "m"),
            "data": str(folder / "d.jsonl"),
            "method": {"name": "shira", "density": 0.1, "scorer": "snip"},
            "output": str(folder / out),
            "train": {"steps": 7, "batch_size": 7, "accumulate": 2, "save_every": 3, "eval_every": 6, "lr": 1e-2}
            | {"shard": shard, "gradient_checkpointing": shard}
            | train_keys,
        }
    )


def trainings(rank: int, folder: Path) -> dict[str, Any]:
    """``train()`` whole, stopped and gone on with, and with a sharded base."""
    from intarsia.train import trainer as trainer_module

    whole = train(config(folder, "ddp"))
    usual = trainer_module._AfterStep.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 4 and rank == 1:  # the signal reaches one of them alone
            self.trainer.signals.caught = 15
        usual(self, args, state, control, **more)

    trainer_module._AfterStep.on_step_end = stop  # type: ignore[method-assign]
    stopped = None
    try:
        train(config(folder, "shard", shard=True))
    except TrainingStopped as error:
        stopped = error.step
    trainer_module._AfterStep.on_step_end = usual  # type: ignore[method-assign]
    resumed = train(config(folder, "shard", shard=True))
    return {
        "whole": whole.digest,
        "stopped": stopped,
        "resumed from": resumed.resumed_from,
        "resumed": resumed.digest,
        "losses": (whole.base_loss, whole.eval_loss, whole.train_loss, whole.tokens),
    }


MISTAKE = ["method={name: shira, density: 0.1, schedule: drop-and-grow, every: 2}"]


def command_line(rank: int, folder: Path) -> dict[str, Any]:
    """``intarsia train`` as each process of torchrun is asked to, and what it prints; then a mistake. The last: it leaves."""
    from intarsia.cli.app import app

    given = config(folder, "cli").model_dump(mode="json")
    (folder / f"run.{rank}.yaml").write_text(yaml.safe_dump(given))
    found: dict[str, Any] = {}
    for name, more in {"mistake": MISTAKE, "run": []}.items():
        out, messages = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
            try:
                code = app(["train", str(folder / f"run.{rank}.yaml"), *more], prog_name="intarsia")
            except SystemExit as end:
                code = end.code
        found[name] = {"code": code or 0, "out": out.getvalue(), "messages": messages.getvalue()}
    return found | {"left": not processes.started()}


SCENARIOS = (runs, every_method, live_bits, saving, refusals, stacks, checkpoints, trainings, command_line)


def the_page(folder: Path) -> None:
    """The program that docs/processes.md shows."""
    page = Path(__file__).parent.parent / "docs" / "processes.md"
    program = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)[0]
    before, sys.argv = sys.argv, ["train.py", str(folder / "m")]
    with contextlib.chdir(folder):
        exec(compile(program, str(page), "exec"), {})
    sys.argv = before


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    the_page(folder)  # which starts the process group
    rank = processes.rank()
    for scenario in SCENARIOS:
        begun = time.monotonic()
        torch.manual_seed(0)
        torch.save(scenario(rank, folder), folder / f"{scenario.__name__}.{rank}.pt")
        print(f"process {rank}: {scenario.__name__} took {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    here, me = Path(sys.argv[1]), os.environ["RANK"]
    (here / f"{me}.pid").write_text(str(os.getpid()))
    said = os.open(here / f"{me}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        main(here)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: the other process may wait for this one for ever
