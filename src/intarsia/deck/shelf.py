"""A shelf: what was made and may be wanted again, within a budget of bytes. What was not used for longest goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Item:
    value: Any
    bytes: int
    adapters: frozenset[str]
    forget: Callable[[], None] | None


class Shelf:
    """Not safe for threads by itself; the deck's lock guards it."""

    MOST_DROPPED = 32  # names of dropped things that are remembered

    def __init__(self, memory: int) -> None:
        self.memory, self.bytes = memory, 0
        self.dropped: list[str] = []
        self._items: OrderedDict[Hashable, _Item] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """What was put there, or None."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key].value

    def put(
        self, key: Hashable, value: Any, size: int, adapters: frozenset[str], forget: Callable[[], None] | None = None
    ) -> None:
        """Keep it, and drop others for it; what is larger than the whole shelf is not kept. ``forget`` is called at dropping."""
        self._drop(key, say=False)
        self._items[key] = _Item(value, size, adapters, forget)
        self.bytes += size
        for old in list(self._items):
            if self.bytes <= self.memory:
                break
            self._drop(old)

    def clear(self, adapter: str | None = None, kind: str | None = None) -> None:
        """Drop what belongs to one adapter, is of one kind, or everything."""
        for key, item in list(self._items.items()):
            if (adapter is None or adapter in item.adapters) and (
                kind is None or (isinstance(key, tuple) and key[0] == kind)
            ):
                self._drop(key, say=False)

    @property
    def keys(self) -> list[Hashable]:
        return list(self._items)

    def _drop(self, key: Hashable, say: bool = True) -> None:
        item = self._items.pop(key, None)
        if item is None:
            return
        self.bytes -= item.bytes
        if item.forget:
            item.forget()
        if say:
            self.dropped = [*self.dropped, _named(key)][-self.MOST_DROPPED :]


def _named(key: Any) -> str:
    kind, *rest = key
    return f"{kind} of " + " -> ".join(
        " + ".join(name if share == 1 else f"{share:g} {name}" for name, share in part) or "base"
        if isinstance(part, tuple)
        else str(part)
        for part in rest
    )
