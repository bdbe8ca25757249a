"""On one GPU: the same numbers as on a CPU, and QPaCA on the largest model that fits.

    python bench/gpu.py check           every granularity, live training, the deck, seeded supports: CUDA against CPU
    python bench/gpu.py deck            switches by plans on the device and by plans in the host's memory, sent over beforehand or not
    python bench/gpu.py qpaca [70b]     a Llama of random weights in NF4, PaCA of rank 8 on every linear layer, one step
    python bench/gpu.py page            the tables of docs/benchmarks.md from bench/results/gpu; needs no GPU

Prints one JSON line a result. The step times are those of `intarsia bench train --device cuda`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import intarsia as ia
from intarsia import bases, store
from intarsia.bench.models import SIZES, Size, random_llama
from intarsia.edits import Sparse
from intarsia.support import GRANULARITIES, named_granularity, sample

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "bench" / "results" / "gpu", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by bench/gpu.py -->", "<!-- end -->"
LARGE = SIZES | {"70b": Size(8192, 80, 64, 8, 28672, 128256), "13b": Size(5120, 40, 40, 40, 13824, 32000)}


def say(what: str, **found: Any) -> None:
    print(json.dumps({"what": what} | found), flush=True)


# ------------------------------------------------------------------ the same numbers
def check() -> None:
    shape, tokens = (768, 512), 300
    for name in GRANULARITIES:
        unit = named_granularity(name)
        index = sample(unit.units(shape), max(1, unit.units(shape) // 100), 7)
        plan = unit.plan(shape, index)
        gy, x = torch.randn(tokens, shape[0]), torch.randn(tokens, shape[1])
        exact = unit.gather(gy.double().mT @ x.double(), index)
        errors = {}
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            g, y, i = gy.to("cuda", dtype), x.to("cuda", dtype), index.cuda()
            p = unit.plan(shape, i)
            found = unit.gradient(g, unit.keep(y, i, p), i, p, shape).double().cpu()
            errors[str(dtype).removeprefix("torch.")] = float((found - exact).abs().max() / exact.abs().max())
        weight = torch.randn(shape)
        on = weight.cuda()
        unit.put(on, index.cuda(), unit.gather(on, index.cuda()) + 1)
        unit.put(weight, index, unit.gather(weight, index) + 1)
        say(
            "gradient of the support",
            granularity=name,
            errors=errors,
            same_bits_written=torch.equal(on.cpu(), weight),
            plan=len(plan),
        )
    for name in ("element", "line", "tile", "column"):
        values = {}
        for device in ("cpu", "cuda"):
            net = _net().to(device)
            ia.attach(net, ia.Shira(density=0.2, granularity=name), seed=3)
            optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
            x = torch.linspace(-1, 1, 8 * 64, dtype=torch.float64).view(8, 64).to(device)
            for _ in range(5):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
            values[device] = ia.export(net)
        ours, theirs = values["cpu"].tensors(), values["cuda"].tensors()
        worst = max(float((ours[k].double() - theirs[k].cpu().double()).abs().max()) for k in ours)
        say("five steps, float64", granularity=name, largest_difference=worst)
        _deck(name, values["cpu"])


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).double()


def _deck(name: str, adapter: ia.Adapter) -> None:
    net = _net().cuda()
    deck, start = ia.Deck(net), ia.digest(net)
    deck.add(first=adapter, second=adapter)
    dice = torch.Generator().manual_seed(0)
    for _ in range(200):
        pick = int(torch.randint(4, (), generator=dice))
        (
            deck.off,
            lambda: deck.use("first"),
            lambda: deck.use("second", 0.5),
            lambda: deck.fuse(first=0.3, second=1.1),
        )[pick]()
    deck.off()
    say("200 switches", granularity=name, base_is_back=ia.digest(net) == start)


def switches() -> None:
    """One weight of 4096 x 4096, 1 %: milliseconds of a switch from A to B, and what stands on the device for it."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("element", "line", "row"):
            for writer, room, ahead in (
                ("torch", 0, False),
                ("staged", 2**28, False),
                ("staged", 0, False),
                ("staged", 0, True),
            ):
                net = nn.Sequential(nn.Linear(4096, 4096, bias=False)).to("cuda", dtype).requires_grad_(False)
                deck, start = ia.Deck(net, memory=2**40, writer=writer), ia.digest(net)
                deck.add(**{n: _adapter(deck, kind, seed) for seed, n in enumerate("ab")})  # type: ignore[arg-type]
                if writer == "staged":
                    deck._writer.room = room  # type: ignore[attr-defined]
                before, times = torch.cuda.memory_allocated(), []
                for number in range(40):
                    name = "ab"[number % 2]
                    if ahead:
                        deck.prefetch(name).result()
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    deck.use(name)
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - begin)
                held = torch.cuda.memory_allocated() - before
                deck.off()
                say(
                    "switch", dtype=str(dtype), granularity=kind, writer=writer, room=room, prefetched=ahead,
                    ms=1e3 * statistics.median(times[10:]), device_bytes=held, base_is_back=ia.digest(net) == start,
                )  # fmt: skip


def _adapter(deck: ia.Deck, kind: str, seed: int) -> ia.Adapter:
    unit, dice = named_granularity(kind), torch.Generator().manual_seed(seed)
    shape = (4096, 4096)
    index = torch.randperm(unit.units(shape), generator=dice)[: unit.units(shape) // 100].sort().values
    values = 0.01 * torch.randn(unit.values_shape(shape, len(index)), generator=dice)
    edit = Sparse(shape, unit, index, values)
    return ia.Adapter(kind, {"0.weight": edit}, store.Base(deck.base_digest, ""), {"name": "shira"})


# ------------------------------------------------------------------ a large base in NF4
def qpaca(name: str, length: int) -> None:
    size, device = LARGE[name], torch.device("cuda")
    start = time.perf_counter()
    model = random_llama(
        Size(size.hidden, 1, size.heads, size.kv_heads, size.mlp, size.vocabulary), torch.bfloat16, device
    )
    config = model.config
    layers = nn.ModuleList()
    for number in range(size.layers):  # one at a time: the whole in 16 bits would not fit
        layer = _layer(model, config, number)
        bases.quantise(layer, "nf4")
        layers.append(layer)
    model.model.layers = layers
    config.num_hidden_layers = size.layers
    gc.collect()
    torch.cuda.empty_cache()
    say("base", model=name, seconds=time.perf_counter() - start, gib=torch.cuda.memory_allocated() / 2**30)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    start = time.perf_counter()
    ia.attach(model, ia.Paca(8), targets=r"re:model\.layers\..*")
    trained = [p for p in model.parameters() if p.requires_grad]
    say("attached", seconds=time.perf_counter() - start, trained=sum(p.numel() for p in trained))
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
    model.train()
    while True:
        ids = torch.randint(0, size.vocabulary, (1, length), device=device)
        try:
            torch.cuda.reset_peak_memory_stats()
            seconds = []
            for _ in range(2):
                torch.cuda.synchronize()
                start = time.perf_counter()
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            say("does not fit", length=length)
            return
        say(
            "step",
            length=length,
            seconds=seconds[-1],
            peak_gib=torch.cuda.max_memory_allocated() / 2**30,
            loss=float(loss),
        )
        if length >= 16384:
            return
        length *= 4


def _layer(model: Any, config: Any, number: int) -> nn.Module:
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer: nn.Module = type(model.model.layers[0])(config, number)
        finally:
            torch.set_default_dtype(before)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 2:
            parameter.normal_(0, 0.02)
    return layer


# ------------------------------------------------------------------ the page
RUNS = (
    ("train-47m.json", "float32"),
    ("train-47m.json", "bfloat16"),
    ("train-1b.json", "bfloat16"),
    ("train-8b.json", "bfloat16"),
)


def page() -> None:
    lines = []
    for file, dtype in RUNS:
        result = json.loads((RESULTS / file).read_text())
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        lines += [
            "",
            f"{rows[0]['model']}, {dtype}:",
            "",
            "| | step | / floor | / PEFT LoRA | / full | kept / PEFT LoRA | peak | attach |",
            "|---" * 8 + "|",
        ]
        for row in rows:
            ratios = {against: row["ratios"].get(against, {}) for against in ("floor", "peft-lora@r16", "full")}
            cells = [f"{row['median_s'] * 1e3:.1f} ms", *(_number(ratios[a].get("step")) for a in ratios)]
            cells += [_number(ratios["peft-lora@r16"].get("kept")), f"{row['peak_bytes'] / 2**30:.1f} GiB"]
            cells += ["" if row["attach_s"] is None else f"{row['attach_s'] * 1e3:.0f} ms"]
            lines.append(f"| {row['subject']} | " + " | ".join(cells) + " |")
    first, *rest = [json.loads(line) for line in (RESULTS / "qpaca.jsonl").read_text().splitlines()]
    lines += [
        "",
        f"QPaCA, one step with gradient checkpointing ({first['gpu']}):",
        "",
        "| tokens in the row | peak | seconds |",
        "|---|---|---|",
    ]
    lines += [
        f"| {r['length']:,} | {r['peak_gib']:.1f} GiB | {r['seconds']:.1f} |" for r in rest if r["what"] == "step"
    ]
    text = PAGE.read_text(encoding="utf-8")
    before, _, after = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines[1:]) + f"\n{END}{after.partition(END)[2]}", encoding="utf-8")


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=["check", "deck", "qpaca", "page"])
    arguments.add_argument("model", nargs="?", default="70b", choices=sorted(LARGE))
    arguments.add_argument("--length", type=int, default=512)
    given = arguments.parse_args()
    if given.what == "page":
        page()
        raise SystemExit
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here")
    warnings.simplefilter("ignore")
    say("machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    if given.what == "qpaca":
        qpaca(given.model, given.length)
    else:
        check() if given.what == "check" else switches()
