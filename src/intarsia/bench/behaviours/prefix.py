"""Prefix tuning beside a prompt of as many positions, and the MLP that makes it while it trains (Li and Liang 2021, sections 4.3 and 7.2)."""

from __future__ import annotations

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.behaviours.steps import KNOWN, NEW, held_out
from intarsia.methods.prefix import Prefix
from intarsia.methods.prompt import Prompt


@behaviour(
    "prefix",
    "chooses a task that the base knows, learns more of a new one than a prompt; the MLP learns at small rates",
)
def expressive() -> list[Seen]:
    four, task = Prefix(tokens=4), KNOWN[1]
    plain, mlp = held_out(NEW, four), held_out(NEW, Prefix(tokens=4, hidden=16), lr=1e-2)
    slow = held_out(NEW, four, lr=1e-2)
    return [
        Seen("held-out loss, known task", "prefix n=4", held_out(task, four), "base without a word", held_out(task), "lower"),
        Seen("held-out loss, new task", "prefix n=4", plain, "prompt n=4", held_out(NEW, Prompt(tokens=4)), "lower"),
        Seen("held-out loss, new task", "prefix n=4, MLP, lr 0.01", mlp, "prefix n=4, lr 0.01", slow, "lower"),
        Seen("held-out loss, new task", "prefix n=4, MLP, lr 0.01", mlp, "prefix n=4, lr 0.1", plain, "lower"),
    ]  # fmt: skip
