"""Fira, GaLore and AdamW from scratch: a small Llama of bytes; embeddings and norms by Adam in all of them."""

from __future__ import annotations

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.pretrain import run


@behaviour(
    "fira", "from scratch, reaches a lower loss than GaLore with its optimizer state, and is within 2 % of AdamW"
)
def from_scratch() -> list[Seen]:
    fira, galore, adamw = run("Fira r=8"), run("GaLore r=8"), run("AdamW")
    return [
        Seen("held-out loss, nats a byte", fira.name, fira.loss, galore.name, galore.loss, "lower"),
        Seen("held-out loss, nats a byte", fira.name, fira.loss, "1.02 x AdamW", 1.02 * adamw.loss, "lower"),
    ]
