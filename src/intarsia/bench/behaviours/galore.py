"""GaLore and LoRA from scratch: a small Llama of bytes, whose matrices learn by either; embeddings and norms by Adam in both."""

from __future__ import annotations

from intarsia.bench.behaviours import Seen, behaviour
from intarsia.bench.pretrain import run


@behaviour(
    "galore", "from scratch, reaches a lower loss than LoRA of the same rank, which has as much optimizer state or more"
)
def from_scratch() -> list[Seen]:
    galore, lora = run("GaLore r=8"), run("LoRA r=8")
    return [
        Seen("held-out loss, nats a byte", galore.name, galore.loss, lora.name, lora.loss, "lower"),
        Seen("bytes of optimizer state", galore.name, galore.state, lora.name, lora.state, "lower"),
    ]
