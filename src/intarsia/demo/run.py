"""The demo: three skills on one small real model, trained, measured, switched, fused, and written down.

    1  train one sparse adapter a skill (SHiRA-SNIP, SHiRA-WM, PaCA), and LoRA at the same count for each
    2  measure every adapter on every skill: held-out loss, and the skill's own measure
    3  switch through all of them in random order, and compare the SHA-256 of the base
    4  time the switches against LoRA fused in place and a dense copy
    5  fuse two skills, sparse and LoRA, and see how much of each is left
    6  write adapters with model cards, the report, its picture, and all figures as JSON

What is printed is what happened, also where the sparse adapter loses.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from intarsia import pretrained, registry
from intarsia.deck import Deck
from intarsia.demo import skills
from intarsia.demo.report import write_picture, write_report
from intarsia.demo.result import About, DemoResult, Exactness, Example, Fusion, Trained
from intarsia.demo.switching import time_switches
from intarsia.edits import Sparse
from intarsia.errors import IntarsiaError
from intarsia.evaluate import BASE, Matrix, Task, encode_pairs, held_out_loss, matrix
from intarsia.model import digest
from intarsia.pretrained import Pretrained
from intarsia.site import ALL_LINEAR, find_sites
from intarsia.train.config import Config, make_config
from intarsia.train.progress import Progress, Titled, read_log
from intarsia.train.trainer import Outcome, TrainingStopped, train
from intarsia.train.unfinished import LOG

RESULTS, REPORT, PICTURE = "results.json", "report.html", "demo.png"
LORA_RANK = 3  # the sparse methods get as many trained values as this

# Which sparse method each skill is trained with: one of each kind, each at its method's own learning rate. Those of FUSED
# are both of them elements.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "phonemes": ("PaCA", {"name": "paca"}),
    "docstring": ("SHiRA-WM", {"name": "shira", "scorer": "magnitude"}),
    "names": ("SHiRA-SNIP", {"name": "shira", "scorer": "snip"}),
}
FUSED = ("docstring", "names")
LORA: tuple[str, dict[str, Any]] = ("LoRA", {"name": "lora"})


@dataclass(frozen=True)
class Size:
    """How much of everything. The full demo takes about 7 minutes on two idle cores, the quick one 1.7."""

    steps: Mapping[str, int]
    n_train: int = 1024
    n_held_out: int = 48
    watched: int = 32  # held-out items that the loss curves are measured on
    batch_size: int = 8
    walk: int = 40  # random use, off and fuse calls
    rounds: int = 20  # of the timing
    strengths: Sequence[float] = (0.5, 0.75, 1.0)
    shown: int = 4  # examples a skill


FULL = Size(steps={"phonemes": 90, "docstring": 24, "names": 60})
QUICK = Size(
    steps={"phonemes": 9, "docstring": 4, "names": 6}, n_train=256, n_held_out=8, watched=8,
    walk=8, rounds=3, strengths=(1.0,), shown=3,
)  # fmt: skip


def run(
    folder: str | Path,
    *,
    quick: bool = False,
    model: str = "smollm2-135m",
    seed: int = 0,
    progress: Progress | None = None,
    size: Size | None = None,
) -> DemoResult:
    """Run the whole demo and write everything into ``folder``; print the result with rich.

    Args:
        folder: a new or empty folder, or one of an earlier demo, which is replaced adapter by adapter.
        quick: fewer steps and items, under two minutes; every part of the story, with poorer skills.
        model: any name that :func:`intarsia.pretrained.load` knows; a causal language model.
        size: instead of the sizes of the full or the quick demo.

    Raises:
        IntarsiaError: before anything is written: packages that are missing, a folder that holds something else.
        KeyboardInterrupt: on Ctrl-C; adapters that are finished stay, of the unfinished one nothing does.
    """
    size = size or (QUICK if quick else FULL)
    folder = _checked(Path(folder))
    with progress or Progress() as shown:
        return _Demo(folder, quick, model, seed, size, shown).tell()


def _checked(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise IntarsiaError(f"output {str(folder)!r} is a file; choose a folder")
    known = {RESULTS, REPORT, PICTURE, "adapters", "data"}
    other = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.exists() else []
    if other:
        raise IntarsiaError(f"output {str(folder)!r} holds something else ({', '.join(other[:4])}); choose another one")
    return folder


@dataclass
class _Demo:
    folder: Path
    quick: bool
    model_name: str
    seed: int
    size: Size
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def tell(self) -> DemoResult:
        start = time.perf_counter()
        learnt = skills.load(list(KINDS), n_train=self.size.n_train, n_held_out=self.size.n_held_out, seed=self.seed)
        base = self._part("load the model", lambda: pretrained.load(self.model_name, progress=self.progress.say))
        before = digest(base.model)
        tasks = [_task(skill, base) for skill in learnt]
        adapters = self._part("train", lambda: self._train_all(learnt, base))
        deck = Deck(base.model)
        deck.add(**{a.name: a.folder for a in adapters})
        try:
            table = self._part("measure", lambda: self._matrix(base, deck, tasks))
            exactness = self._part("switch", lambda: self._walk(deck, before))
            sparse, lora = ([a for a in adapters if a.sparse is kind and a.skill in FUSED] for kind in (True, False))
            switches = self._part("time switches", lambda: self._switches(deck, sparse, lora))
            fusions = self._part("fuse", lambda: self._fuse_all(base, deck, tasks, table, [sparse, lora]))
        finally:
            deck.off()
        after = digest(base.model)  # once more, after timing and fusing too
        self.seconds["all"] = time.perf_counter() - start
        result = DemoResult(
            folder=self.folder,
            model=base.name,
            quick=self.quick,
            seed=self.seed,
            skills=tuple(_about(skill) for skill in learnt),
            adapters=tuple(adapters),
            matrix=table,
            exactness=Exactness(before, after if after != before else exactness.after, exactness.switches),
            switches=switches,
            fusions=tuple(fusions),
            overlap=_overlap(deck, sparse[0].name, sparse[1].name),
            examples=tuple(self._examples(learnt, table, adapters)),
            machine=_machine(base),
            versions={p: importlib.metadata.version(p) for p in ("intarsia", "torch", "transformers")}
            | {"python": platform.python_version()},
            seconds=self.seconds,
        )
        self._write(result)
        return result

    def _part(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        done = work()
        self.seconds[name] = time.perf_counter() - start
        return done

    # ------------------------------------------------------------------------------------------------ train

    def _train_all(self, learnt: Sequence[skills.Skill], base: Pretrained) -> list[Trained]:
        budget = _budget(base)
        jobs = []
        for skill in learnt:
            files = skill.write(self.folder / "data")
            for title, method in (KINDS[skill.name], LORA):
                jobs.append((skill, title, method | budget[method["name"]], files))
        adapters = []
        for number, (skill, title, method, files) in enumerate(jobs, 1):
            self.progress.say(f"training {number}/{len(jobs)}: {skill.title} with {title}")
            heard = Titled(self.progress, f"{number}/{len(jobs)} {skill.name} {title}")
            outcome = self._train(self._config(skill, title, method, files, base), base, heard)
            adapters.append(self._trained(skill, title, method, outcome))
            self.progress.say(
                f"  held-out loss {outcome.base_loss or 0:.3f} -> {outcome.eval_loss or 0:.3f}, "
                f"{outcome.trained:,} values, {outcome.seconds:.0f} s"
            )
        return adapters

    def _config(
        self,
        skill: skills.Skill,
        title: str,
        method: Mapping[str, Any],
        files: tuple[Path, Path],
        base: Pretrained,
    ) -> Config:
        steps = self.size.steps[skill.name]
        return make_config(
            {
                "model": base.name,
                "data": {"train": str(files[0]), "eval": str(files[1]), "eval_rows": self.size.watched},
                "method": dict(method),
                "output": str(self.folder / "adapters" / f"{skill.name}-{title.lower()}"),
                "overwrite": True,
                "seed": self.seed,
                "train": {
                    "steps": steps,
                    "batch_size": self.size.batch_size,
                    "warmup": 0.15,
                    "eval_every": max(1, -(-steps // 4)),
                    "save_every": steps,  # a run of a minute needs no checkpoints
                },
            }
        )

    def _train(self, config: Config, base: Pretrained, heard: Progress) -> Outcome:
        try:
            return train(config, pretrained=base, progress=heard, resume="never")
        except TrainingStopped as stopped:
            output = Path(config.output)
            shutil.rmtree(output.with_name(f"{output.name}.unfinished"), ignore_errors=True)
            raise KeyboardInterrupt(
                f"the demo was stopped while training {output.name}; adapters that were finished are in {output.parent}"
            ) from stopped

    def _trained(self, skill: skills.Skill, title: str, method: Mapping[str, Any], outcome: Outcome) -> Trained:
        output = Path(outcome.output)
        events = read_log(output / LOG)
        return Trained(
            name=output.name,
            skill=skill.name,
            kind=title,
            sparse=title != "LoRA",
            method=registry.build(dict(method)).config(),
            folder=str(output),
            digest=outcome.digest,
            trained=outcome.trained,
            share=outcome.share,
            file_bytes=(output / "adapter.safetensors").stat().st_size,
            steps=outcome.steps,
            lr=outcome.lr,
            tokens_per_second=outcome.tokens / outcome.seconds,
            seconds=outcome.seconds,
            losses=tuple((e["step"], e["loss"]) for e in events if e["event"] == "step"),
            held_out=tuple((e["step"], e["eval_loss"]) for e in events if e["event"] == "eval"),
        )

    # ----------------------------------------------------------------------------------- measure and switch

    def _matrix(self, base: Pretrained, deck: Deck, tasks: Sequence[Task]) -> Matrix:
        self.progress.say("measuring every adapter on every skill")
        return matrix(
            base.model,
            base.tokenizer,
            tasks,
            deck.names,
            lambda name: deck.off() if name is None else deck.use(name),
            progress=lambda done, all, what: self.progress.work(done, all, f"measuring: {what},"),
        )

    def _walk(self, deck: Deck, before: str) -> Exactness:
        """Random use, fuse and off calls over all adapters, then off: is the base what it was?"""
        self.progress.say(f"switching {self.size.walk} times at random, then comparing the base bit by bit")
        dice, names = random.Random(self.seed), deck.names
        for number in range(self.size.walk):
            first, second = dice.sample(names, 2)
            action = dice.choice(["use", "use", "fuse", "off"])
            if action == "use":
                deck.use(first, dice.choice([0.25, 0.5, 1.0, 1.25]))
            elif action == "fuse":
                deck.fuse({first: dice.uniform(-1, 1), second: dice.uniform(-1, 1)})
            else:
                deck.off()
            self.progress.work(number + 1, self.size.walk, "switching")
        deck.off()
        after = digest(deck.model)
        self.progress.say("  the base is back to the bit" if after == before else "  THE BASE IS NOT WHAT IT WAS")
        return Exactness(before, after, self.size.walk)

    def _switches(self, deck: Deck, sparse: Sequence[Trained], lora: Sequence[Trained]) -> Any:
        self.progress.say("timing switches against LoRA fused in place and a dense copy")
        return time_switches(
            deck, (sparse[0].name, sparse[1].name), (lora[0].name, lora[1].name), self.size.rounds, self.progress
        )

    def _fuse_all(
        self,
        base: Pretrained,
        deck: Deck,
        tasks: Sequence[Task],
        alone: Matrix,
        pairs: Sequence[Sequence[Trained]],
    ) -> list[Fusion]:
        """Two skills at once: the loss on each, and the share of the gain over the base that is left."""
        self.progress.say("fusing two skills, sparse and LoRA")
        found: list[Fusion] = []
        examples = {task.name: task.examples for task in tasks}
        for strength in self.size.strengths:
            for pair in pairs:
                deck.fuse({adapter.name: strength for adapter in pair})
                losses, kept = [], []
                for adapter in pair:
                    loss = held_out_loss(base.model, base.tokenizer, examples[adapter.skill])
                    start = alone[BASE, adapter.skill].loss
                    gain = start - alone[adapter.name, adapter.skill].loss
                    losses.append(loss)
                    kept.append((start - loss) / gain if gain > 0 else None)
                    self.progress.work(len(found) + 1, 2 * len(self.size.strengths), "fusing")
                found.append(
                    Fusion(
                        kind="sparse" if pair[0].sparse else "LoRA",
                        adapters=(pair[0].name, pair[1].name),
                        strength=strength,
                        losses=(losses[0], losses[1]),
                        retained=(kept[0], kept[1]),
                    )
                )
        deck.off()
        return found

    # ------------------------------------------------------------------------------------------------ write

    def _examples(self, learnt: Sequence[skills.Skill], table: Matrix, adapters: Sequence[Trained]) -> list[Example]:
        """The first few held-out items of each skill, as they come: nobody picked them."""
        found: list[Example] = []
        for skill in learnt:
            rows = [BASE, *(a.name for a in sorted(adapters, key=lambda a: not a.sparse) if a.skill == skill.name)]
            answers = [table[row, skill.name].answers for row in rows]
            for item, *said in list(zip(skill.held_out, *answers, strict=True))[: self.size.shown]:
                found.append(Example(skill.name, item.prompt, item.answer, *said))
        return found

    def _write(self, result: DemoResult) -> None:
        self.progress.say("writing the report")
        write_picture(result, self.folder / PICTURE)
        write_report(result, self.folder / REPORT)
        aside = self.folder / f"{RESULTS}.part"
        aside.write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, self.folder / RESULTS)


def _budget(base: Pretrained) -> dict[str, dict[str, Any]]:
    """Fields that give every method as many trained values as LoRA of LORA_RANK has on this model."""
    shapes = [site.shape for site in find_sites(base.model, (ALL_LINEAR,), ()).values()]
    count = sum(LORA_RANK * (rows + columns) for rows, columns in shapes)
    return {
        "lora": {"rank": LORA_RANK},
        "shira": {"density": round(count / sum(rows * columns for rows, columns in shapes), 6)},
        "paca": {"rank": max(1, round(count / sum(rows for rows, _ in shapes)))},
    }


def _task(skill: skills.Skill, base: Pretrained) -> Task:
    return Task(
        name=skill.name,
        examples=encode_pairs([(item.prompt, item.completion) for item in skill.held_out], base.tokenizer),
        prompts=[item.prompt for item in skill.held_out],
        references=[item.answer for item in skill.held_out],
        measure=skill.measure,
        measure_name=skill.measure_name,
        higher_is_better=skill.higher_is_better,
        max_new_tokens=skill.max_new_tokens,
    )


def _about(skill: skills.Skill) -> About:
    return About(
        name=skill.name,
        title=skill.title,
        sentence=skill.sentence,
        source=skill.source,
        measure=skill.measure_name,
        higher_is_better=skill.higher_is_better,
        train_items=len(skill.train),
        held_out_items=len(skill.held_out),
    )


def _overlap(deck: Deck, first: str, second: str) -> float:
    """Units that both adapters may change, over those of the smaller one."""
    both = smaller = 0
    for name, one in deck[first].edits.items():
        other = deck[second].edits.get(name)
        if isinstance(one, Sparse) and isinstance(other, Sparse) and one.granularity == other.granularity:
            both += int(torch.isin(one.index, other.index).sum())
            smaller += min(len(one.index), len(other.index))
    return both / max(1, smaller)


def _machine(base: Pretrained) -> dict[str, Any]:
    parameter = next(base.model.parameters())
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }
