"""The model card: a README.md that says what an adapter is, what it changes and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from intarsia.edits import where

if TYPE_CHECKING:
    from intarsia.store.adapter import Adapter


def card(head: Mapping[str, Any], adapter: Adapter, stored: int) -> str:
    """Markdown with the front matter that model hubs read. ``stored``: bytes of the file of tensors."""
    base, method = head["base"], dict(head["method"])
    name = method.pop("name", "?")
    fields = "".join(f"| {key} | `{value}` |\n" for key, value in method.items())
    notes = "".join(f"| {key} | {_show(value)} |\n" for key, value in head["note"].items())
    about = "".join(f"| {key} | `{value}` |\n" for key, value in head["about"].items() if key != "merged")
    parts = "".join(f"| made of {part} | {_made_of(adapter.about['merged'][part])} |\n" for part in adapter.made_of)
    weights = sum(edit.in_weight() is not None for edit in adapter.outlines.values())
    does = [
        f"edits {weights} weights and changes up to\n{adapter.touched:,} of their {adapter.size:,} entries ({adapter.share:.2%})"
    ] if weights else []  # fmt: skip
    if adapter.inserts:
        kinds = ", ".join(dict.fromkeys(one.inserted.what for many in adapter.inserts.values() for one in many))
        does.append(
            f"acts {where(adapter.inserts)} ({kinds}), which no\nweight can hold: {adapter.multiplications:,} multiplications "
            "for every token"
        )
    front = (
        f"base_model: {base['source']}\n" if "/" in base["source"] and not base["source"].startswith(("/", ".")) else ""
    )
    return f"""---
library_name: intarsia
tags: [intarsia, adapter, {name}]
{front}---

# {head["name"]}

A **{name}** adapter for `{base["source"] or "an unnamed base"}`. It {", and ".join(does)}, in {stored / 1e6:.2f} MB.

```python
import intarsia as ia

deck = ia.Deck(model)          # the base named above
deck.add("{head["name"]}")     # this folder
deck.use("{head["name"]}")
deck.off()                     # the base again, to the bit
```

| made with | |
|---|---|
| method | `{name}` |
{fields}{about}{parts}
| base | |
|---|---|
| source | `{base["source"]}` |
| dtype | `{base["dtype"]}` |
| SHA-256 | `{base["digest"]}` |

| adapter | |
|---|---|
| SHA-256 | `{head["digest"]}` |
| written by | {head["written_by"]}, {head["created"]} |
{notes}"""


def _made_of(facts: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{key} `{value}`" for key, value in facts.items() if key not in ("digest", "method"))
    return f"{facts.get('method', '?')}, {rest}, SHA-256 `{facts['digest']}`"


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
