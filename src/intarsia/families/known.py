"""The families that are known, as data. A new one is a new entry here, or an append to ``FAMILIES`` in a program of one's own.

Names are paths below one common module: where all the paths of a coupling are found under a module, there is a block.
Parts that stand in one fused weight name it several times, in the order in which their rows are stacked.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coupling:
    """Which rows make the heads or channels that which columns read.

    Attributes:
        kind: ``attention`` or ``mlp``.
        rows: (part, path) of each weight whose rows belong to them, in the order of a fused weight.
        columns: path of the weight whose columns belong to them.
        width: head_dim where it is given by hand; none: the model says it (``head_dim``, or hidden_size / heads).
    """

    kind: str
    rows: tuple[tuple[str, str], ...]
    columns: str
    width: int | None = None

    def __str__(self) -> str:
        paths = list(dict.fromkeys(path for _, path in self.rows))
        return f"{', '.join(paths)} > {self.columns}" if paths else self.columns


@dataclass(frozen=True)
class Family:
    """Models that name their parts alike."""

    name: str
    couplings: tuple[Coupling, ...]


def _attention(inside: str, q: str, k: str, v: str, o: str) -> Coupling:
    rows = tuple((part, f"{inside}.{name}") for part, name in zip("qkv", (q, k, v), strict=True))
    return Coupling("attention", rows, f"{inside}.{o}")


def _mlp(columns: str, *, up: str, gate: str | None = None) -> Coupling:
    return Coupling("mlp", ((("gate", gate),) if gate else ()) + (("up", up),), columns)


FAMILIES = [
    # Llama, Mistral, Qwen 2 and 3, Gemma, SmolLM, OLMo, Granite, Cohere ...
    Family(
        "llama",
        (
            _attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
            _mlp("mlp.down_proj", gate="mlp.gate_proj", up="mlp.up_proj"),
        ),
    ),
    Family(
        "phi3",
        (
            _attention("self_attn", "qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),
            _mlp("mlp.down_proj", gate="mlp.gate_up_proj", up="mlp.gate_up_proj"),
        ),
    ),
    Family(
        "gpt2",
        (_attention("attn", "c_attn", "c_attn", "c_attn", "c_proj"), _mlp("mlp.c_proj", up="mlp.c_fc")),
    ),
    # OPT, BART and its like; Whisper and CLIP where their MLP is called fc1, fc2 too
    Family("opt", (_attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), _mlp("fc2", up="fc1"))),
    Family("phi", (_attention("self_attn", "q_proj", "k_proj", "v_proj", "dense"), _mlp("mlp.fc2", up="mlp.fc1"))),
    # BERT, RoBERTa, MiniLM, ViT
    Family(
        "bert",
        (
            Coupling(
                "attention",
                (("q", "attention.self.query"), ("k", "attention.self.key"), ("v", "attention.self.value")),
                "attention.output.dense",
            ),
            _mlp("output.dense", up="intermediate.dense"),
        ),
    ),
    # GPT-NeoX and Pythia stack q, k and v by head, so only the output side of their attention is told apart.
    Family(
        "neox",
        (
            Coupling("attention", (), "attention.dense"),
            _mlp("mlp.dense_4h_to_h", up="mlp.dense_h_to_4h"),
        ),
    ),
]
