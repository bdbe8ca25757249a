"""Write the generated tables: the methods in README.md, docs/methods.md, what becomes of edits in docs/interop.md, and docs/merging.md.

python docs/tables.py            write
python docs/tables.py --check    say what is out of date, and exit with 1 if anything is (a test does this)
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch

import intarsia as ia
from intarsia.edits import (
    KINDS,
    BlockAffine,
    Blocks,
    Bottleneck,
    Combined,
    Core,
    Dense,
    Edit,
    Insert,
    Kernel,
    Kronecker,
    LowRank,
    Multiplied,
    Rescaled,
    Scaled,
    Sequential,
    Sparse,
    Sum,
    Tiled,
    Transformed,
)
from intarsia.errors import IntarsiaError
from intarsia.interop import TARGETS
from intarsia.merge import KINDS as MERGED_KINDS
from intarsia.merge import Rule, Term, Where, known_rules
from intarsia.merge.rule import taken
from intarsia.support import GRANULARITIES, named_granularity

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- methods: made by docs/tables.py -->", "<!-- methods end -->"
INTO, BESIDE = (
    "Can be set into the base.",
    "Acts beside its layers and cannot be merged; a deck switches it all the same.",
)
AHEAD = "Stands before the tokens and cannot be merged; a deck switches it all the same."
BEGIN_EDITS, END_EDITS = "<!-- edits: made by docs/tables.py -->", "<!-- edits end -->"

BEGIN_RULES, END_RULES = "<!-- rules: made by docs/tables.py -->", "<!-- rules end -->"
BEGIN_OUTCOMES, END_OUTCOMES = "<!-- outcomes: made by docs/tables.py -->", "<!-- outcomes end -->"


def ours() -> list[type[ia.Method]]:
    """The methods of this package; those of others that happen to be installed have their own pages."""
    return [cls for cls in ia.registry.methods().values() if cls.__module__.startswith("intarsia.methods.")]


ROLES = ("adapter", "init", "allocator", "optimizer", "mixture", "serving", "quantization", "base-compression")
TRAINING = (
    "optimizer",
    "allocator",
    "base-compression",
)  # roles of what is no method and stands in the table all the same


def readme_table() -> str:
    """One row a method, named variant, optimizer, allocator or way to compress a base; in the order of what they are."""
    rows: list[tuple[int, str, str]] = []

    def add(role: str, name: str, title: str, *cells: str) -> None:
        row = " | ".join((f"`{name}` ({title})", *cells))
        rows.append((ROLES.index(role), name, f"| {row} |"))

    for cls in ours():
        words = [word if always else f"({word})" for word, always in ia.registry.asks_for(cls).items()]
        needs = ", ".join(words + ([] if cls.mergeable else [f"{cls.cost} a token"]))
        add(cls.role, cls.name, cls.title, _code(cls.formula), cls.trained, cls.role, needs, _link(cls.paper))
    for variant in ia.registry.variants().values():
        fields = ", ".join(f"{k}={v}" for k, v in variant.fields.items())
        cls = ia.registry.find(variant.name)
        what = f"{cls.title} with {fields}" if fields else _code(variant.formula)
        add(cls.role, variant.name, variant.title, what, cls.trained, cls.role, "", _link(variant.paper))
    for system in ia.registry.systems().values():
        if system.role in TRAINING:
            add(system.role, system.id, system.title, _code(system.formula), "", system.role, "", _link(system.paper))
    head = [
        "| name | W', y' or the step | trained numbers a weight | role | needs, and costs | paper |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(head + [row for _, _, row in sorted(rows)])


def _code(formula: str) -> str:
    return "`" + formula.replace("|", "\\|") + "`"


def methods_page() -> str:
    """docs/methods.md: every method with its fields, from the classes."""
    parts = [
        "# Methods",
        "Made by `docs/tables.py` from the classes. The same on the command line: `intarsia methods NAME`.",
    ]
    for cls in ours():
        doc = sys.modules[cls.__module__].__doc__ or ""
        parts.append(f"## {cls.title} (`{cls.name}`)\n\n```text\n{doc.strip()}\n```")
        rows = ["| field | type | default | |", "|---|---|---|---|"]
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
            if not isinstance(field.type, str | type):
                kind = str(field.type)
            default = field.default.config() if isinstance(field.default, ia.Method) else field.default
            rows.append(f"| `{field.name}` | {str(kind).replace('|', 'or')} | `{default}` | {field.metadata['help']} |")
        parts.append("\n".join(rows))
        fate = INTO if cls.mergeable else AHEAD if "decoder" in cls.kinds else BESIDE
        parts.append(f"Default learning rate (Adam): {cls.default_lr:g}. {fate}")
    return "\n\n".join(parts) + "\n"


def samples() -> dict[str, Edit]:
    """One edit of every kind that a file may hold, under the name that the table gives it."""
    shape, index = (64, 64), torch.tensor([1])
    found: dict[str, Edit] = {}
    for name in GRANULARITIES:
        unit = named_granularity(name)
        found[unit.plural] = Sparse(shape, unit, index, torch.ones(unit.values_shape(shape, 1)))
    low_rank = LowRank(shape, torch.ones(64, 1), torch.ones(1, 64), 1.0)
    found["low_rank"] = low_rank
    found["rescaled (DoRA) low rank"] = Rescaled(shape, low_rank, torch.ones(64))
    found["rescaled elements"] = Rescaled(shape, found["elements"], torch.ones(64))
    found["sum of elements and low_rank"] = Sum(shape, (found["elements"], low_rank))
    found["sum of rows and low_rank"] = Sum(shape, (found["rows"], low_rank))
    found["sum of elements and rows"] = Sum(shape, (found["elements"], found["rows"]))
    found["sum of rows and low_rank, weighted"] = Sum(shape, (found["rows"], low_rank), (0.5, 2.0))
    kernel = partial(Kernel, shape, torch.linspace(-1, 1, 128).view(2, 64, 1), torch.ones(2, 64, 1), None, rule="soft")
    found["kernel, most of it at 0"], found["kernel, other"] = kernel(zeros=4000), kernel(zeros=9)
    factors = {"A": torch.ones(1, 64), "B": torch.ones(64, 1)}
    found["core"] = Core(shape, factors | {"C": torch.ones(1, 1)}, {}, 1.0)
    found["core with a start"] = Core(shape, factors, {"B": torch.zeros(64, 1)}, 1.0)
    found["sequential"] = Sequential(shape, torch.ones(64, 1), torch.ones(1, 64), 1.0)
    found["dense"] = Dense(shape, torch.ones(shape))
    found["kronecker"] = Kronecker(shape, torch.ones(8, 8), torch.ones(8, 8), 1.0)
    found["blocks"] = Blocks(shape, torch.ones(4, 16, 2), torch.ones(4, 2, 16), 1.0)
    found["combined"] = Combined(shape, torch.ones(3), torch.ones(3), 2, 0, 1.0)
    found["scaled"] = Scaled(shape, torch.ones(32, 2), torch.ones(2, 64), 0, "dense", "paper", 1.0)
    found["tiled"], found["block_affine"] = Tiled(shape, torch.ones(8, 64)), BlockAffine(shape, torch.ones(8, 8, 8))
    found["multiplied by low_rank"] = Multiplied(shape, low_rank)
    found["transformed low_rank"] = Transformed(shape, low_rank, (("haar", "haar"),))
    found["transformed elements"] = Transformed(shape, found["elements"], (("identity", "hadamard"),))
    found["insert"] = Insert(shape, Bottleneck(torch.ones(2, 64), torch.ones(64, 2), "tanh"), "parallel")
    found["sum of elements and insert"] = Sum(shape, (found["elements"], found["insert"]))
    if missing := KINDS.keys() - {edit.kind for edit in found.values()}:
        raise SystemExit(f"docs/tables.py has no sample of the edits {', '.join(sorted(missing))}")
    return found


def edits_table() -> str:
    """What becomes of each kind of edit in each format, asked of the code that writes it."""
    rows = [f"| edit | {' | '.join(f'`{name}`' for name in TARGETS)} |", "|---" * (len(TARGETS) + 1) + "|"]
    for name, edit in samples().items():
        outcomes = [target.outcome(edit) for target in TARGETS.values()]
        shown = [f"with `{said}`" if said.startswith("--") else said for said in outcomes]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(rows)


def rules_table() -> str:
    """One row a merge rule."""
    rows = ["| `merge_method` | | D | takes | paper |", "|---|---|---|---|---|"]
    for name, rule in known_rules().items():
        kinds = ", ".join(kind for kind in MERGED_KINDS if kind in rule.takes)
        rows.append(f"| `{name}` | {rule.title} | `{rule.formula}` | {kinds} | {_link(rule.paper)} |")
    return "\n".join(rows)


def outcomes_table() -> str:
    """What each rule makes of two edits of the same weight, asked of the rule."""
    edits = samples()
    kept = Rescaled((64, 64), edits["low_rank"], torch.full((64,), 2.0))
    groups: dict[str, list[Edit]] = {
        "elements": [edits["elements"]] * 2,
        "columns": [edits["columns"]] * 2,
        "elements and columns": [edits["elements"], edits["columns"]],
        "low ranks": [edits["low_rank"]] * 2,
        "elements and low rank": [edits["elements"], edits["low_rank"]],
        "DoRA and elements": [kept, edits["elements"]],
    }
    rows = [f"| of | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    for name, rule in known_rules().items():
        rows.append(f"| `{name}` | {' | '.join(outcome(rule(), group) for group in groups.values())} |")
    return "\n".join(rows)


def outcome(rule: Rule, edits: list[Edit]) -> str:
    """The kind of edit that a rule with its defaults makes of these, or what it asks for."""
    try:
        parts = [taken(rule, "a", "up.weight", edit, None) for edit in edits]
        terms = [Term(f"a{i}", edit, 0.5, rule) for i, edit in enumerate(parts)]
        return rule.merge(terms, Where("up.weight")).edit.kind.replace("_", " ")
    except IntarsiaError as error:
        said = str(error)
        return "needs `rank`" if "give svd a rank" in said else "needs `model`" if "model: MODEL" in said else "refused"


def _link(paper: str) -> str:
    if paper.startswith("https://"):
        return f"[source]({paper})"
    return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"


def expected() -> dict[Path, str]:
    """Every generated file with the text that it should have."""
    return {
        ROOT / "README.md": _between(ROOT / "README.md", BEGIN, readme_table(), END),
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "docs" / "interop.md": _between(ROOT / "docs" / "interop.md", BEGIN_EDITS, edits_table(), END_EDITS),
        ROOT / "docs" / "merging.md": merging_page(),
    }


def merging_page() -> str:
    """docs/merging.md with its two tables."""
    page = ROOT / "docs" / "merging.md"
    text = _between_in(page.read_text(encoding="utf-8"), BEGIN_RULES, rules_table(), END_RULES)
    return _between_in(text, BEGIN_OUTCOMES, outcomes_table(), END_OUTCOMES)


def _between(page: Path, begin: str, table: str, end: str) -> str:
    """The page with another table between its two marks."""
    return _between_in(page.read_text(encoding="utf-8"), begin, table, end)


def _between_in(text: str, begin: str, table: str, end: str) -> str:
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    stale = [path for path, text in expected().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        print(
            "\n".join(f"{path.relative_to(ROOT)} is out of date: python docs/tables.py" for path in stale)
            or "tables are up to date"
        )
        return 1 if stale else 0
    for path in stale:
        path.write_text(expected()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
