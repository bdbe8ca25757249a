"""Bytes kept for backward on a 12-layer Llama-style model, all linears: ours, HF PEFT, full fine-tuning, the frozen floor.

    python bench/kept.py [--json bench/results/kept.json]

A part of ``intarsia bench train`` alone, in seconds: nothing is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from intarsia.bench import others
from intarsia.bench.contenders import Base, Unavailable, added, ours
from intarsia.bench.machine import machine, write_json
from intarsia.bench.memory import kept_bytes
from intarsia.bench.models import SIZES, random_llama

MORE = ({"name": "shira", "density": 0.046, "scorer": "snip"}, {"name": "shira", "density": 0.046})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--size", default="47m", choices=SIZES)
    arguments.add_argument("--json", type=Path, help="write the rows to this file as well")
    given = arguments.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_llama(SIZES[given.size], dtype, torch.device("cpu"))
        ids = torch.randint(0, SIZES[given.size].vocabulary, (2, 256), generator=torch.Generator().manual_seed(0))
        base = Base(model, ids)
        found = {}
        for contender in [*ours(), *others.contenders(), *map(added, MORE)]:
            try:
                subject = contender.make(base)
            except Unavailable as error:
                print(f"{contender.name} is left out: {error}")
                continue
            subject.enter()
            model.requires_grad_(subject.trains_base)
            trained = sum(p.numel() for p in subject.trained)
            found[contender.name] = (kept_bytes(subject.model, subject.loss), trained)
            for parameter in subject.trained:
                parameter.grad = None
            model.requires_grad_(False)
            subject.leave()
            subject.drop()
        against = "peft-lora@r16" if "peft-lora@r16" in found else "lora@r16"
        reference = found[against][0]
        print(f"\n{dtype}   {'kept':>23} {'vs ' + against:>18} {'trained':>12}")
        for name, (size, count) in found.items():
            print(f"{name:32} {size / 2**20:8.1f} MiB {size / reference:17.3f}x {count:12,}")
            row = {"subject": name, "against": against, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"model": f"llama-{given.size}, 2 x 256", "trained": count, "bytes": size}
            rows.append(row | {"ratio": size / reference})
    if given.json:
        write_json(given.json, machine() | {"rows": rows})


if __name__ == "__main__":
    main()
