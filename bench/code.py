"""How much code a method takes, and how much of it stands twice.    python bench/code.py [--json F]

Lines of a method's file (all of them, docstring included): median and largest. Of a package: the share of its lines that stand in a run of
six or more which stands elsewhere in it too, comments and blank lines left out and indentation ignored; the same of HF PEFT beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections import defaultdict
from pathlib import Path

from intarsia.bench.machine import machine, write_json

RUN = 6
OURS = Path(__file__).parent.parent / "src" / "intarsia"


def lines_of(file: Path) -> list[str]:
    """What counts of a file: its lines without indentation, blank ones and comments."""
    stripped = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def repeated(folder: Path) -> dict[str, float | int]:
    """Lines of a package, and how many of them stand in a run that stands elsewhere too."""
    files = {file: lines_of(file) for file in sorted(folder.rglob("*.py"))}
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for file, lines in files.items():
        for start in range(len(lines) - RUN + 1):
            places[tuple(lines[start : start + RUN])].append((file, start))
    twice = {
        (file, start + n) for found in places.values() if len(found) > 1 for file, start in found for n in range(RUN)
    }
    total = sum(map(len, files.values()))
    return {"files": len(files), "lines": total, "repeated": len(twice), "share": len(twice) / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    methods = {f.stem: len(f.read_text(encoding="utf-8").splitlines()) for f in (OURS / "methods").glob("[!_]*.py")}
    rows: list[dict[str, object]] = [{"subject": "intarsia", **repeated(OURS)}]
    spec = importlib.util.find_spec("peft")
    if spec is not None and spec.origin is not None:
        rows.append({"subject": "HF PEFT", **repeated(Path(spec.origin).parent)})
    longest = max(methods, key=methods.__getitem__)
    print(
        f"{len(methods)} method files: median {statistics.median(methods.values()):g} lines, most {methods[longest]} ({longest})"
    )
    for row in rows:
        print(
            "{subject}: {lines:,} lines in {files} files, {share:.1%} of them in runs of six or more that stand twice".format(
                **row
            )
        )
    if given.json:
        write_json(given.json, machine() | {"rows": rows, "methods": methods})


if __name__ == "__main__":
    main()
