"""Intruder dimensions of trained adapters beside their losses: does LoRA make more of them than sparse adapters do?

    python bench/intruders.py out/fusing/adapters/* [--json bench/results/intruders.json] [--page docs/analyze.md]

The adapters are folders that `intarsia train` wrote, all of one base; an adapter that the file has already is not measured again.
Each weight's base is decomposed once, and every adapter's changed weight once: about two minutes and a half a SmolLM2-135M adapter
on one core. Counts are for the 10 leading left directions of each weight, by the paper's rule (nearly equal singular values are
not joined) and by ours, at every threshold from 0.1 to 0.9. With --page the table is written between the page's marks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from intarsia import pretrained, store
from intarsia.analyze import SVD, Intruders, change_norm, effective_rank, intruders, spectrum, stable_rank
from intarsia.bench.machine import machine, write_json
from intarsia.edits import Edit
from intarsia.site import site_at

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- made by bench/intruders.py -->", "<!-- end -->"
EPSILONS = tuple(i / 10 for i in range(1, 10))
TOP = 10


def measure(folders: list[Path], say: Any = print) -> list[dict[str, Any]]:
    """One row an adapter."""
    adapters = {folder.name: store.read(folder) for folder in folders}
    bases = {adapter.base.digest for adapter in adapters.values()}
    if len(bases) != 1:
        raise SystemExit("these adapters belong to different bases")
    first = next(iter(adapters.values()))
    model = pretrained.load(first.base.source, dtype=first.base.dtype).model
    names = list(dict.fromkeys(name for adapter in adapters.values() for name in adapter.edits))
    found: dict[str, list[tuple[str, Edit, torch.Tensor, Intruders]]] = {key: [] for key in adapters}
    for number, name in enumerate(names, 1):
        weight = site_at(model, name.removesuffix(".weight")).weight.detach()
        base = SVD.of(weight)
        for key, adapter in adapters.items():
            if name in adapter.edits:
                edit = adapter.edits[name]
                looked = intruders(weight, edit, top=TOP, name=name, base=base)
                found[key].append((name, edit, weight, looked))
        if number % 10 == 0:
            say(f"{number} of {len(names)} weights", flush=True)
    return [row(key, adapters[key], each) for key, each in found.items()]


def row(name: str, adapter: store.Adapter, each: list[tuple[str, Edit, torch.Tensor, Intruders]]) -> dict[str, Any]:
    spectra = [spectrum(edit, weight) for _, edit, weight, _ in each]
    changes = [change_norm(edit, weight) for _, edit, weight, _ in each]
    sizes = [float(weight.double().norm()) for _, _, weight, _ in each]
    modules = list(dict.fromkeys(weight.removesuffix(".weight").rpartition(".")[2] for weight, *_ in each))
    directions = [d for *_, looked in each for d in looked.directions]
    return {
        "adapter": name,
        "digest": adapter.digest,
        "method": dict(adapter.method),
        "model": adapter.base.source,
        "dtype": adapter.base.dtype,
        "held_out_loss": adapter.note.get("held-out loss"),
        "held_out_loss_of_the_base": adapter.note.get("held-out loss of the base"),
        "weights": len(each),
        "top": TOP,
        "epsilons": list(EPSILONS),
        "intruders_paper": [sum(d.similarity < eps for d in directions) for eps in EPSILONS],
        "intruders": [sum(d.within < eps for d in directions) for eps in EPSILONS],
        "by_module": {
            module: sum(len(looked.found) for weight, *_, looked in each if weight.endswith(f"{module}.weight"))
            for module in modules
        },
        "weights_with_any": sum(bool(looked.found) for *_, looked in each),
        "energy_share": statistics.mean(looked.energy_share for *_, looked in each),
        "relative_norm": sum(c * c for c in changes) ** 0.5 / sum(s * s for s in sizes) ** 0.5,
        "relative_spectral_norm": statistics.median(
            float(s[0] / looked.changed.S[0]) for s, (*_, looked) in zip(spectra, each, strict=True)
        ),
        "stable_rank": statistics.median(stable_rank(s) for s in spectra),
        "effective_rank": statistics.median(effective_rank(s) for s in spectra),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For the page: one line a method, the mean over its adapters, least and most behind it."""
    lines = [
        "| adapter | adapters | held-out loss | intruders at 0.5 (paper's rule) | at 0.3 | at 0.7 | weights with any | "
        "norm of change / weight | largest singular value of change / weight | effective rank |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault(_kind(one["adapter"]), []).append(one)
    for kind, of in groups.items():
        at = {eps: [one["intruders"][EPSILONS.index(eps)] for one in of] for eps in (0.3, 0.5, 0.7)}
        paper = [one["intruders_paper"][EPSILONS.index(0.5)] for one in of]
        losses = [one["held_out_loss"] for one in of]
        lines.append(
            f"| {kind} | {len(of)} | {_spread(losses, '.2f')} | {_spread(at[0.5], '.0f')} ({_spread(paper, '.0f')}) | "
            f"{_spread(at[0.3], '.0f')} | {_spread(at[0.7], '.0f')} | {_spread([o['weights_with_any'] for o in of], '.0f')} of "
            f"{of[0]['weights']} | {_spread([100 * o['relative_norm'] for o in of], '.2f')} % | "
            f"{_spread([100 * o['relative_spectral_norm'] for o in of], '.1f')} % | {_spread([o['effective_rank'] for o in of], '.0f')} |"
        )
    return "\n".join(lines)


def _kind(name: str) -> str:
    """``lora`` of ``lora-phonemes-0``."""
    return name.rsplit("-", 2)[0]


def _spread(values: list[float], form: str) -> str:
    mean = f"{statistics.mean(values):{form}}"
    least, most = f"{min(values):{form}}", f"{max(values):{form}}"
    return mean if least == most else f"{mean} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "intruders.json")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(given.json.read_text())["rows"] if given.json.is_file() else []
    known = {one["digest"] for one in rows}
    whole = [folder for folder in given.folders if (folder / store.HEAD).is_file()]
    fresh = [folder for folder in whole if json.loads((folder / store.HEAD).read_text())["digest"] not in known]
    if fresh:
        rows = sorted(rows + measure(fresh), key=lambda one: str(one["adapter"]))
        write_json(given.json, machine() | {"rows": rows})
    print(table(rows))
    if given.page:
        text = given.page.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        given.page.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
