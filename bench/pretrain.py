"""A small Llama of bytes from scratch, by several optimizers: held-out loss against bytes of optimizer state.

    python bench/pretrain.py [--steps 150] [--json bench/results/pretrain.json] [--plot docs/images/pretrain.png]
    python bench/pretrain.py --rates 1e-3 3e-3 1e-2 --only "Fira r=8"        to find a contender's rate

What is trained on what: intarsia.bench.pretrain.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from intarsia.bench.machine import machine, write_json
from intarsia.bench.pretrain import CONTENDERS, Outcome, run


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=150)
    arguments.add_argument("--only", action="append", help="contenders by name")
    arguments.add_argument("--rates", type=float, nargs="*", help="try these instead of each one's own")
    arguments.add_argument("--json", type=Path, help="write the outcomes to this file")
    arguments.add_argument("--plot", type=Path, help="draw them to this PNG")
    given = arguments.parse_args()
    outcomes = []
    print(f"{'':18} {'lr':>8} {'loss':>8} {'state':>12} {'seconds':>8}")
    for contender in CONTENDERS:
        if given.only and contender.name not in given.only:
            continue
        for rate in given.rates or [contender.lr]:
            found = run(contender.name, rate, given.steps)
            outcomes.append(found)
            print(f"{found.name:18} {found.lr:8g} {found.loss:8.4f} {found.state:12,} {found.seconds:8.0f}", flush=True)
    if given.json:
        write_json(given.json, machine() | {"steps": given.steps, "outcomes": [asdict(each) for each in outcomes]})
    if given.plot:
        plot(outcomes, given.plot)


def plot(outcomes: list[Outcome], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    curves, sizes = figure.subplots(1, 2)
    for number, each in enumerate(outcomes):
        (line,) = curves.plot(*zip(*each.curve, strict=True), marker=".", label=each.name)
        sizes.plot(each.state / 2**10, each.loss, "o", color=line.get_color())
        beside = (5, 4) if number % 2 == 0 else (5, -10)  # two that lie on each other are told apart
        sizes.annotate(each.name, (each.state / 2**10, each.loss), beside, textcoords="offset points", fontsize=8)
    curves.set(xlabel="optimizer step", ylabel="held-out loss, nats a byte")
    curves.legend(fontsize=8, frameon=False)
    sizes.set(xlabel="optimizer state, KiB", ylabel="held-out loss at the end")
    sizes.margins(x=0.25)
    for axes in (curves, sizes):
        axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
