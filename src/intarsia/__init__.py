"""intarsia: sparse high-rank adapters, set into the base weights and taken out again to the bit."""

from intarsia import registry
from intarsia._version import __version__
from intarsia.deck import Deck
from intarsia.errors import IntarsiaError
from intarsia.method import Method
from intarsia.methods import Dora, Lora, Paca, Shira
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
from intarsia.store import Adapter, read

__all__ = [
    "Adapter", "Deck", "Dora", "IntarsiaError", "Lora", "Method", "Paca", "Shira", "__version__", "activate",
    "active_names", "adapter_state", "attach", "attached_names", "detach", "digest", "export", "load",
    "load_adapter_state", "read", "register", "registry", "rows", "save", "sync",
]  # fmt: skip
