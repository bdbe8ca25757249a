"""How much of a compressed base EoRA repairs, and how well LoRD's factors do beside the weight's own SVD.

    python bench/compensation.py [--blocks 4] [--rank 32] [--json bench/results/compensation.json] [--page docs/compensation.md]

SmolLM2-135M in float32, of which the linear layers of some blocks in the middle are compressed, all others whole; --blocks 30 is the
whole model. Text: this repository's own pages, in chunks of 256 tokens, of which every fourth is held out. Two figures: the error of
the layers' outputs on held-out activations of the whole model, ||(W - W') x|| / ||W x|| over all tokens and averaged over the layers,
and the perplexity of held-out chunks. Four blocks take about five minutes on one idle core. With --page the tables are
written between the page's marks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intarsia as ia
from intarsia import bases, pretrained, shrink
from intarsia.bases.thin import put
from intarsia.bench.machine import machine, write_json
from intarsia.calibrate import gather
from intarsia.methods import Eora

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- made by bench/compensation.py -->", "<!-- end -->"
RULES = ("2:4", "4bit/64", "3bit/64")
REPAIRS = ("eora", "eora diagonal", "svd", "none")
WEIGHTING = {"eora": "gram", "eora diagonal": "diagonal", "svd": "none"}
SHARES = (0.7, 0.5)
TOKENS = 256

Grams = dict[str, dict[str, Tensor]]


def chunks(tokenizer: Any) -> list[Tensor]:
    """The pages as rows of tokens."""
    text = "\n\n".join(
        page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "compensation"
    )
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return list(ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS))


def perplexity(model: nn.Module, rows: list[Tensor]) -> float:
    """Of all tokens but each row's first."""
    total = 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=row[None]).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), row[1:], reduction="sum"))
    return math.exp(total / (len(rows) * (TOKENS - 1)))


def grams(model: nn.Module, names: list[str], rows: list[Tensor]) -> Grams:
    """E[x x^T] and the norms of the inputs of each layer."""
    found: Grams = {}
    weights = {name: model.get_submodule(name).weight for name in names}
    batches = [{"input_ids": torch.stack(rows[i : i + 4])} for i in range(0, len(rows), 4)]
    gather(model, weights, frozenset({"gram", "inputs", "mean"}), batches, lambda n, f: found.update({n: dict(f)}))  # type: ignore[arg-type]
    return found


def output_error(W: Tensor, changed: Tensor, H: Tensor) -> float:
    """||(W - W') x|| / ||W x|| over inputs with E[x x^T] = H."""
    D = (W - changed).double()
    return float((((D @ H) * D).sum() / ((W.double() @ H) * W.double()).sum()).sqrt())


def repairs(
    model: Any, names: list[str], rank: int, look: list[Tensor], held: list[Tensor], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row a rule and a repair."""
    whole = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    seen, rows = grams(model, names, held), []
    for rule in RULES:
        bases.degrade(model, rule, {name: model.get_submodule(name) for name in names})
        gathered = grams(model, names, look)  # in the compressed model, as it will be used
        for repair in REPAIRS:
            if repair != "none":
                method = Eora(rank=rank, weighting=WEIGHTING[repair])
                ia.attach(model, method, names, gathered=gathered, original=whole)
            errors = [output_error(whole[name], _now(model, name), seen[name]["gram"]) for name in names]
            found = {
                "rule": rule,
                "repair": repair,
                "output_error": sum(errors) / len(errors),
                "perplexity": perplexity(model, held),
            }
            if repair != "none":
                ia.detach(model, "default")
            rows.append(found)
            say(str(found))
        for name, W in whole.items():
            model.get_submodule(name).weight.data.copy_(W)
    return rows


def _now(model: nn.Module, name: str) -> Tensor:
    """The weight that a layer computes with."""
    layer: Any = model.get_submodule(name)
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T if layer.bias is None else layer.weight


def factorings(
    model: Any, names: list[str], look: list[Tensor], held: list[Tensor], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row a share of the rank and a way to choose directions."""
    rows = []
    batches = [{"input_ids": torch.stack(look[i : i + 4])} for i in range(0, len(look), 4)]
    for by in ("outputs", "weight"):
        known = shrink.survey(model, batches, names, by=by)
        for share in SHARES:
            before = {name: model.get_submodule(name) for name in names}
            done = shrink.factorize(model, known, share, always=True)
            found = {
                "by": by,
                "share": share,
                "numbers": done.after / done.before,
                "perplexity": perplexity(model, held),
            }
            put(model, before)
            rows.append(found)
            say(str(found))
    return rows


def page(about: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [f"| compression | repair, r = {about['rank']} | output error | perplexity |", "|---|---|---|---|"]
    lines += [
        f"| {r['rule']} | {r['repair']} | {r['output_error']:.3f} | {r['perplexity']:.2f} |" for r in about["repairs"]
    ]
    lines += ["", "| LoRD, share of the rank | directions of | numbers left | perplexity |", "|---|---|---|---|"]
    lines += [
        f"| {r['share']} | the {r['by']} | {r['numbers']:.0%} | {r['perplexity']:.2f} |" for r in about["factorings"]
    ]
    lines += [
        "",
        f"{about['layers']} layers of {about['blocks']} of {about['of']} blocks; {about['look']} tokens to look at, {about['held']} held out; the whole model's perplexity is {about['whole']:.2f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--look", type=int, default=12, help="chunks to look at")
    parser.add_argument("--held", type=int, default=6, help="chunks held out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded = pretrained.load("smollm2-135m", dtype=torch.float32)
    model: Any = loaded.model
    rows = chunks(loaded.tokenizer)
    held, look = rows[::4][: given.held], [row for i, row in enumerate(rows) if i % 4][: given.look]
    of = len(model.model.layers)
    first = (of - given.blocks) // 2
    inside = tuple(f"model.layers.{i}." for i in range(first, first + given.blocks))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)]
    about: dict[str, Any] = machine() | {
        "model": "smollm2-135m", "dtype": "float32", "blocks": given.blocks, "of": of, "layers": len(names), "rank": given.rank,
        "look": len(look) * TOKENS, "held": len(held) * TOKENS, "whole": perplexity(model, held),
    }  # fmt: skip
    print(about["whole"], flush=True)
    about["factorings"] = factorings(model, names, look, held, lambda line: print(line, flush=True))
    about["repairs"] = repairs(model, names, given.rank, look, held, lambda line: print(line, flush=True))
    if given.json:
        write_json(given.json, about)
    if given.page:
        text = given.page.read_text("utf-8")
        head, rest = text.split(BEGIN)[0], text.split(END, 1)[1]
        given.page.write_text(f"{head}{BEGIN}\n{page(about)}\n{END}{rest}", "utf-8")
    print(page(about))


if __name__ == "__main__":
    main()
