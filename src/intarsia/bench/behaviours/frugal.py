"""FRUGAL, GaLore, BAdam and AdamW from scratch: a small Llama of bytes; embeddings and norms by Adam in all of them."""

from __future__ import annotations

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.pretrain import run


@behaviour(
    "frugal",
    "from scratch, is below GaLore and BAdam at about their optimizer state, and with density 0 still below GaLore",
)
def from_scratch() -> list[Seen]:
    frugal, none = run("FRUGAL rho=0.25"), run("FRUGAL rho=0")
    galore, badam, adamw = run("GaLore r=8"), run("BAdam rho=0.25"), run("AdamW")
    measure = "held-out loss, nats a byte"
    return [
        Seen(measure, frugal.name, frugal.loss, galore.name, galore.loss, "lower"),
        Seen(measure, frugal.name, frugal.loss, badam.name, badam.loss, "lower"),
        Seen(measure, frugal.name, frugal.loss, "1.02 x AdamW", 1.02 * adamw.loss, "lower"),
        Seen(measure, none.name, none.loss, galore.name, galore.loss, "lower"),
    ]
