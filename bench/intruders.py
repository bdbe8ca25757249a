"""Intruder dimensions of trained adapters beside their losses: does LoRA make more of them than sparse adapters do?

    python bench/intruders.py out/fusing/adapters/* [--json bench/results/intruders.json] [--page docs/analyze.md]

The adapters are folders that `intarsia train` wrote, all of one base; an adapter that the file has already is not measured again.
Each weight's base is decomposed once, and every adapter's changed weight once: about a quarter of a minute
an adapter of SmolLM2-135M on one idle core. Counts are for the 10 leading left directions of each weight, by the paper's rule (nearly equal singular values are
not joined) and by ours, at every threshold from 0.1 to 0.9. "New" are those of our rule at 0.5 that lie mostly outside of the space of the
base's 20 leading directions: a change that only turns leading directions into each other makes intruders, but brings nothing in.
With --page the table is written between the page's marks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from intarsia import pretrained, store
from intarsia.analyze import SVD, Intruders, change_norm, effective_rank, intruders, module_of, spectrum, stable_rank
from intarsia.bench.machine import machine, write_json
from intarsia.edits import Edit
from intarsia.site import site_at

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- made by bench/intruders.py -->", "<!-- end -->"
EPSILONS = tuple(i / 10 for i in range(1, 10))
TOP = 10
SPECTRA = 5  # the spectrum of the change itself is taken of every fifth weight


# weight's name, edit, weight, its directions, and their lengths within the base's leading ones
Look = tuple[str, Edit, torch.Tensor, Intruders, list[float]]


def measure(folders: list[Path], say: Any = print) -> list[dict[str, Any]]:
    """One row an adapter."""
    adapters = {folder.name: store.read(folder) for folder in folders}
    bases = {adapter.base.digest for adapter in adapters.values()}
    if len(bases) != 1:
        raise SystemExit("these adapters belong to different bases")
    first = next(iter(adapters.values()))
    model = pretrained.load(first.base.source, dtype=first.base.dtype).model
    names = list(dict.fromkeys(name for adapter in adapters.values() for name in adapter.edits))
    found: dict[str, list[Look]] = {key: [] for key in adapters}
    for number, name in enumerate(names, 1):
        weight = site_at(model, name.removesuffix(".weight")).weight.detach()
        base = SVD.of(weight)
        for key, adapter in adapters.items():
            if name in adapter.edits:
                edit = adapter.edits[name]
                looked = intruders(weight, edit, top=TOP, name=name, base=base)
                inside = (base.U[:, : 2 * TOP].double().mT @ looked.changed.U).norm(dim=0).tolist()
                found[key].append((name, edit, weight, looked, inside))
        if number % 10 == 0:
            say(f"{number} of {len(names)} weights", flush=True)
    return [row(key, adapters[key], each) for key, each in found.items()]


def row(name: str, adapter: store.Adapter, each: list[Look]) -> dict[str, Any]:
    some = each[::SPECTRA]
    spectra = [spectrum(edit, weight) for _, edit, weight, _, _ in some]
    changes = [change_norm(edit, weight) for _, edit, weight, _, _ in each]
    sizes = [float(weight.double().norm()) for _, _, weight, _, _ in each]
    modules = list(dict.fromkeys(module_of(weight) for weight, *_ in each))
    directions = [d for _, _, _, looked, _ in each for d in looked.directions]
    return {
        "adapter": name,
        "digest": adapter.digest,
        "method": dict(adapter.method),
        "model": adapter.base.source,
        "dtype": adapter.base.dtype,
        "steps": adapter.note.get("steps"),
        "lr": adapter.note.get("learning rate"),
        "held_out_loss": adapter.note.get("held-out loss"),
        "held_out_loss_of_the_base": adapter.note.get("held-out loss of the base"),
        "weights": len(each),
        "top": TOP,
        "epsilons": list(EPSILONS),
        "intruders_paper": [sum(d.similarity < eps for d in directions) for eps in EPSILONS],
        "intruders": [sum(d.within < eps for d in directions) for eps in EPSILONS],
        "new": sum(inside[d.j] < 0.5 for *_, looked, inside in each for d in looked.found),
        "by_module": {
            module: sum(len(looked.found) for weight, _, _, looked, _ in each if module_of(weight) == module)
            for module in modules
        },
        "weights_with_any": sum(bool(looked.found) for _, _, _, looked, _ in each),
        "energy_share": statistics.mean(looked.energy_share for _, _, _, looked, _ in each),
        "relative_norm": math.hypot(*changes) / math.hypot(*sizes),
        "relative_spectral_norm": statistics.median(
            float(s[0] / looked.changed.S[0]) for s, (_, _, _, looked, _) in zip(spectra, some, strict=True)
        ),
        "stable_rank": statistics.median(stable_rank(s) for s in spectra),
        "effective_rank": statistics.median(effective_rank(s) for s in spectra),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For the page: one line a method, the mean over its adapters, least and most behind it."""
    head = ("adapter", "how many", "held-out loss", "intruders at 0.5", "paper's rule", "new ones", "at 0.7", "weights with any",
            "norm of change / weight", "largest singular value of change / weight", "effective rank")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault(one["adapter"].rsplit("-", 2)[0], []).append(one)  # lora of lora-phonemes-0
    half, loose = EPSILONS.index(0.5), EPSILONS.index(0.7)
    for kind, of in groups.items():
        cells = [
            kind,
            str(len(of)),
            _spread([o["held_out_loss"] for o in of], ".2f"),
            _spread([o["intruders"][half] for o in of], ".0f"),
            _spread([o["intruders_paper"][half] for o in of], ".0f"),
            _spread([o["new"] for o in of], ".0f"),
            _spread([o["intruders"][loose] for o in of], ".0f"),
            _spread([o["weights_with_any"] for o in of], ".0f") + f" of {of[0]['weights']}",
            _spread([100 * o["relative_norm"] for o in of], ".1f") + " %",
            _spread([100 * o["relative_spectral_norm"] for o in of], ".0f") + " %",
            _spread([o["effective_rank"] for o in of], ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
