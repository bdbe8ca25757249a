"""Write the generated tables: the methods in README.md, and docs/methods.md.

python docs/tables.py            write
python docs/tables.py --check    say what is out of date, and exit with 1 if anything is (a test does this)
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import intarsia as ia

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- methods: made by docs/tables.py -->", "<!-- methods end -->"


def ours() -> list[type[ia.Method]]:
    """The methods of this package; those of others that happen to be installed have their own pages."""
    return [cls for cls in ia.registry.methods().values() if cls.__module__.startswith("intarsia.methods.")]


def readme_table() -> str:
    """One row a method or named variant."""
    rows = ["| name | W' | trained numbers a weight | paper |", "|---|---|---|---|"]
    for cls in ours():
        formula = cls.formula.replace("|", "\\|")
        rows.append(f"| `{cls.name}` ({cls.title}) | `{formula}` | {cls.trained} | {_link(cls.paper)} |")
    for variant in ia.registry.variants().values():
        fields = ", ".join(f"{k}={v}" for k, v in variant.fields.items())
        cls = ia.registry.find(variant.name)
        rows.append(
            f"| `{variant.name}` ({variant.title}) | {cls.title} with {fields} | {cls.trained} | {_link(variant.paper)} |"
        )
    return "\n".join(rows)


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
        parts.append(
            f"Default learning rate (Adam): {cls.default_lr:g}. {'Can' if cls.mergeable else 'Cannot'} be set into the base."
        )
    return "\n\n".join(parts) + "\n"


def _link(paper: str) -> str:
    if paper.startswith("https://"):
        return f"[source]({paper})"
    return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})"


def expected() -> dict[Path, str]:
    """Every generated file with the text that it should have."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        ROOT / "README.md": f"{before}{BEGIN}\n{readme_table()}\n{END}{after}",
        ROOT / "docs" / "methods.md": methods_page(),
    }


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
