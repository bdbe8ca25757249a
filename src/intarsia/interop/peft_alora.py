"""PEFT's aLoRA, ``LoraConfig(alora_invocation_tokens=...)``: a LoRA's folder, and the tokens from which on it acts.

What an insert of ours that is activated by tokens does is exactly that, where it begins at the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from intarsia import store
from intarsia.edits import SITS_AT, Activated, Edit, Insert, LowRank, is_tokens
from intarsia.operators import Operator

TOKENS = "alora_invocation_tokens"


def low_rank(edit: Edit) -> LowRank | None:
    """The low rank that acts from the first token of an invocation on, where that is all that an edit does."""
    if not isinstance(edit, Insert) or edit.place != "parallel" or not isinstance(edit.inserted, Activated):
        return None
    g = edit.inserted
    return None if g.start_offset else LowRank(edit.shape, g.B, g.A, edit.scale)


def as_lora(adapter: store.Adapter) -> tuple[store.Adapter, dict[str, Any]]:
    """An aLoRA as the LoRA that it is from its invocation on, and what PEFT's config says of that; any other adapter as it is."""
    found = {weight: (low_rank(edit), edit) for weight, edit in adapter.edits.items()}
    edits = {weight: plain for weight, (plain, _) in found.items() if plain is not None}
    invocations = {
        edit.inserted.invocation
        for _, edit in found.values()
        if isinstance(edit, Insert) and isinstance(edit.inserted, Activated)
    }
    if len(edits) < len(found) or len(invocations) != 1:
        return adapter, {}
    return replace(adapter, edits=edits), {TOKENS: list(invocations.pop())}


def faults(config: Mapping[str, Any]) -> list[str]:
    """What keeps the config of an aLoRA from being read."""
    tokens = config.get(TOKENS)
    if tokens is None:
        return []
    found = (
        []
        if isinstance(tokens, list) and is_tokens(tokens)
        else [f"{TOKENS} is {tokens!r}; expected one or more numbers of tokens"]
    )
    return found + (
        [f"{TOKENS} with use_dora: lengths of rows are those of a weight, and nothing is folded here"]
        if config.get("use_dora")
        else []
    )


def activated(edit: Edit, operator: Operator, config: Mapping[str, Any]) -> Edit | str:
    """A LoRA's edit as it acts by the config, or why it cannot."""
    if config.get(TOKENS) is None:
        return edit
    assert isinstance(edit, LowRank)
    if operator.kind not in SITS_AT:
        return f"{TOKENS} at a layer of the kind {operator.kind}; such an adapter acts beside layers of the kind {', '.join(SITS_AT)}"
    return Insert(edit.shape, Activated(edit.A, edit.B, tuple(config[TOKENS])), "parallel", edit.scale)
