"""Time to the first token after a long prefix that many adapters share: LoRA computes it anew, aLoRA goes on upon the base's cache.

    python bench/first_token.py [--json bench/results/first_token.json]

SmolLM2-135M; one deck with a LoRA and an aLoRA of the same random numbers on q_proj, k_proj, v_proj (rank 32). The base reads the prefix once.
A call is the invocation with a short question, up to the logits of the answer's first token. LoRA is set into the weights, where it costs
nothing of its own. Medians of rounds whose order alternates. Before that: the keys and values of the prefix are compared bit by bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import intarsia as ia
from intarsia import model as models
from intarsia import pretrained
from intarsia.bench.machine import machine, write_json
from intarsia.methods import Alora

TARGETS, RANK, ROUNDS, PREFIXES = ["*q_proj", "*k_proj", "*v_proj"], 32, 5, (250, 1000)
INVOCATION, QUESTION = "<|im_start|>assistant\n", "Is the last answer supported by the text above? Answer yes or no:"


def adapters(model: Any, invocation: list[int]) -> dict[str, ia.Adapter]:
    """A LoRA and an aLoRA of the same numbers."""
    found = {}
    for name, method in (("lora", ia.Lora(RANK)), ("alora", Alora(invocation, RANK))):
        ia.attach(model, method, TARGETS, name=name)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for state in models.states(model, name).values():
                for tensor in state.parameters():
                    tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
        found[name] = ia.export(model, name)
        ia.detach(model, name)
    return found


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(model: Any, deck: ia.Deck, prefix: Tensor, call: Tensor) -> dict[str, Any]:
    at, whole = prefix.shape[1], torch.cat([prefix, call], 1)

    def anew() -> Any:
        return model(whole, past_key_values=DynamicCache(), logits_to_keep=1)

    deck.off()
    reference = anew().past_key_values
    cache: Any = model(prefix, past_key_values=DynamicCache(), logits_to_keep=1).past_key_values

    def upon() -> Any:
        cache.crop(at - cache.get_seq_length())  # a negative number: so many tokens less
        return model(call, past_key_values=cache, logits_to_keep=1)

    deck.use("alora")
    found = anew()
    same = all(
        torch.equal(getattr(one, part)[:, :, :at], getattr(other, part)[:, :, :at])
        for one, other in zip(found.past_key_values.layers, reference.layers, strict=True)
        for part in ("keys", "values")
    )
    off = float((upon().logits.float() - found.logits.float()).abs().max())
    ways: dict[str, tuple[str, Callable[[], Any]]] = {
        "lora, all anew": ("lora", anew), "alora, all anew": ("alora", anew), "alora, base's cache": ("alora", upon)
    }  # fmt: skip
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            name, run = ways[way]
            deck.use(name)
            spent = seconds(run)
            if number:  # the first round warms up
                times[way].append(spent)
    medians = {way: statistics.median(spent) for way, spent in times.items()}
    return {"prefix": at, "call": call.shape[1], "bits_of_the_prefix_equal": same, "largest_logit_difference": off, "seconds": medians,
            "times_faster_than_lora": medians["lora, all anew"] / medians["alora, base's cache"]}  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    loaded = pretrained.load("smollm2-135m", dtype=options.dtype)
    model: Any = loaded.model.eval()
    text = (Path(__file__).parent.parent / "docs" / "concepts.md").read_text(encoding="utf-8")

    def tokens(text: str) -> list[int]:
        return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

    given = adapters(model, tokens(INVOCATION))
    deck = ia.Deck(model)
    deck.add(**given)  # type: ignore[arg-type]
    call = torch.tensor([tokens(INVOCATION + QUESTION)])
    rows = []
    for length in PREFIXES:
        row = measure(model, deck, torch.tensor([tokens(text)[:length]]), call)
        rows.append(row)
        each = ", ".join(f"{way} {1000 * spent:.0f} ms" for way, spent in row["seconds"].items())
        bits = "equal to the bit" if row["bits_of_the_prefix_equal"] else "NOT equal"
        print(f"prefix {row['prefix']}: {each}; {row['times_faster_than_lora']:.1f} times faster than lora; keys and values of "
              f"the prefix {bits}; logits differ by {row['largest_logit_difference']:.2g}", flush=True)  # fmt: skip
    if options.json:
        what = "seconds to the first token after a shared prefix, medians"
        write_json(options.json, {"what": what, "model": "smollm2-135m", "dtype": options.dtype, "rank": RANK, "rounds": ROUNDS,
                                  "rows": rows} | machine())  # fmt: skip


if __name__ == "__main__":
    main()
