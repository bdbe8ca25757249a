"""Prompt tuning and what a base knows: a few embeddings choose among its tasks, as a word would, and teach it none (Lester et al. 2021)."""

from __future__ import annotations

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.steps import KNOWN, NEW, held_out
from intarsia.methods.lora import Lora
from intarsia.methods.prompt import Prompt


@behaviour("prompt", "one embedding chooses a task that the base knows, and does not teach a new one as a LoRA does")
def chooses() -> list[Seen]:
    one, task = Prompt(tokens=1), KNOWN[1]
    return [
        Seen("held-out loss, known task", "prompt n=1", held_out(task, one), "base without a word", held_out(task), "lower"),
        Seen("held-out loss, known task", "prompt n=1", held_out(task, one), "a tenth of a nat", 0.1, "lower"),
        Seen("held-out loss, new task", "prompt n=1", held_out(NEW, one), "lora r=1", held_out(NEW, Lora(rank=1)), "higher"),
    ]  # fmt: skip
