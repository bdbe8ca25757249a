"""intarsia: sparse high-rank adapters, set into the base weights and taken out again to the bit.

The names below are found when they are first used, so that ``intarsia --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from intarsia._version import __version__
from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from intarsia import optim, registry
    from intarsia.deck import Deck
    from intarsia.distributed import load_checkpoint, replicate, save_checkpoint, shard
    from intarsia.method import Method
    from intarsia.methods import Dora, Lora, Paca, Prefix, Prompt, S2ft, Shira
    from intarsia.model import (
        activate,
        active_names,
        adapter_state,
        attach,
        attached_names,
        detach,
        digest,
        export,
        load,
        load_adapter_state,
        rows,
        save,
        sync,
    )
    from intarsia.registry import register
    from intarsia.schedule import regrow
    from intarsia.store import Adapter, read
    from intarsia.support import scorer
    from intarsia.ticket import lottery

__all__ = [
    "Adapter", "Deck", "Dora", "IntarsiaError", "Lora", "Method", "Paca", "Prefix", "Prompt", "S2ft", "Shira", "__version__", "activate",
    "active_names", "adapter_state", "attach", "attached_names", "detach", "digest", "export", "load",
    "load_adapter_state", "load_checkpoint", "lottery", "optim", "read", "register", "registry", "regrow", "replicate", "rows", "save",
    "save_checkpoint", "scorer", "shard", "sync",
]  # fmt: skip

_PLACES = {
    "Adapter": "store", "Deck": "deck", "Dora": "methods", "Lora": "methods", "Method": "method", "Paca": "methods",
    "Prefix": "methods", "Prompt": "methods", "S2ft": "methods", "Shira": "methods", "activate": "model", "active_names": "model", "adapter_state": "model",
    "attach": "model", "attached_names": "model", "detach": "model", "digest": "model", "export": "model", "load": "model",
    "load_adapter_state": "model", "load_checkpoint": "distributed", "lottery": "ticket", "read": "store",
    "register": "registry", "regrow": "schedule", "replicate": "distributed", "rows": "model", "save": "model",
    "save_checkpoint": "distributed", "scorer": "support", "shard": "distributed", "sync": "model",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("optim", "registry"):
        return importlib.import_module(f"intarsia.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'intarsia' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"intarsia.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
