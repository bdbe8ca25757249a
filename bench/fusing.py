"""Fusing skills: how much of each is left, for sparse adapters and LoRA, two and three at a time, by equal and by searched weights.

    python bench/fusing.py train      # one adapter a method, skill and seed
    python bench/fusing.py measure    # fuse two and three: weights of 1, of 1 / n, searched ones, and the ways of HF PEFT
    python bench/fusing.py page       # the tables of docs/fusing.md and their picture

All go on where they were stopped; rows go to bench/results/fusing.jsonl.

The demo's three skills on SmolLM2-135M in float32, all methods at the count of a LoRA of rank 3. Adapters go to out/fusing.
"""

from __future__ import annotations

import argparse
import doctest
import heapq
import inspect
import itertools
import json
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from runs import fill

from intarsia import pretrained, store
from intarsia.analyze import write_picture
from intarsia.bench.machine import machine
from intarsia.deck import Deck
from intarsia.demo import skills
from intarsia.interop import convert
from intarsia.merge import Wanted, retained_share, settle
from intarsia.merge.search import Live, Task, find_weights
from intarsia.merge.search.live import Rows
from intarsia.merge.search.weights import ranges_of
from intarsia.store import Adapter
from intarsia.train.config import make_config
from intarsia.train.data import Example, load_examples
from intarsia.train.progress import Progress
from intarsia.train.trainer import train

OUT, ROOT = Path("out/fusing"), Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "bench" / "results" / "fusing.jsonl", ROOT / "docs" / "fusing.md"
PICTURE = ROOT / "docs" / "images" / "fusing.png"
SEARCHED, REPORTED = 12, 32  # of the held-out rows of each skill
TRIALS = {2: 14, 3: 24}
OF_TWO = ("lora", "shira-wm", "shira-rand", "shira-disjoint")  # that weights of two skills are searched for
SKILLS = ("phonemes", "docstring", "names")
STEPS = {"phonemes": 60, "docstring": 20, "names": 40}
SEEDS = (0, 1, 2)
DENSITY = 0.00862  # of SmolLM2's linear weights: as many as LoRA of rank 3 has
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 3},
    "shira-wm": {"name": "shira", "scorer": "magnitude", "density": DENSITY},
    "shira-rand": {"name": "shira", "density": DENSITY},
    "paca": {"name": "paca", "rank": 6},
    "shira-snip": {"name": "shira", "scorer": "snip", "density": DENSITY},
    "s2ft": {"name": "s2ft", "o": 0.045, "down": 0.0175},
    # The next largest entries for each further skill; the first one's are those of shira-wm.
    "shira-disjoint": {"name": "shira", "scorer": "magnitude", "density": DENSITY},
}  # fmt: skip


def folder(method: str, skill: str, seed: int) -> Path:
    if method == "shira-disjoint" and skill == SKILLS[0]:
        method = "shira-wm"
    return OUT / "adapters" / f"{method}-{skill}-{seed}"


def train_all(seeds: Sequence[int]) -> None:
    base = pretrained.load("smollm2-135m", dtype="float32")
    learnt = {skill.name: skill for skill in skills.load(list(SKILLS))}
    files = {name: skill.write(OUT / "data") for name, skill in learnt.items()}
    for seed in seeds:
        for method, settings in METHODS.items():
            for skill in SKILLS:
                place = folder(method, skill, seed)
                if place.exists():
                    continue
                earlier = SKILLS[: SKILLS.index(skill)] if method == "shira-disjoint" else ()
                start = time.perf_counter()
                config = make_config(
                    {
                        "model": "smollm2-135m",
                        "dtype": "float32",
                        "data": {"train": str(files[skill][0]), "eval": str(files[skill][1]), "eval_rows": 32},
                        "method": dict(settings),
                        "output": str(place),
                        # Skills have seeds of their own: random supports then meet by chance only.
                        "seed": seed + 10 * SKILLS.index(skill),
                        "avoid": [str(folder(method, one, seed)) for one in earlier],
                        "train": {"steps": STEPS[skill], "batch_size": 8, "warmup": 0.15,
                                  "eval_every": STEPS[skill], "save_every": STEPS[skill]},
                    }
                )  # fmt: skip
                outcome = train(config, pretrained=base, progress=Progress(), resume="never")
                print(
                    f"{place.name}: {outcome.base_loss:.3f} -> {outcome.eval_loss:.3f}, {outcome.trained:,} values, "
                    f"{time.perf_counter() - start:.0f} s",
                    flush=True,
                )


# ------------------------------------------------------------------ measuring
class Half(Live):
    """Losses with products in bfloat16, in half the time. Adapters are set into float32 weights all the same."""

    def losses(self, rows: Rows) -> dict[str, float]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().losses(rows)


class Bench:
    """The model, rows to search on and rows to report on, and other text."""

    def __init__(self) -> None:
        self.base = pretrained.load("smollm2-135m", dtype="float32")
        self.rows, self.search_rows, self.spare = {}, {}, {}
        for name in SKILLS:
            examples, _ = load_examples(OUT / "data" / f"{name}-eval.jsonl", self.base.tokenizer)
            self.search_rows[name], self.rows[name] = examples[:SEARCHED], examples[SEARCHED : SEARCHED + REPORTED]
            self.spare[name] = examples[-2:]
        self.other = load_examples(_other_text(), self.base.tokenizer, format="text", max_length=128)[0]
        self.deck = Deck(self.base.model)
        self.live = Half(self.base.model, self.base.tokenizer)

    def losses(self, names: Sequence[str]) -> dict[str, float]:
        """Of the model as it is now: each skill, and other text."""
        return self.live.losses(self.wanted(names))

    def wanted(self, names: Sequence[str]) -> dict[str, list[Example]]:
        """The skills' rows, and other text where one or all skills are asked for."""
        return {name: self.rows[name] for name in names} | ({"other": self.other} if len(names) != 2 else {})

    def adapters(self, method: str, names: Sequence[str], seed: int) -> dict[str, Adapter]:
        return {name: store.open(folder(method, name, seed)) for name in names}

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        names, method, seed, how = case["skills"].split("+"), case["method"], case["seed"], case["how"]
        if how == "base":
            return {"losses": self.losses(SKILLS)}
        adapters = self.adapters(method, names, seed)
        weight = 1 / len(names) if how.endswith("mean") else 1.0
        if how.startswith("peft-"):
            return {"losses": self._peft(adapters, how.split("-")[1], weight)}
        if how == "searched":
            return self._searched(adapters, seed)
        return self._fused(adapters, dict.fromkeys(names, weight))

    def _fused(self, adapters: dict[str, Adapter], weights: dict[str, float]) -> dict[str, Any]:
        self.deck.add(**adapters)  # type: ignore[arg-type]
        try:
            self.deck.fuse(weights)
            return {"losses": self.losses(list(adapters))}
        finally:
            self.deck.off()
            for name in adapters:
                self.deck.remove(name)

    def _searched(self, adapters: dict[str, Adapter], seed: int) -> dict[str, Any]:
        plan = settle(adapters, Wanted("sum", {}, {}, 0))
        names = list(adapters)
        task = Task(
            plan,
            {name: self.search_rows[name] for name in names},
            {name: self.spare[name] for name in names},  # what is found is measured below, as all the others
            ranges_of((0.0, 2.0)),
            seed=seed,
        )
        found = find_weights(task, self.live, trials=TRIALS[len(names)])
        best = found.search.best.point
        weights = {d.adapter: best[d.name] for d in found.search.space}
        trials = len(found.search.trials)
        return self._fused(adapters, weights) | {"weights": weights, "trials": trials, "search_s": found.search.seconds}

    def _peft(self, adapters: dict[str, Adapter], way: str, weight: float) -> dict[str, float]:
        """HF PEFT's own merge of the same LoRAs."""
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, adapter in adapters.items():
                store.write(adapter, Path(place) / f"{name}-ours")
                convert(Path(place) / f"{name}-ours", Path(place) / name, "peft-lora", load=lambda _: self.base)
            first, *others = adapters
            wrapped = peft.PeftModel.from_pretrained(self.base.model, str(Path(place) / first), adapter_name=first)
            try:
                for name in others:
                    wrapped.load_adapter(str(Path(place) / name), adapter_name=name)
                more = {"density": 0.5} if way == "ties" else {}
                wrapped.add_weighted_adapter(
                    list(adapters), [weight] * len(adapters), "merged", combination_type=way, **more
                )
                wrapped.set_adapter("merged")
                return Half(wrapped, self.base.tokenizer).losses(self.wanted(list(adapters)))
            finally:
                wrapped.unload()


def _other_text() -> Path:
    """Paragraphs of the standard library's longest docstrings on other subjects: plain English that no skill trains."""
    path = OUT / "data" / "other.jsonl"
    texts = [inspect.getdoc(module) or "" for module in (argparse, doctest, heapq, random, statistics)]
    parts = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    kept = [part for part in parts if len(part) > 150][:8]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in kept), encoding="utf-8")
    return path


def cases(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Singles, fusions by weights of 1 and of 1 / n, PEFT's, and searched ones: of three for all seeds, of two for the first."""
    pairs = ["+".join(pair) for pair in itertools.combinations(SKILLS, 2)]
    three, found = "+".join(SKILLS), []
    for seed in seeds:
        found += [{"method": m, "skills": s, "seed": seed, "how": "single"} for m in METHODS for s in SKILLS]
        found += [
            {"method": m, "skills": s, "seed": seed, "how": how}
            for how in ("ones", "mean")
            for m in METHODS
            for s in (three, *pairs)
        ]
        found += [{"method": "lora", "skills": s, "seed": seed, "how": f"peft-{way}-{how}"} for how in ("ones", "mean")
                  for way in ("linear", "ties", "svd") for s in ((three, *pairs) if way != "svd" else (three,))]  # fmt: skip
        found += [{"method": m, "skills": three, "seed": seed, "how": "searched"} for m in METHODS]
    return found + [
        {"method": m, "skills": s, "seed": seed, "how": "searched"}
        for seed in seeds
        if seed == 0
        for m in OF_TWO
        for s in pairs
    ]


def measure(seeds: Sequence[int]) -> None:
    bench = Bench()
    table = RESULTS if list(seeds) == list(SEEDS) else RESULTS.with_suffix(f".{'-'.join(map(str, seeds))}.jsonl")
    RESULTS.with_suffix(".about.json").write_text(json.dumps(machine(), indent=2) + "\n")
    base = {"method": "", "skills": "+".join(SKILLS), "seed": 0, "how": "base"}
    fill(table, [base, *(case for case in cases(seeds) if _there(case))], bench.measure)


def _there(case: dict[str, Any]) -> bool:
    return all(folder(case["method"], skill, case["seed"]).exists() for skill in case["skills"].split("+"))


# ------------------------------------------------------------------ the page
TITLES = {"lora": "LoRA", "shira-wm": "SHiRA, largest weights", "shira-rand": "SHiRA, random", "shira-snip": "SHiRA, SNIP",
          "shira-disjoint": "SHiRA, disjoint", "paca": "PaCA", "s2ft": "S2FT"}  # fmt: skip
WAYS = {"ones": "weights of 1", "mean": "weights of 1 / n", "searched": "searched",
        **{f"peft-{way}-{how}": f"PEFT {way}, {said}" for how, said in (("ones", "1"), ("mean", "1 / n"))
           for way in ("linear", "svd", "ties")}}  # fmt: skip
Shares = dict[str, float]  # skill -> retained share of its gain; "other": what the loss on other text rose by


def rows() -> list[dict[str, Any]]:
    files = sorted(RESULTS.parent.glob("fusing*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def shares(table: list[dict[str, Any]]) -> dict[tuple[str, str, str, int], Shares]:
    """(method, how, skills, seed) -> what is left."""
    base = next(row["losses"] for row in table if row["how"] == "base")
    single = {(r["method"], r["skills"], r["seed"]): r["losses"][r["skills"]] for r in table if r["how"] == "single"}
    found = {}
    for row in table:
        if row["how"] in ("base", "single"):
            continue
        names = row["skills"].split("+")
        kept = {n: retained_share(base[n], single[row["method"], n, row["seed"]], row["losses"][n]) for n in names}
        found[row["method"], row["how"], row["skills"], row["seed"]] = {
            **{n: share for n, share in kept.items() if share is not None},
            "other": row["losses"].get("other", math.nan) - base["other"],
        }
    return found


def worst(kept: Shares) -> float:
    return min(share for name, share in kept.items() if name != "other")


def write_page() -> None:
    table = rows()
    kept, three = shares(table), "+".join(SKILLS)
    text = PAGE.read_text()
    for name, lines in (
        ("three", _three(kept, three)), ("two", _two(kept)), ("weights", _weights(table, three)), ("alone", _alone(table)),
    ):  # fmt: skip
        begin, end = f"<!-- {name}: made by bench/fusing.py -->", "<!-- end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)
    _picture(kept, three)


def _three(kept: dict[tuple[str, str, str, int], Shares], three: str) -> list[str]:
    lines = ["| | " + " | ".join(SKILLS) + " | worst | worst, by seed | mean | other text |", "|---" * 8 + "|"]
    for how in WAYS:
        for method in TITLES:
            of = [kept[key] for key in sorted(kept) if key[:3] == (method, how, three)]
            if not of:
                continue
            each = [f"{statistics.mean(one[skill] for one in of):.0%}" for skill in SKILLS]
            lowest = [worst(one) for one in of]
            mean = statistics.mean(one[skill] for one in of for skill in SKILLS)
            other = statistics.mean(one["other"] for one in of)
            title = f"{TITLES[method]}, {WAYS[how]}"
            lines.append(
                f"| {title} | " + " | ".join(each) + f" | **{statistics.mean(lowest):.0%}** | "
                + ", ".join(f"{share:.0%}" for share in lowest) + f" | {mean:.0%} | {other:+.2f} |"
            )  # fmt: skip
    return lines


def _two(kept: dict[tuple[str, str, str, int], Shares]) -> list[str]:
    pairs = ["+".join(pair) for pair in itertools.combinations(SKILLS, 2)]
    lines = ["| worst of the two | " + " | ".join(p.replace("+", ", ") for p in pairs) + " | all |", "|---" * 5 + "|"]
    for how in WAYS:
        for method in TITLES:
            cells, every = [], []
            for pair in pairs:
                of = [worst(kept[key]) for key in sorted(kept) if key[:3] == (method, how, pair)]
                every += of
                cells.append(f"{statistics.mean(of):.0%}" if of else "")
            if every:
                lines.append(
                    f"| {TITLES[method]}, {WAYS[how]} | " + " | ".join(cells) + f" | {statistics.mean(every):.0%} |"
                )
    return lines


def _weights(table: list[dict[str, Any]], three: str) -> list[str]:
    lines = ["| | seed | " + " | ".join(SKILLS) + " | trials | seconds |", "|---" * 6 + "|"]
    for method in TITLES:
        for row in table:
            if (row["method"], row["how"], row["skills"]) == (method, "searched", three):
                found = " | ".join(f"{row['weights'][skill]:.2f}" for skill in SKILLS)
                lines.append(
                    f"| {TITLES[method]} | {row['seed']} | {found} | {row['trials']} | {row['search_s']:.0f} |"
                )
    return lines


def _alone(table: list[dict[str, Any]]) -> list[str]:
    base = next(row["losses"] for row in table if row["how"] == "base")
    lines = ["| loss alone | " + " | ".join(SKILLS) + " | other text, mean |", "|---" * 5 + "|"]
    lines.append("| the base | " + " | ".join(f"{base[skill]:.2f}" for skill in SKILLS) + f" | {base['other']:.2f} |")
    for method, title in TITLES.items():
        of = [row for row in table if row["how"] == "single" and row["method"] == method]
        if of:
            each = [[r["losses"][s] for r in of if r["skills"] == s] for s in SKILLS]
            cells = [f"{statistics.mean(one):.2f} ({min(one):.2f} to {max(one):.2f})" for one in each]
            lines.append(
                f"| {title} | " + " | ".join(cells) + f" | {statistics.mean(r['losses']['other'] for r in of):.2f} |"
            )
    return lines


def _picture(kept: dict[tuple[str, str, str, int], Shares], three: str) -> None:
    """Bars: what is left of the worst of three skills, by method and way; a dot a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bars = [("mean", "weights of 1 / 3", "#9db8d2"), ("searched", "searched weights", "#0a6c74")]
    groups = [(TITLES[m], m, "") for m in TITLES]
    groups += [(f"LoRA,\nPEFT {way}", "lora", f"peft-{way}-") for way in ("linear", "svd", "ties")]
    low = -0.7
    for number, (_, method, prefix) in enumerate(groups):
        for place, (how, label, colour) in enumerate(bars):
            of = [worst(kept[key]) for key in sorted(kept) if key[:3] == (method, prefix + how, three)]
            if not of:
                continue
            x = number + (place - 0.5) * 0.38
            height = statistics.mean(of)
            axes.bar(x, max(height, low), 0.36, color=colour, label=label if not number else None)
            axes.plot([x] * len(of), [max(one, low) for one in of], ".", color="#222222", markersize=4)
            shown = f"{height:.0%}"
            axes.annotate(
                shown,
                (x, max(height, 0, *of)),
                ha="center",
                va="bottom",
                fontsize=7,
                xytext=(0, 4),
                textcoords="offset points",
            )
    axes.axhline(0, color="#222222", linewidth=0.8)
    axes.set_ylim(low, 1.1)
    axes.set_yticks([low, -0.5, 0, 0.5, 1], ["less", "-50 %", "0", "50 %", "100 %"])
    axes.set_xticks(range(len(groups)), [title.replace(", ", ",\n") for title, *_ in groups], fontsize=8)
    axes.set_title(
        "Three skills fused: what is left of the gain of the worst one (dots: seeds)", loc="left", fontsize=10
    )
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    write_picture(figure, PICTURE)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=["train", "measure", "page"])
    arguments.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = arguments.parse_args()
    if given.what == "page":
        write_page()
    else:
        train_all(given.seeds) if given.what == "train" else measure(given.seeds)
